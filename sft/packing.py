"""Packing: bundles of samples -> packs under two caps, tokens and distinct images. Pure, no tensors.

A bundle is what is placed as one: a sample, or a few samples about the same images that will share their encoding.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sft.sample import Caps, Pack, PackItem


class Bundle(NamedTuple):
    """Samples that are placed together."""

    items: tuple[PackItem, ...]
    num_tokens: int
    images: frozenset[int]


LARGE = 0.75
"""A bundle over this part of a pack goes where it leaves least room (best fit), a smaller one to the pack with most
room, so that images, which come with short samples, find tokens to spare in every pack. With 0.25 here a few packs are
full of images and half empty of tokens: the card's mixture filled 94.6 % under 24 images; with 0.5 to 1, 99.6 %
(scripts/bench_mixture.py)."""


def pack_window(
    first: Sequence[Bundle], then: Sequence[Bundle], num_packs: int, caps: Caps, rng: np.random.Generator
) -> tuple[list[Pack], list[Bundle]]:
    """Fill `num_packs` packs; return them shuffled, and the bundles that did not fit.

    Large bundles come first, for they need an empty pack; then the small ones of `first`, the carry of the window
    before, then those of `then`; the longest first each time. No pack is empty while there is a bundle for each.
    """
    window = _Window(num_packs, caps)
    is_large = [[b for b in own if b.num_tokens > LARGE * caps.tokens] for own in (first, then)]
    is_small = [[b for b in own if b.num_tokens <= LARGE * caps.tokens] for own in (first, then)]
    in_order = [
        bundle
        for bundles in (is_large[0] + is_large[1], *is_small)
        for bundle in sorted(bundles, key=lambda b: b.num_tokens, reverse=True)
    ]
    to_come = range(len(in_order), 0, -1)
    left = [bundle for bundle, number in zip(in_order, to_come, strict=True) if not window.place(bundle, number)]
    items = [[item for bundle in bundles for item in bundle.items] for bundles in window.packs]
    _fill_empty(items)
    return [Pack(items=tuple(items[number])) for number in rng.permutation(num_packs)], left


def _fill_empty(packs: list[list[PackItem]]) -> None:
    """Give every empty pack a sample of the pack with most of them. Caps still hold: it has nothing beside it."""
    for pack in packs:
        if not pack and len(fullest := max(packs, key=len)) > 1:
            pack.append(fullest.pop())


class _Window:
    """Packs being filled."""

    def __init__(self, num_packs: int, caps: Caps) -> None:
        self.caps = caps
        self.packs: list[list[Bundle]] = [[] for _ in range(num_packs)]
        self.samples_of: list[dict[int, int]] = [{} for _ in range(num_packs)]
        """For each pack how many samples show each of its images."""
        self.by_room = [(caps.tokens, number) for number in range(num_packs)]
        """Tokens that still fit, and the pack; sorted."""
        self.num_empty = num_packs

    def place(self, bundle: Bundle, to_come: int) -> bool:
        """Put a bundle into a pack with room for it, if there is one; `to_come` counts it and those after it."""
        by_room, tokens = self.by_room, bundle.num_tokens
        places = range(bisect_left(by_room, (tokens, -1)), len(by_room))
        is_best_fit = tokens > LARGE * self.caps.tokens and to_come > self.num_empty
        images, most_images = bundle.images, self.caps.images - len(bundle.images)
        for place in places if is_best_fit else reversed(places):
            room, number = by_room[place]
            samples_of = self.samples_of[number]
            if (
                not images
                or (len(samples_of) <= most_images and samples_of.keys().isdisjoint(images))
                or self._may_share(samples_of, bundle)
            ):
                for image in images:
                    samples_of[image] = samples_of.get(image, 0) + len(bundle.items)
                del by_room[place]
                insort(by_room, (room - tokens, number))
                self.num_empty -= not self.packs[number]
                self.packs[number].append(bundle)
                return True
        return False

    def _may_share(self, samples_of: dict[int, int], bundle: Bundle) -> bool:
        """Whether a pack that shows some of a bundle's images already can take it, by images and by samples of each."""
        return (
            not samples_of.keys().isdisjoint(bundle.images)
            and len(samples_of.keys() | bundle.images) <= self.caps.images
            and all(samples_of.get(i, 0) + len(bundle.items) <= self.caps.samples_per_image for i in bundle.images)
        )
