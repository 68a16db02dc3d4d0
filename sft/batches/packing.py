"""Packing: bundles of samples -> packs under two caps, tokens and the weight of distinct images. Pure, no tensors.

A bundle is what is placed as one: a sample, or a few samples about the same images that will share their encoding.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from sft.core.sample import Caps, Pack, PackItem


class Bundle(NamedTuple):
    """Samples that are placed together."""

    items: tuple[PackItem, ...]
    num_tokens: int
    images: Mapping[int, int]
    """Its distinct images, and what each weighs."""

    @property
    def weight(self) -> int:
        """What its images weigh together."""
        return sum(self.images.values())


NOTHING = Bundle((), 0, {})
LARGE = 0.75
"""A bundle over this part of a pack goes where it leaves least room (best fit), a smaller one to the pack with most
room, so that images, which come with short samples, find tokens to spare in every pack. With 0.25 here a few packs are
full of images and half empty of tokens: the card's mixture filled 94.6 % under 24 images; with 0.5 to 1, 99.6 %
(scripts/bench/bench_mixture.py)."""
LONG_TEXT = 0.5
"""In even packs texts over this part of a pack come before images, which would leave no room for them."""
TOLERANCE = 0.005  # of a window, which even packs may leave empty beyond others
EXCHANGES = 3  # in a pack, at most


def pack_window(
    first: Sequence[Bundle],
    then: Sequence[Bundle],
    num_packs: int,
    caps: Caps,
    rng: np.random.Generator,
    large: float = LARGE,
    even: bool = False,
) -> tuple[list[Pack], list[Bundle]]:
    """Fill `num_packs` packs; return them shuffled, and the bundles that did not fit.

    The carry of the window before, `first`, is placed before `then`. No pack is empty while there is a bundle for each.
    `large` is the part of a pack over which a bundle is large. With `even` the window is planned by both rules, unless
    the first leaves next to nothing empty; of plans that are about as full, the one whose packs differ less in the
    weight of their images is kept.
    """
    bundles = [b for own in (first, then) for b in sorted(own, key=_length, reverse=True)]
    spared = TOLERANCE * num_packs * caps.tokens
    plans = [_evenly(bundles, _Packs(num_packs, caps))] if even else []
    if not plans or sum(plans[0].rooms) > spared:
        plans.append(_by_size(bundles, _Packs(num_packs, caps), large * caps.tokens))
    most = min(sum(plan.rooms) for plan in plans) + spared
    kept = min((plan for plan in plans if sum(plan.rooms) <= most), key=lambda plan: float(np.var(plan.weights)))
    packs = [[item for bundle in bundles for item in bundle.items] for bundles in kept.bundles]
    _fill_empty(packs)
    return [Pack(items=tuple(packs[number])) for number in rng.permutation(num_packs)], kept.left


_length = itemgetter(Bundle._fields.index("num_tokens"))


class _Packs:
    """Packs while they are filled."""

    def __init__(self, num_packs: int, caps: Caps) -> None:
        self.caps = caps
        self.bundles: list[list[Bundle]] = [[] for _ in range(num_packs)]
        self.samples_of: list[dict[int, int]] = [{} for _ in range(num_packs)]  # how many show an image
        self.weights = [0] * num_packs  # of distinct images
        self.rooms = [caps.tokens] * num_packs  # tokens that still fit
        self.left: list[Bundle] = []  # what did not fit

    def fill(self, in_order: Sequence[Bundle], large: float = 0.0, *, level: bool = False) -> None:
        """Place bundles one after another: those of over `large` tokens by best fit, others in the pack with most room;
        to `level`, in the pack of least weight and, among equals, of least room.

        One loop without calls, since it takes most of the time of planning.
        """
        weights, rooms, num_packs = self.weights, self.rooms, len(self.rooms)
        ranked = sorted((weights[n] if level else rooms[n], rooms[n], n) for n in range(num_packs))
        num_empty, to_come = rooms.count(self.caps.tokens), len(in_order)
        for bundle in in_order:
            items, tokens, images = bundle
            weight = bundle.weight if images else 0
            places = range(0 if level else bisect_left(ranked, (tokens,)), num_packs)
            is_first = level or (tokens > large and to_come > num_empty)
            for place in places if is_first else reversed(places):
                _, room, number = ranked[place]
                if room < tokens:
                    continue
                shown = self.samples_of[number]
                if images:
                    new = weight
                    if not shown.keys().isdisjoint(images):
                        if any(shown.get(image, 0) + len(items) > self.caps.samples_per_image for image in images):
                            continue
                        new = sum(own for image, own in images.items() if image not in shown)
                    if weights[number] + new > self.caps.image_weight:
                        continue
                    weights[number] += new
                    for image in images:
                        shown[image] = shown.get(image, 0) + len(items)
                num_empty -= room == self.caps.tokens
                self.bundles[number].append(bundle)
                rooms[number] = room - tokens
                del ranked[place]
                insort(ranked, (weights[number] if level else rooms[number], rooms[number], number))
                break
            else:
                self.left.append(bundle)
            to_come -= 1

    def exchange(self) -> None:
        """In each pack exchange bundles, or nothing, for left-over ones that fill it better. Packs of images alone are
        filled by this: 95 % instead of 82 % (SmolVLM-256M, 4,096 tokens)."""
        self.left.sort(key=_length)
        for number in sorted(range(len(self.rooms)), key=self.rooms.__getitem__, reverse=True):
            for _ in range(EXCHANGES):
                gain, removed, place = max(self._exchanges(number), key=itemgetter(0), default=(0, NOTHING, 0))
                if gain <= 0:
                    break
                placed = self.left.pop(place)
                if removed.items:
                    insort(self.left, removed, key=_length)
                self.bundles[number] = [*(bundle for bundle in self.bundles[number] if bundle is not removed), placed]
                self.rooms[number] -= gain
                self.weights[number] += placed.weight - removed.weight
                shown = dict.fromkeys(removed.images, 0) | dict.fromkeys(placed.images, len(placed.items))
                self.samples_of[number] |= shown

    def _exchanges(self, number: int) -> Iterator[tuple[int, Bundle, int]]:
        """Yield the tokens gained, what goes out of a pack, and the place of the longest left-over bundle that may come
        in for it. Only bundles that share no image with another are exchanged."""
        free, samples_of = self.caps.image_weight - self.weights[number], self.samples_of[number]
        shown = {image for image, samples in samples_of.items() if samples}
        for removed in (NOTHING, *self.bundles[number]):
            if all(samples_of[image] <= len(removed.items) for image in removed.images):
                longest = removed.num_tokens + self.rooms[number]
                for place in range(bisect_right(self.left, longest, key=_length) - 1, -1, -1):
                    placed = self.left[place]
                    if placed.weight <= free + removed.weight and shown.isdisjoint(placed.images):
                        yield placed.num_tokens - removed.num_tokens, removed, place
                        break


def _by_size(bundles: Sequence[Bundle], packs: _Packs, large: float) -> _Packs:
    """Place large bundles first, for they need an empty pack, by best fit, then small ones by most room."""
    packs.fill([b for is_large in (True, False) for b in bundles if (b.num_tokens > large) == is_large], large)
    return packs


def _evenly(bundles: Sequence[Bundle], packs: _Packs) -> _Packs:
    """Spread images by their weight and fill up with texts. By size alone images gather in some packs and texts in
    others: the cost of SmolVLM-256M's packs varies by 21 %, and by 7 % here (scripts/bench/bench_packing.py)."""
    large, long = LARGE * packs.caps.tokens, LONG_TEXT * packs.caps.tokens
    small = [b for b in bundles if b.num_tokens <= large]
    packs.fill([b for b in bundles if b.num_tokens > large])
    packs.fill([b for b in small if not b.images and b.num_tokens > long], large)
    packs.fill([b for b in small if b.images], level=True)
    left, packs.left = packs.left, []
    packs.fill([*(b for b in small if not b.images and b.num_tokens <= long), *left])
    packs.exchange()
    return packs


def _fill_empty(packs: list[list[PackItem]]) -> None:
    """Give every empty pack a sample of the pack with most of them. Caps still hold: it has nothing beside it."""
    for pack in packs:
        if not pack and len(fullest := max(packs, key=len)) > 1:
            pack.append(fullest.pop())
