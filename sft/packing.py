"""Packing: bundles of samples -> packs under two caps, tokens and distinct images. Pure, no tensors.

A bundle is what is placed as one: a sample, or a few samples about the same images that will share their encoding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sft.sample import Pack, PackItem


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """Samples that are placed together."""

    items: tuple[PackItem, ...]
    num_tokens: int
    images: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Caps:
    """What a pack may hold."""

    tokens: int
    images: int
    """Distinct images."""
    samples_per_image: int


@dataclass
class _Open:
    """A pack being filled."""

    bundles: list[Bundle] = field(default_factory=list)
    samples_of: Counter[int] = field(default_factory=Counter)

    def takes(self, bundle: Bundle, caps: Caps) -> bool:
        """Whether the bundle's images fit, by number and by samples of each."""
        new = bundle.images - self.samples_of.keys()
        return len(self.samples_of) + len(new) <= caps.images and all(
            self.samples_of[image] + len(bundle.items) <= caps.samples_per_image for image in bundle.images - new
        )

    def add(self, bundle: Bundle) -> None:
        self.bundles.append(bundle)
        self.samples_of.update({image: len(bundle.items) for image in bundle.images})


def pack_window(
    first: Sequence[Bundle], then: Sequence[Bundle], num_packs: int, caps: Caps, rng: np.random.Generator
) -> tuple[list[Pack], list[Bundle]]:
    """Fill `num_packs` packs; return them shuffled, and the bundles that did not fit.

    Bundles in `first`, the carry of the window before, are placed before those in `then`; within each the longest come
    first. Two rules are tried and the one that leaves fewer tokens over is kept: the fullest pack with room (best when
    bundles are long) and the emptiest (best when many short bundles with an image each must be spread over all packs,
    or they end up in a few packs that are full of images and half empty of tokens). Before that counts that no pack is
    empty, which is so with the second rule whenever there is a bundle for each.
    """
    filled = [_fill([first, then], num_packs, caps, fullest=fullest) for fullest in (True, False)]

    def cost(result: tuple[list[_Open], list[Bundle]]) -> tuple[int, int]:
        packs, left = result
        return sum(not pack.bundles for pack in packs), sum(bundle.num_tokens for bundle in left)

    packs, left = min(filled, key=cost)
    shuffled = [packs[number] for number in rng.permutation(num_packs)]
    return [Pack(items=tuple(item for b in pack.bundles for item in b.items)) for pack in shuffled], left


def _fill(
    batches: Sequence[Sequence[Bundle]], num_packs: int, caps: Caps, *, fullest: bool
) -> tuple[list[_Open], list[Bundle]]:
    packs = [_Open() for _ in range(num_packs)]
    free = np.full(num_packs, caps.tokens)
    left: list[Bundle] = []
    for bundles in batches:
        for bundle in sorted(bundles, key=lambda b: b.num_tokens, reverse=True):
            for number in np.argsort(free if fullest else -free, kind="stable"):
                if free[number] >= bundle.num_tokens and packs[number].takes(bundle, caps):
                    packs[number].add(bundle)
                    free[number] -= bundle.num_tokens
                    break
            else:
                left.append(bundle)
    return packs, left
