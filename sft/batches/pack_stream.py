"""The stream of packs: a pure function of the sources, the data settings and the seed.

Packs are planned a window at a time. The state between two windows is the place of every source and the carry, the
samples that were drawn and did not fit: as JSON, a few kilobytes.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, repeat
from math import ceil
from typing import Any

import numpy as np

from sft.batches.mixture import Mixture
from sft.batches.packing import LARGE, Bundle, pack_window
from sft.batches.source_stream import Draw, SourceSizes, sums_before
from sft.core.errors import UserError
from sft.core.sample import Caps, Pack, PackItem
from sft.data.orders import Ints
from sft.recipe import DataConfig

MIN_WINDOW_PACKS = 64
SPARE = 0.03
"""Part of a window by which more is drawn for even packs than the last one held, so that they may become fuller."""


class Planner:
    """Draws windows of packs: a whole number of optimizer steps, and at least MIN_WINDOW_PACKS packs."""

    def __init__(self, sizes: Sequence[SourceSizes], data: DataConfig, *, packs_per_step: int, seed: int) -> None:
        """
        Raises:
            UserError: no sample of a source fits a pack.
        """
        self.sizes = sizes
        self.caps = Caps(
            tokens=data.sequence_length,
            image_weight=data.max_images_per_pack,
            samples_per_image=data.max_samples_per_image_per_pack,
        )
        self.mixture = Mixture(sizes, unit=data.share_unit, seed=seed, caps=self.caps)
        self.openings_are_trained = data.train_on == "all" and not data.pack_isolation  # see `collate`
        self.packs_per_step = packs_per_step
        self.window_packs = packs_per_step * ceil(MIN_WINDOW_PACKS / packs_per_step)
        self.seed = seed
        self.window = 0
        self.carry: list[Bundle] = []
        self.capacity = self.window_packs * self.caps.tokens
        self.is_even = data.even_packs
        self.filled = self.capacity
        """Tokens of the last window. For even packs hardly more are drawn: where no sample fits the gaps of packs, the
        carry would grow to a third of a window, and shares would be 18 packs off."""

    def windows(self) -> Iterator[list[Pack]]:
        """Yield windows without end, or up to the end of a source that is to stop everything (`ended`). What is drawn
        last is as few whole steps as hold it all, which may be more than a window; only where there are fewer samples
        than packs does the last step have fewer packs."""
        while not self.mixture.ended():
            with _no_garbage_collection():
                drawn = self._drawn()
                if self.mixture.ended():
                    packs, self.carry = self._last_packs(drawn), []
                else:
                    packs, left = self._packs(drawn, self.window_packs)
                    self.filled = _tokens(self.carry) + _tokens(drawn) - _tokens(left)
                    self.carry = left
            self.window += 1
            yield packs

    def num_trained(self, packs: Sequence[Pack]) -> int:
        """Return the trained tokens of some packs."""
        inside = sum(int(self.sizes[source].num_trained(rows).sum()) for source, rows, _ in by_source(packs))
        return inside + sum(max(len(pack.items) - 1, 0) for pack in packs) * self.openings_are_trained

    def state(self) -> dict[str, Any]:
        """Return counters and carry as JSON, between two windows."""
        return {
            "window": self.window,
            "drawn": self.mixture.state(),
            "filled": self.filled,
            "carry": [bundle.items for bundle in self.carry],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            UserError: an earlier version took it, which planned other packs.
        """
        if self.is_even and "filled" not in state:
            raise UserError("the checkpoint is of an earlier version, whose packs were others; train from its weights")
        self.filled = state.get("filled", self.capacity)
        self.window = state["window"]
        self.mixture.restore(state["drawn"])
        self.carry = [self._restored(items) for items in state["carry"]]

    def _packs(self, drawn: Sequence[Bundle], num_packs: int, large: float = LARGE) -> tuple[list[Pack], list[Bundle]]:
        rng = np.random.default_rng([self.seed, self.window])
        return pack_window(self.carry, drawn, num_packs, self.caps, rng, large, even=self.is_even and large == LARGE)

    def _last_packs(self, drawn: Sequence[Bundle]) -> list[Pack]:
        """Return the whole steps of packs that the carry and the last draw take, none of them empty."""
        bundles = [*self.carry, *drawn]
        needed = max(_tokens(bundles) / self.caps.tokens, _weight(bundles) / self.caps.image_weight)
        num_packs = ceil(needed / self.packs_per_step) * self.packs_per_step
        packs: list[Pack] = []
        left = bundles
        while left:
            packs, left = self._packs(drawn, num_packs)
            if left:  # best fit for all: 100 samples of about 17 tokens take 14 packs of 128, not 15
                packs, left = self._packs(drawn, num_packs, large=0.0)
            num_packs += self.packs_per_step
        return [pack for pack in packs if pack.items]

    def _drawn(self) -> list[Bundle]:
        """Draw for a window, at least a bundle for each pack."""
        if not self.is_even:
            return self._draw(self.capacity, self.carry)
        drawn = self._draw(min(self.capacity, self.filled + round(SPARE * self.capacity)), self.carry)
        if len(self.carry) + len(drawn) < self.window_packs and not self.mixture.ended():
            drawn += self._draw(self.capacity, [*self.carry, *drawn])
        return drawn

    def _draw(self, num_tokens: int, waiting: Sequence[Bundle]) -> list[Bundle]:
        """Draw what is so long with what waits, but no more images than fill a window, nor one that stands in each of
        its packs."""
        shown = Counter(image for bundle in waiting for image in bundle.images)
        draws = self.mixture.draw(
            num_tokens - _tokens(waiting),
            self.window_packs * self.caps.image_weight - _weight(waiting),
            self.window_packs - max(shown.values(), default=0),
        )
        return [bundle for source, draw in enumerate(draws) for bundle in bundles_of(source, draw, self.caps)]

    def _restored(self, items: Sequence[Sequence[int]]) -> Bundle:
        rows = np.array([row for _, row in items])
        sizes = self.sizes[items[0][0]]
        shown = sizes.images(rows[:1])
        return Bundle(
            tuple(PackItem(*item) for item in items),
            int(sizes.num_tokens(rows).sum()),
            dict(zip(shown.keys.tolist(), shown.weights.tolist(), strict=True)),
        )


