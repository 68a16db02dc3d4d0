"""Work shared out to the processes that are connected; alone, a process does it all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from sft.distributed import of_all, this_process
from sft.errors import RunError, UserError

Item = TypeVar("Item")
Found = TypeVar("Found")


def deal(items: Sequence[Item]) -> list[tuple[Item, Sequence[Item]]]:
    """The items of this process, each with all that the processes do in that round.

    Every process has equally many: one that the last round leaves short repeats another's. Engines that shard a model
    wait for every process in every layer.
    """
    own = this_process()
    rounds = [items[first : first + own.of] for first in range(0, len(items), own.of)]
    return [(one[min(own.number, len(one) - 1)], one) for one in rounds]


def gathered(found: dict[Item, Found]) -> dict[Item, Found]:
    """What all processes found."""
    return dict(of_all([*found.items()]))


@contextmanager
def together() -> Iterator[None]:
    """What fails inside in one process fails in all of them at the end, so that none waits for what never comes.

    Inside, a process waits for others only where all of them do.

    Raises:
        UserError, RunError: it failed in another process. Where it failed in this one, the error itself.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is, the others have to know
        own = error
    found = of_all([_told(own)])
    if own is not None:
        raise own
    for number, problem in enumerate(found):
        if problem:
            kind, text = problem
            raise kind(text if kind is UserError else f"process {number} of {len(found)}: {text}")


def _told(error: Exception | None) -> tuple[type[UserError | RunError], str] | None:
    """An error as the other processes raise it."""
    if error is None:
        return None
    is_ours = isinstance(error, UserError | RunError)
    text = str(error) if is_ours else f"{type(error).__name__}: {' '.join(str(error).split())}"
    return (UserError if isinstance(error, UserError) else RunError), text


def from_main(call: Callable[[], Found]) -> Found:
    """What the call returns in the main process, in all of them. The others do not call it.

    Raises:
        UserError, RunError: see `together`.
    """
    found: list[Found] = []
    with together():
        if is_main_process():
            found.append(call())
    return of_all(found)[0]


def is_main_process() -> bool:
    """Whether this one prints and writes."""
    return this_process().is_main
