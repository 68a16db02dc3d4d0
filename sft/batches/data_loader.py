"""From the plan to micro-batches: the packs of a step, collated one micro-batch after another.

    prepared sources ─> Planner: windows of packs ─> Plans: Plan after Plan ─> BatchMaker: Batch after Batch

Plans are made in the training process and are the same whatever makes batches of them: that process, or any number of
workers (`sft.batches.workers`), whose batches come in the order of their plans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from sft.batches.collate import collate
from sft.batches.feature_cache import FeatureCache
from sft.batches.image_source import StoredImages
from sft.batches.steps import Plan, Plans
from sft.batches.workers import batches_of_workers, num_workers
from sft.core.errors import RunError
from sft.core.sample import Batch, PlacedSample
from sft.data.reader import Location, Reader
from sft.models.family import Images

NUM_NAMED = 5
"""Samples that an error names."""


@dataclass(eq=False)
class BatchMaker(Dataset[Batch]):
    """Makes batches of plans, here or in a worker: `maker[plan]`."""

    reader: Reader
    images: Images
    seed: int
    always_whole: bool = False
    """Whether every batch has an image and a label (`sft.batches.collate`)."""
    features: FeatureCache | None = None
    """Of images that it has none are decoded."""
    notes: Path | None = None
    """A folder in which each worker keeps a file that says which samples it is working on."""

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


@dataclass(eq=False)
class MicroBatches(IterableDataset[dict[str, Batch]]):
    """The micro-batches of a rank, as `{"batch": Batch}`, as long as there are plans.

    Worker processes make them (`data.num_workers`).
    """

    plans: Plans
    images: Images
    features: FeatureCache | None = None
    dirty: dict[str, str] = field(default_factory=dict, init=False)
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
        return {"plans": self.plans.state(step), "dirty": dict(self.dirty), "image_cost": self.plans.image_cost}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.plans.restore(state["plans"])
        self.plans.image_cost = state.get(
            "image_cost", self.images.cost_in_tokens
        )  # of an earlier version: always that
        self.dirty = dict(state["dirty"])

    def _batches(self) -> Iterator[Batch]:
        if num_workers(self.plans.sources.data):
            yield from batches_of_workers(self._maker, self.plans, self.plans.sources.data)
        else:
            yield from map(self._maker().__getitem__, self.plans)

    def _maker(self, notes: Path | None = None) -> BatchMaker:
        return BatchMaker(
            self.plans.sources.reader,
            self.images,
            seed=self.plans.planner.seed,
            always_whole=self.plans.rank.of > 1,
            features=self.features,
            notes=notes,
        )

    def _count_dirty(self, batch: Batch) -> None:
        self.dirty |= batch.dirty
        allowed = self.plans.sources.data.max_dirty_samples
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


def _named(samples: Sequence[str]) -> str:
    return ", ".join([*dict.fromkeys(samples)][:NUM_NAMED])
