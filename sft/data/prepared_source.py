"""A prepared source of a mixture: what the planner asks of it.

Nothing is held in memory but a number per sample where some are held out or share images; everything else is read from
the memory-mapped arrays of the stores when it is asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from sft.core.errors import UserError
from sft.core.files import read_ahead
from sft.data.encoded_arrays import EncodedSamples
from sft.data.orders import ImageGroups, Ints, ShownImages, mix64
from sft.data.store import Store
from sft.data.validation_split import Side, Sides
from sft.recipe import DataConfig, SourceConfig


@dataclass(frozen=True)
class PreparedDataset:
    """One prepared dataset of a source."""

    store: Store
    encoded: EncodedSamples

    def images(self, rows: Ints) -> ShownImages:
        """Return the images of some samples, one that a sample shows twice twice."""
        image_rows, numbers = self.encoded.images(rows)
        return ShownImages(np.asarray(self.store.image_keys[image_rows]), self.encoded.image_weights(rows), numbers)


class PreparedSource:
    """A source for `sft.batches.mixture`: its datasets end to end, the samples of one side of them."""

    def __init__(
        self,
        config: SourceConfig,
        share: float,
        parts: Sequence[PreparedDataset],
        data: DataConfig,
        sides: Sides | None,
        side: Side,
    ) -> None:
        """`sides` are of all rows, if some are held out. Raise UserError where no sample of this side fits a pack."""
        self.name, self.share = config.name, share
        self.max_epochs, self.when_exhausted = config.max_epochs, config.when_exhausted
        self.parts = parts
        self.data = data
        self._starts = np.array([0, *accumulate(len(part.encoded) for part in parts)])
        self.sides = sides
        self._kept = None if sides is None else np.flatnonzero(sides == side)
        if not len(self):
            samples = f"{sum(len(part.store) for part in parts):,} samples"
            if self._starts[-1]:
                raise UserError(f"source {self.name!r}: data.validation leaves none of {samples} to train on")
            bounds = "data.sequence_length, into the positions of the model and into data.max_images_per_pack"
            raise UserError(f"source {self.name!r}: none of {samples} fits into {bounds}")

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._kept is None else len(self._kept)

    def num_tokens(self, rows: Ints) -> Ints:
        """Return the tokens of each of some samples."""
        return self._gather(rows, lambda part, own: part.encoded.num_tokens(own))

    def num_trained(self, rows: Ints) -> Ints:
        """Return the trained tokens of each of some samples."""
        return self._gather(rows, lambda part, own: part.encoded.num_trained(own, self.data.train_on))

    def images(self, rows: Ints) -> ShownImages:
        """Return the distinct images of each of some samples."""
        found = [(np.empty(0, np.int64),) * 3]
        for part, places, own in self._by_part(rows):
            shown = part.images(own)
            found.append((shown.keys, shown.weights, np.repeat(places, shown.numbers)))
        keys, weights, of = map(np.concatenate, zip(*found, strict=True))
        order = np.lexsort((keys, of))
        keys, weights, of = keys[order], weights[order], of[order]
        is_first = np.ones(len(keys), bool)
        is_first[1:] = (keys[1:] != keys[:-1]) | (of[1:] != of[:-1])
        return ShownImages(keys[is_first], weights[is_first], np.bincount(of[is_first], minlength=len(rows)))

    def num_shown(self, rows: Ints) -> Ints:
        """Return how many images each of some samples shows, one that stands there twice counted twice."""
        return self._gather(rows, lambda part, own: part.encoded.images(own)[1])

    @cached_property
    def groups(self) -> ImageGroups | None:
        """Samples about the same images; None where none share any, or where they are not to share a pack."""
        if self.data.max_samples_per_image_per_pack == 1 or self._shows_each_image_once():
            return None
        rows = np.arange(len(self))
        for part in self.parts:
            part.encoded.read_ahead()
            read_ahead(part.store.image_keys)
        keys, _, numbers = self.images(rows)
        # Equal for equal sets of images; samples without any have a group each.
        of = np.repeat(rows, numbers)
        names = np.zeros(len(rows), np.uint64)
        np.add.at(names, of, mix64(keys, 1))
        names[numbers == 0] = mix64(rows[numbers == 0], 2)
        members = np.argsort(names, kind="stable")
        in_order = names[members]
        starts = np.flatnonzero(np.concatenate(([True], in_order[1:] != in_order[:-1], [True])))
        return ImageGroups(members, starts)

    @property
    def num_held_out(self) -> dict[str, int]:
        """Samples that validate, and for neither, one in several parts counted once; empty where none is held out."""
        if self.sides is None:
            return {}
        parts = [*zip(self.parts, np.split(self.sides, self._starts[1:-1]), strict=True)]
        return {
            side.name.lower(): sum(len(np.unique(part.encoded.samples[own == side])) for part, own in parts)
            for side in (Side.VALIDATION, Side.NEITHER)
        }

    def locate(self, row: int) -> tuple[int, int]:
        """Return the number of the dataset that holds a sample, and its row there."""
        sample = row if self._kept is None else int(self._kept[row])
        number = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return number, sample - int(self._starts[number])

    def _shows_each_image_once(self) -> bool:
        """Return whether no two samples share an image, as far as that is known without looking at them; false where
        several datasets, or parts of a sample, could share some."""
        first = self.parts[0]
        return len(self.parts) == 1 and not first.encoded.changes and first.encoded.num_images == first.store.num_images

    def _gather(self, rows: Ints, ask: Callable[[PreparedDataset, Ints], Ints]) -> Ints:
        """Return one number for each sample, asked of the dataset that holds it."""
        result = np.empty(len(rows), np.int64)
        for part, places, own in self._by_part(rows):
            result[places] = ask(part, own)
        return result

    def _by_part(self, rows: Ints) -> Iterator[tuple[PreparedDataset, Ints, Ints]]:
        """Yield each dataset that holds some of the samples, with their places in `rows` and their rows there."""
        samples = rows if self._kept is None else self._kept[rows]
        if len(self.parts) == 1:
            yield self.parts[0], np.arange(len(rows)), samples
            return
        numbers = np.searchsorted(self._starts, samples, side="right") - 1
        for number in np.unique(numbers):
            places = np.flatnonzero(numbers == number)
            yield self.parts[number], places, samples[places] - self._starts[number]
