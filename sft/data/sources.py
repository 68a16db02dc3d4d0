"""The prepared sources of a mixture, on one side of what is held out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, compress

import numpy as np
import xxhash

from sft.core.errors import UserError
from sft.core.files import read_ahead
from sft.core.sample import PackItem, PlacedSample
from sft.data.orders import Ints
from sft.data.prepared_source import PreparedDataset, PreparedSource
from sft.data.reader import Location, Reader
from sft.data.validation_split import HoldOut, SampleKeys, Side, Sides, hold_out_share, sample_keys, texts_of
from sft.recipe import DataConfig


class Sources:
    """The sources of a mixture, on one side of what is held out (`data.validation`)."""

    def __init__(
        self,
        parts: Sequence[Sequence[PreparedDataset]],
        data: DataConfig,
        *,
        validation: PreparedDataset | None = None,
        held_out: Sequence[Sides] | None = None,
    ) -> None:
        """`validation` is the dataset of `data.validation.path`. With `held_out`, the sides of the rows of each source,
        these are the sources of what is held out. Raise UserError where nothing of a source is left to train on."""
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
        """Return the other side: what is held out of training, or the dataset of `data.validation.path` as one source.
        A source of which nothing can be held out is not among them; where none is, raise UserError. `max_epochs` is not
        for these: it limits training."""
        if self.data.validation is None:
            return None
        if self.validation is None:
            held = [number for number, source in enumerate(self.sources) if source.num_held_out["validation"]]
            if not held:
                samples = sum(len(part.store) for own in self.parts for part in own)
                why = "nothing would be left to train on; add samples with other images, or choose by a benchmark"
                raise UserError(f"data.validation: holds out none of {samples:,} samples, for {why}")
            mixture = tuple(self.data.mixture[number].model_copy(update={"max_epochs": None}) for number in held)
            data = self.data.model_copy(update={"mixture": mixture})
            sides = [own for number in held if (own := self.sources[number].sides) is not None]
            return Sources([self.parts[number] for number in held], data, held_out=sides)
        only = self.data.mixture[0].model_copy(update={"name": "validation", "share": 1.0, "max_epochs": None})
        data = self.data.model_copy(update={"validation": None, "mixture": (only,)})
        return Sources([[self.validation]], data)

    @property
    def not_held_out(self) -> list[str]:
        """Sources of which `data.validation.share` can hold out no sample."""
        if self.validation is not None or self.data.validation is None:
            return []
        return [source.name for source in self.sources if not source.num_held_out["validation"]]

    def longest(self) -> int:
        """Return the tokens of the longest sample."""
        lengths = (part.encoded.num_tokens(part.encoded.all_rows) for own in self.parts for part in own)
        return max(int(own.max(initial=0)) for own in lengths)

    def fingerprint(self) -> str:
        """Return a hash that changes when what is prepared does, and with it the order of the data."""
        of_parts = [
            [part.encoded.path.name, len(part.encoded), part.encoded.total_tokens]
            + [file["xxh3"] for file in part.store.manifest["files"]]
            for own in [*self.parts, [self.validation] if self.validation else []]
            for part in own
        ]
        if self.validation is None and self._hold_out and len(self._hold_out.keys):
            of_parts.append(sorted(self._hold_out.keys.tolist()))  # chosen besides the share, by all sources together
        return xxhash.xxh3_64_hexdigest(json.dumps(of_parts).encode())

    def _sides(self) -> Sequence[Sides | None]:
        """Return the sides of the rows of each source."""
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

    def locate(self, item: PackItem) -> Location:
        """Return where a sample is read."""
        return Location(item.source, *self.sources[item.source].locate(item.sample))

    def sample(self, item: PackItem) -> PlacedSample:
        """Return the encoded sample at a place, with the keys of its images."""
        return self.reader.sample(self.locate(item))


def _sample_keys(parts: Sequence[PreparedDataset], *, texts: bool) -> SampleKeys:
    """Return the keys by which the samples of a source are held out: whole samples that have rows, some several."""
    each = []
    for part in parts:
        read_ahead(part.store.image_keys)
        samples, rows = np.unique(part.encoded.samples, return_inverse=True)
        image_keys, _, numbers = part.images(part.encoded.all_rows)
        num_images = np.bincount(rows, weights=numbers, minlength=len(samples)).astype(np.int64)
        has_rows = np.zeros(len(part.store), np.bool_)
        has_rows[samples] = True
        own_texts = compress(texts_of(part.store.sample_batches()), has_rows) if texts else None
        each.append(sample_keys(own_texts, image_keys, num_images))
    return SampleKeys(*map(np.concatenate, zip(*each, strict=True)))


def _by_row(sides: Sides, parts: Sequence[PreparedDataset]) -> Sides:
    """Return the side of each row: that of the whole sample it comes from."""
    of_sample = [np.unique(part.encoded.samples, return_inverse=True) for part in parts]
    starts = accumulate((len(samples) for samples, _ in of_sample), initial=0)
    rows: Ints = np.concatenate([own + start for start, (_, own) in zip(starts, of_sample, strict=False)])
    return np.take(sides, rows)
