"""From prepared sources to the stream of micro-batches: one readable walk.

    Sources (prepared, encoded) ─ sizes ─> Planner: windows of packs ─> MicroBatches: Batch after Batch

The stream of packs is a pure function of the sources, the data settings and the seed. Its state is the planner's
counters and carry at the start of a window, plus the number of packs taken from it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset

from sft.collate import PlacedSample, collate
from sft.encoding import EncodedSamples
from sft.errors import UserError
from sft.held_out import HoldOut, Side, check_not_empty
from sft.images import decode_rgb, to_pixels
from sft.mixture import Mixture, SourceSizes
from sft.packing import Bundle, Caps, pack_window
from sft.recipe import DataConfig
from sft.sample import Batch, Pack, PackItem
from sft.store import Store

MIN_WINDOW_PACKS = 64


@dataclass(frozen=True)
class Part:
    """One prepared dataset of a source."""

    store: Store
    encoded: EncodedSamples


class Sources:
    """The sources of a mixture, each one or several prepared datasets end to end. Equal images have equal numbers.

    Only samples of one side are in it: those to train on, or those held out (`data.validation`).
    """

    def __init__(
        self,
        parts: Sequence[Sequence[Part]],
        data: DataConfig,
        *,
        validation: Part | None = None,
        side: Side = Side.TRAIN,
    ) -> None:
        """`validation` is the dataset of `data.validation.path`.

        Raises:
            UserError: all samples of a source are held out.
        """
        self.parts = parts
        self.data = data
        self.validation = validation
        self.side = side
        self._starts = [[0, *accumulate(len(part.encoded) for part in own)] for own in parts]
        self._image_numbers: dict[int, list[int]] = {}  # store, by identity -> image number of each of its rows
        self._image_places: list[tuple[Store, int]] = []
        by_hash: dict[str, int] = {}
        for part in (part for own in parts for part in own):
            numbers = []
            for row, sha256 in enumerate(part.store.image_hashes):
                if sha256 not in by_hash:
                    by_hash[sha256] = len(by_hash)
                    self._image_places.append((part.store, row))
                numbers.append(by_hash[sha256])
            self._image_numbers[id(part.store)] = numbers
        self.sides = self._split()
        self._rows = [np.flatnonzero(sides == side) for sides in self.sides]  # of each source, its samples on this side

    def held_out(self) -> Sources | None:
        """The other side: what is held out of training, `data.validation.path` as one more source; None if nothing."""
        if self.data.validation is None:
            return None
        if self.validation is None:
            return Sources(self.parts, self.data, side=Side.VALIDATION)
        share = self.data.mixture[0].model_copy(update={"name": "validation"})
        data = self.data.model_copy(update={"validation": None, "mixture": (share,)})
        return Sources([[self.validation]], data)

    def _split(self) -> list[NDArray[np.int8]]:
        """The side of every sample of every source."""
        validation = self.data.validation
        if validation is None:
            return [np.zeros(starts[-1], dtype=np.int8) for starts in self._starts]
        held_out = HoldOut(
            share=validation.share or 0.0,
            hashes=frozenset(self.validation.store.image_hashes) if self.validation else frozenset(),
        )
        sides = [
            np.concatenate(
                [held_out.sides(list(part.store.keys), part.store.image_hashes, *part.encoded.images) for part in own]
            )
            for own in self.parts
        ]
        for config, of_source in zip(self.data.mixture, sides, strict=True):
            check_not_empty(config.name, of_source)
        return sides

    def sizes(self) -> list[SourceSizes]:
        """What the planner needs to know."""
        sizes = []
        for config, share, own, rows in zip(self.data.mixture, self.data.shares, self.parts, self._rows, strict=True):
            images = [images for part in own for images in self._all_images(part)]
            sizes.append(
                SourceSizes(
                    name=config.name,
                    share=share,
                    num_tokens=np.concatenate([part.encoded.num_tokens for part in own])[rows],
                    num_trained=np.concatenate([part.encoded.num_trained(self.data.train_on) for part in own])[rows],
                    images=tuple(images[row] for row in rows),
                )
            )
        return sizes

    def place(self, item: PackItem) -> PlacedSample:
        """The encoded sample at a place, with the numbers of its images."""
        sample = int(self._rows[item.source][item.sample])
        number = bisect_right(self._starts[item.source], sample) - 1
        part, row = self.parts[item.source][number], sample - self._starts[item.source][number]
        numbers = self._image_numbers[id(part.store)]
        images = tuple(numbers[image_row] for image_row in part.encoded.image_rows(row))
        return PlacedSample(part.encoded[row], images, item.source)

    def pixels(self, image: int, size: int) -> NDArray[np.uint8]:
        """The pixels of image number `image`, (C, H, W)."""
        store, row = self._image_places[image]
        return to_pixels(decode_rgb(store.image_bytes(row)), size)

    def _all_images(self, part: Part) -> Iterator[tuple[int, ...]]:
        rows, offsets = part.encoded.images
        numbers = np.array(self._image_numbers[id(part.store)], dtype=np.int64)
        all_numbers, borders = numbers[np.asarray(rows)].tolist(), offsets.tolist()
        for start, end in pairwise(borders):
            yield tuple(all_numbers[start:end])


class Planner:
    """Draws windows of packs: a whole number of optimizer steps, and at least MIN_WINDOW_PACKS packs."""

    def __init__(self, sizes: Sequence[SourceSizes], data: DataConfig, *, packs_per_step: int, seed: int) -> None:
        """
        Raises:
            UserError: no sample of a source fits a pack: drawing from it would never end.
        """
        self.sizes = sizes
        self.caps = Caps(
            tokens=data.sequence_length,
            images=data.max_images_per_pack,
            samples_per_image=data.max_samples_per_image_per_pack,
        )
        for index, size in enumerate(sizes):
            if not any(self._fits_alone(PackItem(index, sample)) for sample in range(len(size.num_tokens))):
                raise UserError(
                    f"source {size.name!r}: no sample fits a pack of {self.caps.tokens} tokens (data.sequence_length) "
                    f"and {self.caps.images} images (data.max_images_per_pack); its shortest has {min(size.num_tokens)}"
                )
        self.mixture = Mixture(sizes, unit=data.share_unit, seed=seed)
        self.window_packs = packs_per_step * ceil(MIN_WINDOW_PACKS / packs_per_step)
        self.seed = seed
        self.window = 0
        self.carry: list[Bundle] = []
        self.num_dropped = [0] * len(sizes)
        """Samples of each source that no pack can hold, drawn and left out so far."""

    def windows(self) -> Iterator[list[Pack]]:
        """Windows without end."""
        while True:
            rng = np.random.default_rng([self.seed, self.window])
            packs, self.carry = pack_window(self.carry, self._draw(), self.window_packs, self.caps, rng)
            self.window += 1
            yield packs

    def state(self) -> dict[str, Any]:
        """Counters and carry as JSON, between two windows."""
        return {
            "window": self.window,
            "drawn": self.mixture.state(),
            "carry": [bundle.items for bundle in self.carry],
            "dropped": list(self.num_dropped),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.window = state["window"]
        self.mixture.restore(state["drawn"])
        self.carry = [self._bundle([PackItem(*item) for item in items]) for items in state["carry"]]
        self.num_dropped = list(state["dropped"])

    def _draw(self) -> list[Bundle]:
        """Samples for a window, bundled by image: as many as fill it in tokens, in images, or in packs that one image
        may stand in. Drawing on beyond any of the three would leave more and more of one source behind."""
        tokens = sum(bundle.num_tokens for bundle in self.carry)
        num_bundles_of = Counter(image for bundle in self.carry for image in bundle.images)
        images, most = num_bundles_of.total(), max(num_bundles_of.values(), default=0)
        done: list[Bundle] = []
        growing: dict[int, list[PackItem]] = {}  # source -> items of its bundle, all about the same images
        while (
            tokens < self.window_packs * self.caps.tokens
            and images < self.window_packs * self.caps.images
            and most < self.window_packs
        ):
            item = self.mixture.draw()
            if not self._fits_alone(item):
                self.mixture.give_back(item)
                self.num_dropped[item.source] += 1
                continue
            if not self._joins(growing.get(item.source), item):
                if item.source in growing:
                    done.append(self._bundle(growing.pop(item.source)))
                growing[item.source] = []
                for image in set(self._images(item)):
                    num_bundles_of[image] += 1
                    images += 1
                    most = max(most, num_bundles_of[image])
            growing[item.source].append(item)
            tokens += self._tokens(item)
        return done + [self._bundle(items) for items in growing.values()]

    def _joins(self, bundle: list[PackItem] | None, item: PackItem) -> bool:
        return bool(
            bundle
            and self._images(item)
            and self._images(bundle[0]) == self._images(item)
            and len(bundle) < self.caps.samples_per_image
            and sum(map(self._tokens, bundle)) + self._tokens(item) <= self.caps.tokens
        )

    def _fits_alone(self, item: PackItem) -> bool:
        return self._tokens(item) <= self.caps.tokens and len(set(self._images(item))) <= self.caps.images

    def _bundle(self, items: list[PackItem]) -> Bundle:
        return Bundle(
            items=tuple(items), num_tokens=sum(map(self._tokens, items)), images=frozenset(self._images(items[0]))
        )

    def _tokens(self, item: PackItem) -> int:
        return int(self.sizes[item.source].num_tokens[item.sample])

    def _images(self, item: PackItem) -> tuple[int, ...]:
        return self.sizes[item.source].images[item.sample]


class MicroBatches(IterableDataset[dict[str, Batch]]):
    """Micro-batches without end, as `{"batch": Batch}`; every `packs_per_step / micro_batch_packs` make a step."""

    def __init__(
        self, sources: Sources, planner: Planner, *, packs_per_step: int, micro_batch_packs: int, image_size: int
    ) -> None:
        self.sources = sources
        self.planner = planner
        self.packs_per_step = packs_per_step
        self.micro_batch_packs = micro_batch_packs
        self.image_size = image_size

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        for window in self.planner.windows():
            for first in range(0, len(window), self.packs_per_step):
                yield from self._step(window[first : first + self.packs_per_step])

    def _step(self, packs: list[Pack]) -> Iterator[dict[str, Batch]]:
        train_on = self.sources.data.train_on
        placed = [[self.sources.place(item) for item in pack.items] for pack in packs]
        sizes = self.planner.sizes
        num_trained_tokens = sum(int(sizes[i.source].num_trained[i.sample]) for pack in packs for i in pack.items)
        for first in range(0, len(placed), self.micro_batch_packs):
            batch = collate(
                placed[first : first + self.micro_batch_packs],
                lambda image: self.sources.pixels(image, self.image_size),
                train_on=train_on,
                pack_isolation=self.sources.data.pack_isolation,
                image_size=self.image_size,
                num_trained_tokens=num_trained_tokens,
            )
            yield {"batch": batch}
