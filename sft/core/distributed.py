"""Several processes that work together: which of them this one is, what they tell each other, how work is assigned.

torchrun, SLURM and `sft.core.launch` say in the environment which process this is. What the processes keep of a model
is the engines' matter (`sft.training.engines`). torch is imported only where there are several processes; alone, a
process does all the work.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from sft.core.errors import RunError, UserError, reason_of
from sft.core.launch import end_with_launcher

if TYPE_CHECKING:
    import torch


Item = TypeVar("Item")
Value = TypeVar("Value")

TIMEOUT = timedelta(hours=1)  # a process waits for others; one that writes a checkpoint of 9b takes minutes
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
_LATE = ("Timed out waiting", "timed out")
"""What gloo and its store say when another process has ended, or does not come."""


class Rank(NamedTuple):
    """One of the processes that work together."""

    number: int = 0
    of: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.number == 0


ALONE = Rank()


_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
"""Environment variables of a launcher: this process, how many there are, which of this machine it is. A task of srun
has all three; the batch script itself has the first too, but no number of tasks of a step."""


def launched_rank() -> Rank:
    """Return which process this is, by the environment: torchrun's, else srun's; raise UserError if damaged."""
    names = next((names for names in (_TORCHRUN, _SRUN) if names[1] in os.environ), None)
    if names is None:
        return ALONE
    found = {name: os.environ.get(name, "") for name in names}
    if not all(value.isdigit() for value in found.values()):
        raise UserError(f"environment: {found}; expected three numbers, as torchrun or srun set them")
    rank = Rank(int(found[names[0]]), int(found[names[1]]))
    if rank.of > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        what = "several processes, but no MASTER_ADDR and MASTER_PORT, where they meet"
        raise UserError(f"environment: {what}; start them with --nproc, torchrun or scripts/slurm/train.sbatch")
    return rank


@contextmanager
def process_group() -> Iterator[Rank]:
    """Connect this process with those that work with it, if there are any, on the GPU of its own. Raise UserError as
    `launched_rank` and where there are more processes than GPUs, RunError where another process is gone."""
    rank = launched_rank()
    is_ours = end_with_launcher()
    if rank.of == 1:
        yield rank
        return
    import torch
    import torch.distributed as dist

    if "RANK" not in os.environ:  # torch and accelerate do not know srun
        os.environ |= {ours: os.environ[theirs] for ours, theirs in zip(_TORCHRUN, _SRUN, strict=True)}
    backend = "gloo"
    if torch.cuda.is_available():
        local, gpus, backend = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count(), "cpu:gloo,cuda:nccl"
        if local >= gpus:
            raise UserError(f"process {local} of this machine has no GPU of its own: there are {gpus}")
        torch.cuda.set_device(local)
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
        yield rank
        dist.barrier()
        dist.destroy_process_group()
    except RuntimeError as error:
        if is_ours and any(sign in str(error) for sign in _GONE):
            sys.exit(1)  # `launch` sees which process it was, and says so
        if any(sign in str(error) for sign in (*_GONE, *_LATE)):
            raise RunError(f"process {rank.number} of {rank.of}: another one is gone or late ({error})") from error
        raise


def current_rank() -> Rank:
    """Return which of the connected processes this one is."""
    group = _connected()
    return Rank(group.get_rank(), group.get_world_size()) if group else ALONE


def is_main_process() -> bool:
    """Return whether this process prints and writes."""
    return current_rank().is_main


def reports_the_error() -> bool:
    """Return whether this process is the one that says why all of them end: the first that asks. Alone, it is."""
    group = _connected()
    if not group:
        return os.environ.get("RANK", "0") == "0"
    try:
        return bool(group.distributed_c10d._get_default_store().add("idefics-sft/ended", 1) == 1)
    except RuntimeError:
        return False  # the process that keeps the count has ended, and has reported


def _connected() -> Any:
    """Return `torch.distributed` where this process is connected with others, else None."""
    torch = sys.modules.get("torch")
    is_connected = torch and torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed if torch and is_connected else None


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all processes, in each of them; alone, the tensor itself."""
    group = _connected()
    if not group:
        return tensor
    whole = tensor.to("cpu", copy=True)  # gloo's: small things need not wait for what the GPU still computes
    group.all_reduce(whole)
    return whole.to(tensor.device)


def any_process(is_so: bool) -> bool:
    """Return whether something is so in any process, in each of them."""
    if not _connected():
        return is_so
    import torch

    return bool(all_reduce_sum(torch.tensor([float(is_so)])).item())


def all_gather(own: list[Value]) -> list[Value]:
    """Return the lists of all processes end to end, in each of them. Not accelerate's `gather_object`: under DeepSpeed
    it takes processes without a GPU for one (accelerate 1.15)."""
    group = _connected()
    if not group:
        return own
    found: list[list[Value]] = [[]] * group.get_world_size()
    group.all_gather_object(found, own)
    return [one for part in found for one in part]


def all_gather_dict(own: dict[Item, Value]) -> dict[Item, Value]:
    """Return the dictionaries of all processes as one, in each of them."""
    return dict(all_gather([*own.items()]))


def barrier() -> None:
    """Wait until every process is here."""
    if group := _connected():
        group.barrier()


@contextmanager
def all_or_none() -> Iterator[None]:
    """Let what fails inside in one process fail in all of them at the end, so that none waits for what never comes:
    with the error itself in that one, as a UserError or RunError in the others. Inside, a process waits for others only
    where all of them do."""
    try:
        yield
    finally:
        own = sys.exception()
        if own is None or isinstance(own, Exception):  # what is more, Ctrl-C say, ends this process at once
            problems = all_gather([] if own is None else [_for_others(own)])
            if own is None and problems:
                raise problems[0]


def _for_others(error: Exception) -> UserError | RunError:
    """Return an error as the other processes raise it."""
    if isinstance(error, UserError):
        return UserError(reason_of(error))
    rank = current_rank()
    return RunError(f"process {rank.number} of {rank.of}: {reason_of(error)}")


def from_main(call: Callable[[], Value]) -> Value:
    """Return in every process what the call returns in the main one, which alone calls it. Raise as `all_or_none`."""
    found: list[Value] = []
    with all_or_none():
        if is_main_process():
            found.append(call())
    return all_gather(found)[0]


def assign(items: Sequence[Item]) -> list[tuple[Item, Sequence[Item]]]:
    """Return the items of this process, each with all that the processes do in that round. Every process has equally
    many: one that the last round leaves short repeats another's. Engines that shard a model wait for every process in
    every layer."""
    own = current_rank()
    rounds = [items[first : first + own.of] for first in range(0, len(items), own.of)]
    return [(one[min(own.number, len(one) - 1)], one) for one in rounds]
