"""What the packs of a mixture hold, counted source by source: tokens, samples, images, errors of the shares.

Letters of arrays: P packs, S sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sft.batches.pack_stream import by_source, weigh_images
from sft.batches.source_stream import Counters, SourceSizes, Unit
from sft.core.sample import Pack
from sft.data.orders import Ints
from sft.data.prepared_source import PreparedSource

Floats = NDArray[np.float64]


class DistinctNumbers:
    """Counts distinct numbers, in a few bytes for each."""

    def __init__(self) -> None:
        self._seen = np.empty(0, np.int64)
        self._new: list[Ints] = []
        self._num_new = 0

    def add(self, numbers: Ints) -> None:
        self._new.append(numbers)
        self._num_new += len(numbers)
        if self._num_new > max(len(self._seen), 2**16):
            self._merge()

    def __len__(self) -> int:
        self._merge()
        return len(self._seen)

    def _merge(self) -> None:
        self._seen = np.unique(np.concatenate([self._seen, *self._new]))
        self._new, self._num_new = [], 0


@dataclass(kw_only=True)
class SourceCounts(Counters):
    """What a source has given in packs."""

    images: int = 0
    """Shown: one that two samples show counts twice."""
    distinct_images: DistinctNumbers = field(default_factory=DistinctNumbers)
    ended_at_step: int | None = None
    """When it came to the end of `max_epochs`."""


class ShareErrors:
    """How far sources are from their shares, in the mixture's unit: after each pack, and at the ends of windows.

    A share is what the planner steers by, so it is that of the sources that are left. In the window in which a source
    comes to its end the others take its place at once; errors are counted anew from there.
    """

    def __init__(self, num_sources: int) -> None:
        self.off = np.zeros(num_sources)
        """Where each source stands, above its share or below."""
        self.inside = np.zeros(num_sources)
        """The largest so far, after any pack."""
        self.at_ends = np.zeros(num_sources)
        self.of_windows: list[float] = []
        """The largest of all sources in each window, …"""
        self.of_ends: list[float] = []
        """… and at its end."""

    def add(self, given_PS: Floats, shares_S: Floats, *, is_whole: bool) -> None:
        """Count a window, or a part of one at the end of a run."""
        off_PS = self.off + np.cumsum(given_PS - given_PS.sum(axis=1, keepdims=True) * shares_S, axis=0)
        self.off = off_PS[-1]
        errors_PS = np.abs(off_PS)
        self.inside = np.maximum(self.inside, errors_PS.max(axis=0))
        self.of_windows.append(float(errors_PS.max()))
        if is_whole:
            self.at_ends = np.maximum(self.at_ends, errors_PS[-1])
            self.of_ends.append(float(errors_PS[-1].max()))


class MixtureCounts:
    """What was counted over all windows."""

    def __init__(self, num_sources: int, sequence_length: int) -> None:
        self.of_source = [SourceCounts() for _ in range(num_sources)]
        self.errors = ShareErrors(num_sources)
        self.packs = 0
        sizes = {"tokens": sequence_length + 1, "images": 1, "weight": 1}
        self.packs_with = {name: np.zeros(size, np.int64) for name, size in sizes.items()}
        """Packs by the number of their tokens, and by the number and the weight of their distinct images."""

    def sum(self, name: str) -> int:
        """Return a count summed over all sources."""
        return sum(getattr(tally, name) for tally in self.of_source)

    @property
    def distinct_images(self) -> int:
        """In each pack, summed over packs: what is encoded."""
        return int(self.packs_with["images"] @ np.arange(len(self.packs_with["images"])))


def count_packs(totals: MixtureCounts, packs: Sequence[Pack], sources: Sequence[SourceSizes], unit: Unit) -> Floats:
    """Count some packs; return what each has of each source in the unit of the shares, (P, S)."""
    given_PS = np.zeros((len(packs), len(sources)))
    tokens_P = np.zeros(len(packs))
    shown = []  # of each image its pack, key and weight
    for index, rows, numbers in by_source(packs):
        source, tally = sources[index], totals.of_source[index]
        images, weights, num_images = source.images(rows)
        found = {
            "tokens": source.num_tokens(rows),
            "trained_tokens": source.num_trained(rows),
            "samples": np.ones_like(rows),
            "images": source.num_shown(rows) if isinstance(source, PreparedSource) else num_images,
        }
        for name, numbers_of in found.items():
            setattr(tally, name, getattr(tally, name) + int(numbers_of.sum()))
        tally.distinct_images.add(images)
        tokens_P += np.bincount(numbers, found["tokens"], len(packs))
        given_PS[:, index] = np.bincount(numbers, found[unit], len(packs))
        shown.append(np.stack([np.repeat(numbers, num_images), images, weights]))
    images_P, weights_P = weigh_images(shown, len(packs))
    totals.packs += len(packs)
    for name, sizes_P in {"tokens": tokens_P.astype(np.int64), "images": images_P, "weight": weights_P}.items():
        counts = totals.packs_with[name]
        totals.packs_with[name] = np.bincount(sizes_P, minlength=len(counts))
        totals.packs_with[name][: len(counts)] += counts
    return given_PS
