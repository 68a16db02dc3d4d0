"""Several processes that train together: which of them this one is, starting them, what they tell each other.

torchrun, SLURM and `launch` say in the environment which process this is. What they keep of a model is the engines'
matter (`sft.training.engines`). torch is imported only where there are several processes.

Work shared out to the processes that are connected; alone, a process does it all.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from sft.core.errors import RunError, UserError

if TYPE_CHECKING:
    import torch


Value = TypeVar("Value")

STOPPED = 75
"""Exit status of a run that was stopped and can go on (EX_TEMPFAIL of sysexits.h)."""
TIMEOUT = timedelta(hours=1)
"""How long a process waits for the others; one that writes a checkpoint of 9b lets them wait for minutes."""
GRACE_SECONDS = 10.0
"""How long processes have to end by themselves after one of them failed."""
_LIFELINE = "IDEFICS_SFT_LIFELINE"
"""Number of the file that ends when the process that started this one does."""
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
_LATE = ("Timed out waiting", "timed out")
"""What gloo and its store say when another process has ended, or does not come."""


class Rank(NamedTuple):
    """One of the processes that train together."""

    number: int = 0
    of: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this one prints and writes."""
        return self.number == 0


ALONE = Rank()


# ------------------------------------------------------------------------------------------------ which one this is


class _Names(NamedTuple):
    """Environment variables of a launcher."""

    rank: str
    world_size: str
    local_rank: str


