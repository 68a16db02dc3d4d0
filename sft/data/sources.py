"""The prepared sources of a mixture: what the planner asks of them, and what collating reads.

Nothing is held in memory but a number per sample where some are held out or share images; everything else is read from
the memory-mapped arrays of the stores when it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, compress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from sft.core.errors import UserError
from sft.core.files import read_ahead
from sft.core.images import size_of
from sft.core.sample import PackItem, PlacedSample
from sft.data.encoded_arrays import EncodedSamples
from sft.data.orders import ImageGroups, Ints, mix64
from sft.data.store import Store
from sft.data.validation_split import HoldOut, SampleKeys, Side, Sides, hold_out_share, sample_keys, texts_of
from sft.models.image_transform import load_pixels, training_crop
from sft.recipe import DataConfig, SourceConfig


@dataclass(frozen=True)
class Part:
    """One prepared dataset of a source."""

    store: Store
    encoded: EncodedSamples

    def image_keys(self, rows: Ints) -> tuple[Ints, Ints]:
        """Keys of the images of some samples, one sample after another, and how many each has."""
        image_rows, numbers = self.encoded.images(rows)
        return np.asarray(self.store.image_keys[image_rows]), numbers


class PreparedSource:
    """One source: its datasets end to end, the samples of one side of them. What `sft.batches.mixture` asks of a
    source."""

    def __init__(
        self,
        config: SourceConfig,
        share: float,
        parts: Sequence[Part],
        data: DataConfig,
        sides: Sides | None,
        side: Side,
    ) -> None:
        """`sides` are those of all rows, where some are held out.

        Raises:
            UserError: no sample fits a pack, or is on this side.
        """
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
            raise UserError(
                f"source {self.name!r}: none of {samples} fits into data.sequence_length, into the positions of the "
                "model and into data.max_images_per_pack"
            )

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._kept is None else len(self._kept)

    def num_tokens(self, rows: Ints) -> Ints:
        """Tokens of each of some samples."""
        return self._gather(rows, lambda part, own: part.encoded.num_tokens(own))

    def num_trained(self, rows: Ints) -> Ints:
        """Trained tokens of each."""
        return self._gather(rows, lambda part, own: part.encoded.num_trained(own, self.data.train_on))

    def images(self, rows: Ints) -> tuple[Ints, Ints]:
        """Keys of the distinct images of each, one sample after another, and how many each has."""
        keys, of = self._shown(rows)
        if len(of) == 0:
            return keys, np.zeros(len(rows), np.int64)
        order = np.lexsort((keys, of))
        keys, of = keys[order], of[order]
        is_first = np.ones(len(keys), bool)
        is_first[1:] = (keys[1:] != keys[:-1]) | (of[1:] != of[:-1])
        return keys[is_first], np.bincount(of[is_first], minlength=len(rows))

    def num_shown(self, rows: Ints) -> Ints:
        """How many images each shows, one that stands there twice counted twice."""
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
        keys, numbers = self.images(rows)
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
        """Samples that validate, and samples that are used for neither, a long one that stands in several parts counted
        once; empty where nothing is held out."""
        if self.sides is None:
            return {}
        sides = np.split(self.sides, self._starts[1:-1])
        return {
            name: sum(
                len(np.unique(part.encoded.samples[own == side])) for part, own in zip(self.parts, sides, strict=True)
            )
            for name, side in (("validation", Side.VALIDATION), ("neither", Side.NEITHER))
        }

    def place(self, row: int) -> tuple[int, int]:
        """The number of the dataset that holds a sample, and its row there."""
        sample = row if self._kept is None else int(self._kept[row])
        number = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return number, sample - int(self._starts[number])

    def _shows_each_image_once(self) -> bool:
        """Told without looking at samples; false where several datasets, or parts of a sample, could share some."""
        first = self.parts[0]
        return len(self.parts) == 1 and not first.encoded.changes and first.encoded.num_images == first.store.num_images

    def _shown(self, rows: Ints) -> tuple[Ints, Ints]:
        """Keys of all images shown, and the place in `rows` of the sample that shows each."""
        keys, of = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for part, places, own in self._by_part(rows):
            found, numbers = part.image_keys(own)
            keys.append(found)
            of.append(np.repeat(places, numbers))
        return np.concatenate(keys), np.concatenate(of)

    def _gather(self, rows: Ints, ask: Callable[[Part, Ints], Ints]) -> Ints:
        """One number for each sample, asked of the dataset that holds it."""
        result = np.empty(len(rows), np.int64)
        for part, places, own in self._by_part(rows):
            result[places] = ask(part, own)
        return result

    def _by_part(self, rows: Ints) -> Iterator[tuple[Part, Ints, Ints]]:
        """The datasets that hold some samples: each with the places of its samples in `rows`, and their rows there."""
        samples = rows if self._kept is None else self._kept[rows]
        if len(self.parts) == 1:
            yield self.parts[0], np.arange(len(rows)), samples
            return
        numbers = np.searchsorted(self._starts, samples, side="right") - 1
        for number in np.unique(numbers):
            places = np.flatnonzero(numbers == number)
            yield self.parts[number], places, samples[places] - self._starts[number]


def _sample_keys(parts: Sequence[Part], *, texts: bool) -> SampleKeys:
    """By what the samples of a source are held out that have rows: whole samples, though some stand in several rows."""
    each = []
    for part in parts:
        read_ahead(part.store.image_keys)
        samples, rows = np.unique(part.encoded.samples, return_inverse=True)
        image_keys, numbers = part.image_keys(part.encoded.all_rows)
        num_images = np.bincount(rows, weights=numbers, minlength=len(samples)).astype(np.int64)
        has_rows = np.zeros(len(part.store), np.bool_)
        has_rows[samples] = True
        own_texts = compress(texts_of(part.store.sample_batches()), has_rows) if texts else None
        each.append(sample_keys(own_texts, image_keys, num_images))
    return SampleKeys(*map(np.concatenate, zip(*each, strict=True)))


def _by_row(sides: Sides, parts: Sequence[Part]) -> Sides:
    """The side of each row: that of the whole sample it comes from."""
    of_sample = [np.unique(part.encoded.samples, return_inverse=True) for part in parts]
    starts = accumulate((len(samples) for samples, _ in of_sample), initial=0)
    rows: Ints = np.concatenate([own + start for start, (_, own) in zip(starts, of_sample, strict=False)])
    return np.take(sides, rows)


class Place(NamedTuple):
    """Where a sample of a pack is read: which source, which of its datasets, which row there."""

    source: int
    part: int
    row: int


class Reader:
    """Reads samples and images. To another process it goes as the paths of the stores, which are opened anew there."""

    def __init__(self, parts: Sequence[Sequence[Part]], data: DataConfig) -> None:
        self.parts = parts
        self.data = data
        self._stores = list(dict.fromkeys(part.store for own in parts for part in own))

    def __reduce__(self) -> tuple[object, ...]:
        return _open_reader, ([[(part.store.path, part.encoded.path) for part in own] for own in self.parts], self.data)

    def sample(self, place: Place) -> PlacedSample:
        """The encoded sample at a place, with the keys of its images."""
        part = self.parts[place.source][place.part]
        keys = part.store.image_keys
        images = tuple(int(keys[image_row]) for image_row in part.encoded.image_rows(place.row))
        return PlacedSample(part.encoded[place.row], images, place.source)

    def image_bytes(self, key: int) -> bytes:
        """The encoded bytes of an image, from whichever store has it.

        Raises:
            SkipSample: the file it was left in cannot be read any more.
        """
        for store in self._stores:
            if (row := store.find_image(key)) is not None:
                return store.image_bytes(row)
        raise KeyError(key)

    def pixels(self, image: int, size: int) -> NDArray[np.uint8]:
        """The pixels of an image, (C, H, W), as evaluation sees it: whole.

        Raises:
            SkipSample: it cannot be read any more, or does not decode.
        """
        return load_pixels(self.image_bytes(image), size)

    def training_pixels(self, image: int, size: int, *, seed: int, step: int) -> NDArray[np.uint8]:
        """The pixels of an image as an optimizer step sees it, the first of which is 1: cropped if `data.augment` says
        so.

        Raises:
            SkipSample: as `pixels`.
        """
        content = self.image_bytes(image)
        if self.data.augment == "none":
            return load_pixels(content, size)
        width, height = size_of(content)
        return load_pixels(content, size, training_crop(width, height, seed=seed, step=step, image_key=image))


def _open_reader(paths: Sequence[Sequence[tuple[Path, Path]]], data: DataConfig) -> Reader:
    return Reader([[Part(Store(store), EncodedSamples(encoded)) for store, encoded in own] for own in paths], data)


class Sources:
    """The sources of a mixture, on one side of what is held out (`data.validation`)."""

    def __init__(
        self,
        parts: Sequence[Sequence[Part]],
        data: DataConfig,
        *,
        validation: Part | None = None,
        held_out: Sequence[Sides] | None = None,
    ) -> None:
        """`validation` is the dataset of `data.validation.path`. With `held_out`, the sides of the rows of each source,
        these are the sources of what is held out.

        Raises:
            UserError: nothing of a source is left to train on.
        """
        self.parts = parts
        self.data = data
        self.validation = validation
        self._hold_out: HoldOut | None = None
        sides: Sequence[Sides | None] = held_out or self._sides()
        side = Side.VALIDATION if held_out else Side.TRAIN
        self.sources = [
            PreparedSource(config, share, own, data, own_sides, side)
            for config, share, own, own_sides in zip(data.mixture, data.shares, parts, sides, strict=True)
        ]
        self.reader = Reader(parts, data)

    def held_out(self) -> Sources | None:
        """The other side: what is held out of training, or the dataset of `data.validation.path` as one source.

        A source of which nothing can be held out is not among them.

        Raises:
            UserError: nothing is held out of any.
        """
        if self.data.validation is None:
            return None
        if self.validation is None:
            held = [number for number, source in enumerate(self.sources) if source.num_held_out["validation"]]
            if not held:
                samples = sum(len(part.store) for own in self.parts for part in own)
                raise UserError(
                    f"data.validation: holds out none of {samples:,} samples, for nothing would be left to train on; "
                    "add samples with other images, or choose by a benchmark"
                )
            mixture = tuple(self.data.mixture[number] for number in held)
            data = self.data.model_copy(update={"mixture": mixture})
            sides = [own for number in held if (own := self.sources[number].sides) is not None]
            return Sources([self.parts[number] for number in held], data, held_out=sides)
        only = self.data.mixture[0].model_copy(update={"name": "validation", "share": 1.0})
        data = self.data.model_copy(update={"validation": None, "mixture": (only,)})
        return Sources([[self.validation]], data)

    @property
    def not_held_out(self) -> list[str]:
        """Sources of which `data.validation.share` can hold out no sample."""
        if self.validation is not None or self.data.validation is None:
            return []
        return [source.name for source in self.sources if not source.num_held_out["validation"]]

    def longest(self) -> int:
        """Tokens of the longest sample."""
        lengths = (part.encoded.num_tokens(part.encoded.all_rows) for own in self.parts for part in own)
        return max(int(own.max(initial=0)) for own in lengths)

    def fingerprint(self) -> str:
        """Changes when what is prepared does, and with it the order of the data."""
        of_parts = [
            [part.encoded.path.name, len(part.encoded), part.encoded.total_tokens]
            + [file["xxh3"] for file in part.store.manifest["files"]]
            for own in [*self.parts, [self.validation] if self.validation else []]
            for part in own
        ]
        if self.validation is None and self._hold_out and len(self._hold_out.keys):
            of_parts.append(sorted(self._hold_out.keys.tolist()))  # chosen beside the share, by all sources together
        return xxhash.xxh3_64_hexdigest(json.dumps(of_parts).encode())

    def _sides(self) -> Sequence[Sides | None]:
        """The sides of the rows of each source."""
        validation = self.data.validation
        if validation is None:
            return [None] * len(self.parts)
        if self.validation is not None:
            self._hold_out = HoldOut(keys=self.validation.store.image_keys)
            sides = [self._hold_out.sides(_sample_keys(own, texts=False)) for own in self.parts]
        else:
            read = [partial(_sample_keys, own, texts=True) for own in self.parts]
            self._hold_out, sides = hold_out_share(validation.share or 0.0, read)
        return [_by_row(own, parts) for own, parts in zip(sides, self.parts, strict=True)]

    def locate(self, item: PackItem) -> Place:
        """Where a sample is read."""
        return Place(item.source, *self.sources[item.source].place(item.sample))

    def place(self, item: PackItem) -> PlacedSample:
        """The encoded sample at a place, with the keys of its images."""
        return self.reader.sample(self.locate(item))
