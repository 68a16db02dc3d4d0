"""Micro-batches made by worker processes of torch's data loader, and what is said when one of them hangs or dies."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import starmap
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sft.batches.steps import Plans
from sft.core.errors import RunError
from sft.core.sample import Batch
from sft.recipe import DataConfig

MOST_WORKERS = 4


def num_workers(data: DataConfig) -> int:
    """Return how many processes make batches for this one (`data.num_workers`)."""
    if data.num_workers is not None:
        return data.num_workers
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(cores - 1, 0), MOST_WORKERS) if torch.cuda.is_available() else 0


def batches_of_workers(make: Callable[[Path], Dataset[Batch]], plans: Plans, data: DataConfig) -> Iterator[Batch]:
    """Yield the batches of plans, in their order, made by `num_workers` processes.

    `make` returns the maker of batches that each worker gets; in the folder it is given, a worker notes the samples it
    is working on.

    Raises:
        RunError: a worker hangs or dies.
    """
    try:
        yield from _worked(make, plans, data)
    except RuntimeError as error:  # torch's handler of dead workers raises anywhere, even while this is cleaned up
        if isinstance(error.__context__, RunError) and str(error).startswith(_OF_WORKERS):
            raise error.__context__ from None
        raise


def _worked(make: Callable[[Path], Dataset[Batch]], plans: Plans, data: DataConfig) -> Iterator[Batch]:
    with TemporaryDirectory(prefix="idefics-sft-") as folder:
        batches: DataLoader[Any] = DataLoader(
            make(Path(folder)),
            sampler=plans,
            batch_size=None,
            collate_fn=_packed_up,
            num_workers=num_workers(data),
            timeout=data.worker_timeout,
            multiprocessing_context="spawn",  # forking a process that has threads can hang
            worker_init_fn=_end_plainly,
            generator=torch.Generator(),  # its own: a worker more or less changes no random number of training
        )
        try:
            yield from starmap(_unpacked, batches)
        except (RuntimeError, OSError, EOFError) as error:  # a worker may die in the middle of handing over a batch
            is_of_code = isinstance(error, RuntimeError) and not str(error).startswith(_OF_WORKERS)
            if is_of_code or "Caught " in str(error):
                raise  # with its traceback
            raise RunError(_what_happened(error, Path(folder), data.worker_timeout)) from error


_OF_WORKERS = ("DataLoader timed out", "DataLoader worker")
"""How torch's own errors about workers begin."""


def _what_happened(error: Exception, notes: Path, timeout: int) -> str:
    """`notes` says what each worker was working on when it hung or died."""
    busy = ", ".join(note for file in sorted(notes.iterdir()) if (note := file.read_text())) or "no sample"
    if str(error).startswith("DataLoader timed out"):
        return f"no worker made a batch in {timeout} seconds (data.worker_timeout); they were busy with {busy}"
    return f"a worker died, perhaps for want of memory; workers were busy with {busy} ({error})"


def _end_plainly(worker: int) -> None:
    """Let a worker end when Python's queues are closed. What C++ libraries would clean up then aborts it now
    and then ("terminate called without an active exception"), and torch takes that for a worker that died."""
    atexit.register(os._exit, 0)


_NUMBERS = tuple(column.name for column in fields(Batch) if column.name.endswith("_T"))


def _packed_up(batch: Any) -> tuple[Tensor, Batch]:
    """Put the numbers of a batch into one tensor for its way to another process: each tensor takes a connection of its
    own to be fetched, a third of a millisecond of the training process."""
    nothing: dict[str, Any] = dict.fromkeys(_NUMBERS, torch.empty(0, dtype=torch.int64))
    return torch.stack([getattr(batch, name) for name in _NUMBERS]), replace(batch, **nothing)


def _unpacked(numbers: Tensor, batch: Batch) -> Batch:
    rows: dict[str, Any] = dict(zip(_NUMBERS, numbers, strict=True))
    return replace(batch, **rows)