_TORCHRUN = _Names("RANK", "WORLD_SIZE", "LOCAL_RANK")
_SRUN = _Names("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
"""Of a task of srun; the batch script itself has the first of them too, but no number of tasks of a step."""


def launched_as() -> Rank:
    """Which process this is, by the environment: torchrun's, else srun's.

    Raises:
        UserError: the environment is of a launcher, but damaged.
    """
    names = next((names for names in (_TORCHRUN, _SRUN) if names.world_size in os.environ), None)
    if names is None:
        return ALONE
    found = {name: os.environ.get(name, "") for name in names}
    if not all(value.isdigit() for value in found.values()):
        raise UserError(f"environment: {found}; expected three numbers, as torchrun or srun set them")
    rank = Rank(int(found[names.rank]), int(found[names.world_size]))
    if rank.of > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError(
            "environment: several processes, but no MASTER_ADDR and MASTER_PORT, where they meet; start them with "
            "--nproc, torchrun or scripts/slurm/train.sbatch"
        )
    return rank


@contextmanager
def joined() -> Iterator[Rank]:
    """Connect this process with those that train with it, if there are any, on the GPU of its own.

    Raises:
        UserError: see `launched_as`, or there are more processes than GPUs.
        RunError: another process is gone.
    """
    rank = launched_as()
    is_ours = _end_with_launcher()
    if rank.of == 1:
        yield rank
        return
    import torch
    import torch.distributed as dist

    if _TORCHRUN.rank not in os.environ:  # torch and accelerate do not know srun
        os.environ |= {ours: os.environ[theirs] for ours, theirs in zip(_TORCHRUN, _SRUN, strict=True)}
    if torch.cuda.is_available():
        torch.cuda.set_device(_own_gpu())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
        yield rank
        dist.barrier()
        dist.destroy_process_group()
    except RuntimeError as error:
        if is_ours and any(sign in str(error) for sign in _GONE):
            sys.exit(1)  # the launcher sees which one it was, and says so
        if any(sign in str(error) for sign in (*_GONE, *_LATE)):
            raise RunError(f"process {rank.number} of {rank.of}: another one is gone or late ({error})") from error
        raise


def _own_gpu() -> int:
    import torch

    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= gpus:
        raise UserError(f"process {local} of this machine has no GPU of its own: there are {gpus}")
    return local


def speaks() -> bool:
    """Whether this process is the one that says why all of them end: the first that asks. Alone, it is."""
    if not _is_connected():
        return "RANK" not in os.environ or os.environ["RANK"] == "0"
    try:
        import torch

        return bool(torch.distributed.distributed_c10d._get_default_store().add("idefics-sft/ended", 1) == 1)
    except RuntimeError:
        return False  # the process that keeps the count has ended, and has spoken


# ------------------------------------------------------------------------------------------------ telling each other


def _is_connected() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def as_main(rank: Rank, call: Callable[[], Value]) -> Value:
    """What the call returns or raises in the main process, in all of them. The others do not call it."""
    if rank.of == 1:
        return call()
    import torch
    import torch.distributed as dist

    said: list[Any] = [None, None]
    if rank.is_main:
        try:
            said[0] = call()
        except (UserError, RunError) as error:
            said[1] = error
    dist.broadcast_object_list(said, device=torch.device("cpu"))
    if said[1] is not None:
        raise said[1]
    value: Value = said[0]
    return value


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, in each of them; alone, the tensor itself."""
    if not _is_connected():
        return tensor
    import torch.distributed as dist

    whole = tensor.to("cpu", copy=True)  # gloo's: small things need not wait for what the GPU still computes
    dist.all_reduce(whole)
    return whole.to(tensor.device)


def any_process(is_so: bool) -> bool:
    """Whether something is so in any of them, in each."""
    if not _is_connected():
        return is_so
    import torch

    return bool(summed(torch.tensor([float(is_so)])).item())


def this_process() -> Rank:
    """Which of those that are connected this one is."""
    if not _is_connected():
        return ALONE
    import torch.distributed as dist

    return Rank(dist.get_rank(), dist.get_world_size())


def of_all(own: list[Value]) -> list[Value]:
    """What all processes have, in their order. Not accelerate's `gather_object`: under DeepSpeed it takes processes
    without a GPU for one (accelerate 1.15)."""
    if not _is_connected():
        return own
    import torch.distributed as dist

    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return [one for part in found for one in part]


def wait_for_all() -> None:
    """Until every process is here."""
    if _is_connected():
        import torch.distributed as dist

        dist.barrier()


# ------------------------------------------------------------------------------------------------------- starting


def launch(number: int, arguments: Sequence[str]) -> int:
    """Run `idefics-sft ARGUMENTS` in several processes of this machine; the exit status of them all.

    Signals are handed on, once to each, and a process that fails ends all. Not torch's launcher: it prints a screen of
    its own about a user's mistake, hides the exit status, and kills what needs more than 30 seconds to stop.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    read, write = os.pipe()
    threads = max((os.cpu_count() or 1) // number, 1)
    shared = {"OMP_NUM_THREADS": str(threads)} | os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), _LIFELINE: str(read)}
    processes: list[subprocess.Popen[bytes]] = []

    def hand_on(signal_number: int, _: Any) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal_number)

    before = {sign: signal.signal(sign, hand_on) for sign in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        for rank in range(number):
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "sft.cli.main", *arguments],
                    env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    pass_fds=(read,),
                    start_new_session=True,  # else a terminal would interrupt them, and then we would again
                )
            )
        return _status_of_all(processes)
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
        for process in processes:
            process.kill()
        os.close(read)
        os.close(write)


def _status_of_all(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for processes to end; once one has failed the others get a little while to.

    Raises:
        RunError: one was killed.
    """
    deadline = None
    while any(process.poll() is None for process in processes):
        time.sleep(0.1)
        if deadline is None and any(process.returncode not in (None, 0, STOPPED) for process in processes):
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            break
    ended = {number: process.poll() for number, process in enumerate(processes)}
    statuses = {status for status in ended.values() if status is not None}
    killed = {number: -status for number, status in ended.items() if status is not None and status < 0}
    if killed and 2 not in statuses:
        number, sign = next(iter(killed.items()))
        raise RunError(
            f"process {number} of {len(ended)} was ended by {signal.Signals(sign).name}"
            + (", perhaps for want of memory" if sign == signal.SIGKILL else "")
        )
    worst_first = (2, *sorted(status for status in statuses if status not in (0, 2, STOPPED)), STOPPED, 0)
    return next(status for status in worst_first if status in statuses)


def _end_with_launcher() -> bool:
    """A process whose launcher is killed would wait for the others, or train on unseen. Whether it is `launch`."""
    lifeline = os.environ.pop(_LIFELINE, None)
    if lifeline is None:
        return False

    def watch() -> None:
        os.read(int(lifeline), 1)
        os._exit(1)

    Thread(target=watch, daemon=True).start()
    return True


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
