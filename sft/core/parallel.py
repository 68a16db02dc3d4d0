"""Work in several processes or a thread, results in order."""

import os
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from threading import Thread
from typing import Any, TypeVar

from sft.core.errors import RunError

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], num_proc: int) -> Iterator[Result]:
    """Map a function over items in `num_proc` processes: results come in the order of the items, and at most two a
    process wait. Raise RunError where a process died, of lack of memory most often. One process means this one. Others
    are spawned, since forking a process that has threads can hang."""
    if num_proc == 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(num_proc, mp_context=get_context("spawn"), initializer=_end_at_once) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(_call, pickle.dumps((function, item))))
                if len(waiting) > 2 * num_proc:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            found = f"one of {num_proc} processes died, perhaps for want of memory"
            raise RunError(f"{found}; try with a smaller --num-proc") from error
        finally:
            pool.shutdown(cancel_futures=True)


def prefetch(items: Iterator[Item]) -> Iterator[Item]:
    """Yield the same items; a thread makes the next one while one is used."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item  # type: ignore[misc]


def _call(pickled: bytes) -> Any:
    """Call a function on an item; what goes wrong with unpickling would end the process in the hands of the pool."""
    function, item = pickle.loads(pickled)
    return function(item)


def _end_at_once() -> None:
    """End this worker at once on Ctrl-C or when its parent is killed: else it works on, or waits for ever."""
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(1))
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    Thread(target=watch, daemon=True).start()
