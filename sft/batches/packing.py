"""Packing: bundles of samples -> packs under two caps, tokens and the weight of distinct images. Pure, no tensors.

A bundle is what is placed as one: a sample, or a few samples about the same images that will share their encoding.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
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


LARGE = 0.75
"""A bundle over this part of a pack goes where it leaves least room (best fit), a smaller one to the pack with most
room, so that images, which come with short samples, find tokens to spare in every pack. With 0.25 here a few packs are
full of images and half empty of tokens: the card's mixture filled 94.6 % under 24 images; with 0.5 to 1, 99.6 %
(scripts/bench/bench_mixture.py)."""


def pack_window(
    first: Sequence[Bundle],
    then: Sequence[Bundle],
    num_packs: int,
    caps: Caps,
    rng: np.random.Generator,
    large: float = LARGE,
) -> tuple[list[Pack], list[Bundle]]:
    """Fill `num_packs` packs; return them shuffled, and the bundles that did not fit.

    Large bundles come first, for they need an empty pack, then small ones; of both, those of `first`, the carry of the
    window before, and then those of `then`; the longest first each time. No pack is empty while there is a bundle for
    each. `large` is the part of a pack over which a bundle is large.
    """
    large_tokens = large * caps.tokens
    are_large = [[b for b in own if b.num_tokens > large_tokens] for own in (first, then)]
    are_small = [[b for b in own if b.num_tokens <= large_tokens] for own in (first, then)]
    in_order = [b for bundles in (*are_large, *are_small) for b in sorted(bundles, key=_length, reverse=True)]
    packs, left = _fill(in_order, num_packs, caps, large_tokens)
    _fill_empty(packs)
    return [Pack(items=tuple(packs[number])) for number in rng.permutation(num_packs)], left


_length = itemgetter(Bundle._fields.index("num_tokens"))


def _fill(
    in_order: Sequence[Bundle], num_packs: int, caps: Caps, large: float
) -> tuple[list[list[PackItem]], list[Bundle]]:
    """Place bundles one after another; the samples of each pack, and what did not fit.

    One loop without calls, since it takes most of the time of planning.
    """
    packs: list[list[PackItem]] = [[] for _ in range(num_packs)]
    samples_of: list[dict[int, int]] = [{} for _ in range(num_packs)]  # for each pack, samples that show an image
    weights = [0] * num_packs  # for each pack, what its distinct images weigh
    by_room = [(caps.tokens, number) for number in range(num_packs)]  # tokens that still fit, and the pack; sorted
    left: list[Bundle] = []
    num_empty, to_come = num_packs, len(in_order)
    for bundle in in_order:
        items, tokens, images = bundle
        weight = sum(images.values())
        places = range(bisect_left(by_room, (tokens, -1)), num_packs)
        for place in places if tokens > large and to_come > num_empty else reversed(places):
            room, number = by_room[place]
            shown = samples_of[number]
            if images:
                new = weight
                if not shown.keys().isdisjoint(images):
                    if any(shown.get(image, 0) + len(items) > caps.samples_per_image for image in images):
                        continue
                    new = sum(own for image, own in images.items() if image not in shown)
                if weights[number] + new > caps.image_weight:
                    continue
                weights[number] += new
                for image in images:
                    shown[image] = shown.get(image, 0) + len(items)
            num_empty -= room == caps.tokens
            packs[number] += items
            del by_room[place]
            insort(by_room, (room - tokens, number))
            break
        else:
            left.append(bundle)
        to_come -= 1
    return packs, left


def _fill_empty(packs: list[list[PackItem]]) -> None:
    """Give every empty pack a sample of the pack with most of them. Caps still hold: it has nothing beside it."""
    for pack in packs:
        if not pack and len(fullest := max(packs, key=len)) > 1:
            pack.append(fullest.pop())
