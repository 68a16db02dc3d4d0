"""From the plan to micro-batches: the packs of a step, collated one micro-batch after another.

    prepared sources ─> Planner: windows of packs ─> Plans: Plan after Plan ─> BatchMaker: Batch after Batch

Plans are made in the training process and are the same whatever makes batches of them: that process, or any number of
workers, whose batches come in the order of their plans.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import starmap
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from sft.batches.collate import collate
from sft.batches.feature_cache import FeatureCache
from sft.batches.image_source import StoredImages
from sft.batches.steps import Plan, Plans
from sft.core.errors import RunError
from sft.core.sample import Batch, PlacedSample
from sft.data.reader import Location, Reader
from sft.models.family import Images

NUM_NAMED = 5
"""Samples that an error names."""


class BatchMaker(Dataset[Batch]):
    """Makes batches of plans, here or in a worker: `maker[plan]`."""

    def __init__(
        self,
        reader: Reader,
        images: Images,
        *,
        seed: int,
        always_whole: bool = False,
        features: FeatureCache | None = None,
        notes: Path | None = None,
    ) -> None:
        """With `always_whole` every batch has an image and a label (`sft.batches.collate`). Of images that have
        `features` none are decoded. In the folder `notes` each worker keeps a file that says which samples it is
        working on."""
        self.reader = reader
        self.images = images
        self.seed = seed
        self.always_whole = always_whole
        self.features = features
        self.notes = notes

    def __getitem__(self, plan: Plan) -> Batch:
        packs = [[self._sample(place) for place in places] for places in plan.packs]
        shown_by = _shown_by(packs)
        crop = (self.seed, plan.step) if self.reader.data.augment == "crop" else None
        batch = collate(
            packs,
            StoredImages(self.reader, self.images, crop, on_load=lambda image: self._note(shown_by[image])),
            train_on=self.reader.data.train_on,
            pack_isolation=self.reader.data.pack_isolation,
            num_trained_tokens=plan.num_trained_tokens,
            forgive_images=True,
            always_whole=self.always_whole,
            features=self.features,
        )
        self._note(())
        return batch

    def _sample(self, place: Location) -> PlacedSample:
        self._note([self.reader.parts[place.source][place.part].encoded.key(place.row)])
        return self.reader.sample(place)

    def _note(self, samples: Sequence[str]) -> None:
        worker = get_worker_info()
        if self.notes is not None and worker is not None:
            (self.notes / str(worker.id)).write_text(_named(samples))


class MicroBatches(IterableDataset[dict[str, Batch]]):
    """The micro-batches of a rank, as `{"batch": Batch}`, as long as there are plans.

    `data.num_workers` processes make them.
    """

    def __init__(self, plans: Plans, images: Images, *, features: FeatureCache | None = None) -> None:
        self.plans = plans
        self.images = images
        self.features = features
        self.sources = plans.sources
        self.dirty: dict[str, str] = {}
        """Samples with an image that failed so far, and why."""

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        """
        Raises:
            RunError: more images than `data.max_dirty_samples` allows fail, or a worker hangs or dies.
        """
        for batch in self._batches():
            self._count_dirty(batch)
            yield {"batch": batch}

    def state(self, step: int) -> dict[str, Any]:
        """Return what has to be known after a step to go on with the next, as JSON."""
        return {"plans": self.plans.state(step), "dirty": dict(self.dirty)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.plans.restore(state["plans"])
        self.dirty = dict(state["dirty"])

    def _batches(self) -> Iterator[Batch]:
        if self.sources.data.num_workers:
            yield from self._batches_of_workers()
        else:
            yield from map(self._maker().__getitem__, self.plans)

    def _maker(self, notes: Path | None = None) -> BatchMaker:
        return BatchMaker(
            self.sources.reader,
            self.images,
            seed=self.plans.planner.seed,
            always_whole=self.plans.rank.of > 1,
            features=self.features,
            notes=notes,
        )

    def _batches_of_workers(self) -> Iterator[Batch]:
        try:
            yield from self._worked()
        except RuntimeError as error:  # torch's handler of dead workers raises anywhere, even while this is cleaned up
            if isinstance(error.__context__, RunError) and str(error).startswith(_OF_WORKERS):
                raise error.__context__ from None
            raise

    def _worked(self) -> Iterator[Batch]:
        data = self.sources.data
        with TemporaryDirectory(prefix="idefics-sft-") as folder:
            batches: DataLoader[Any] = DataLoader(
                self._maker(Path(folder)),
                sampler=self.plans,
                batch_size=None,
                collate_fn=_packed_up,
                num_workers=data.num_workers,
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

    def _count_dirty(self, batch: Batch) -> None:
        self.dirty |= batch.dirty
        allowed = self.sources.data.max_dirty_samples
        if len(self.dirty) > allowed:
            last = [f"{key} ({reason})" for key, reason in self.dirty.items()][-NUM_NAMED:]
            raise RunError(
                f"more than {allowed:,} samples (data.max_dirty_samples) have images that were sound when they were "
                f"prepared and are not any more; the last: {_named(last)}"
            )


def _shown_by(packs: Sequence[Sequence[PlacedSample]]) -> dict[int, list[str]]:
    """Keys of the samples that show each image."""
    shown_by: dict[int, list[str]] = {}
    for pack in packs:
        for sample in pack:
            for image in dict.fromkeys(sample.images):
                shown_by.setdefault(image, []).append(sample.encoded.key)
    return shown_by


_OF_WORKERS = ("DataLoader timed out", "DataLoader worker")
"""How torch's own errors about workers begin."""


def _what_happened(error: Exception, notes: Path, timeout: int) -> str:
    """`notes` says what each worker was working on when it hung or died."""
    busy = ", ".join(note for file in sorted(notes.iterdir()) if (note := file.read_text())) or "no sample"
    if str(error).startswith("DataLoader timed out"):
        return f"no worker made a batch in {timeout} seconds (data.worker_timeout); they were busy with {busy}"
    return f"a worker died, perhaps for want of memory; workers were busy with {busy} ({error})"


def _named(samples: Sequence[str]) -> str:
    return ", ".join([*dict.fromkeys(samples)][:NUM_NAMED])


def _end_plainly(worker: int) -> None:
    """Let a worker end when Python's queues are closed. What C++ libraries would clean up then aborts it now
    and then ("terminate called without an active exception"), and torch takes that for a worker that died."""
    atexit.register(os._exit, 0)


_NUMBERS = (
    *("input_ids_T", "labels_T", "position_ids_T", "segment_ids_T"),
    *("image_ids_T", "source_ids_T", "state_ids_T"),
)


def _packed_up(batch: Any) -> tuple[Tensor, Batch]:
    """Put the numbers of a batch into one tensor for its way to another process: each tensor takes a connection of its
    own to be fetched, a third of a millisecond of the training process."""
    nothing: dict[str, Any] = dict.fromkeys(_NUMBERS, torch.empty(0, dtype=torch.int64))
    return torch.stack([getattr(batch, name) for name in _NUMBERS]), replace(batch, **nothing)


def _unpacked(numbers: Tensor, batch: Batch) -> Batch:
    rows: dict[str, Any] = dict(zip(_NUMBERS, numbers, strict=True))
    return replace(batch, **rows)