def _tokens(bundles: Sequence[Bundle]) -> int:
    return sum(bundle.num_tokens for bundle in bundles)


def _weight(bundles: Sequence[Bundle]) -> int:
    return sum(bundle.weight for bundle in bundles)


def by_source(packs: Sequence[Pack]) -> Iterator[tuple[int, Ints, Ints]]:
    """Yield each source that some packs have samples of, the rows of these, and the number of the pack of each."""
    items = np.array([item for pack in packs for item in pack.items], dtype=np.int64).reshape(-1, 2)
    numbers = np.repeat(np.arange(len(packs)), [len(pack.items) for pack in packs])
    order = np.argsort(items[:, 0], kind="stable")
    sources, starts = np.unique(items[order, 0], return_index=True)
    for source, own in zip(sources.tolist(), np.split(order, starts[1:]), strict=True):
        yield source, items[own, 1], numbers[own]


def weigh_images(shown: Sequence[Ints], num_packs: int) -> tuple[Ints, Ints]:
    """Return how many distinct images each pack shows, and what they weigh, from arrays (3, images) of the pack, the
    key and the weight of each."""
    packs_of, keys, weights = np.concatenate([np.zeros((3, 0), np.int64), *shown], axis=1)
    order = np.lexsort((keys, packs_of))
    packs_of, keys, weights = packs_of[order], keys[order], weights[order]
    is_first = np.append(True, (np.diff(keys) != 0) | (np.diff(packs_of) != 0))[: len(keys)]
    weight_P = np.bincount(packs_of[is_first], weights[is_first], num_packs)
    return np.bincount(packs_of[is_first], minlength=num_packs), weight_P.astype(np.int64)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Turn the garbage collector off: looking for cycles among thousands of tuples took half of the planning."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def bundles_of(source: int, draw: Draw, caps: Caps) -> list[Bundle]:
    """Bundle consecutive samples about the same images, as many as may share a pack; each text is a bundle."""
    borders = sums_before(draw.num_images).tolist()
    weighed = [*zip(draw.images.tolist(), draw.weights.tolist(), strict=True)]
    images = [dict(weighed[start:end]) for start, end in pairwise(borders)]
    items = [*map(PackItem, repeat(source), draw.rows.tolist())]
    tokens = draw.num_tokens.tolist()
    is_joined = (draw.groups[1:] == draw.groups[:-1]) & (draw.num_images[1:] > 0)
    if caps.samples_per_image == 1 or not is_joined.any():
        return [*map(Bundle, zip(items), tokens, images)]  # zip makes tuples of one
    bundles = []
    start, num_tokens = 0, tokens[0]
    for number, joins in enumerate([*is_joined.tolist(), False], start=1):
        if joins and number - start < caps.samples_per_image and num_tokens + tokens[number] <= caps.tokens:
            num_tokens += tokens[number]
            continue
        bundles.append(Bundle(tuple(items[start:number]), num_tokens, images[start]))
        start, num_tokens = number, tokens[number] if number < len(tokens) else 0
    return bundles
