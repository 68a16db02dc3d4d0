"""Seeded orders of the samples of a source: a permutation for each epoch, computed at any place rather than stored."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_ROUNDS = 6


class ShownImages(NamedTuple):
    """The distinct images of some samples, one sample after another."""

    keys: Ints  # equal numbers are equal images, across sources too
    weights: Ints  # what each counts towards the cap of a pack (`sft.models.family.Images.weight`)
    numbers: Ints  # how many images each sample has

    def weight_of_samples(self) -> Ints:
        """Return what the images of each sample weigh together."""
        if self.weights.size == 0 or self.weights.max() == 1:  # as in IDEFICS-1
            return self.numbers
        owners = np.repeat(np.arange(len(self.numbers)), self.numbers)
        return np.bincount(owners, self.weights, minlength=len(self.numbers)).astype(np.int64)


class ImageGroups(NamedTuple):
    """Samples about the same images: group g is `members[starts[g]:starts[g + 1]]`."""

    members: Ints
    starts: Ints


class Cursor(NamedTuple):
    """A place in the endless order of a source."""

    unit: int = 0  # how many groups come before it over all epochs; how many samples, where there are no groups
    offset: int = 0  # how many samples of its own group come before it


class Ordered(NamedTuple):
    """Samples in the order of their source."""

    rows: Ints
    groups: Ints  # equal for samples about the same images
    units: Ints
    offsets: Ints  # with its unit the place of each sample, as in `Cursor`

    def after(self, number: int) -> Ordered:
        """Return the samples without the first `number`."""
        return Ordered(*(array[number:] for array in self))

    def followed_by(self, more: Ordered) -> Ordered:
        """Return these samples and then others."""
        return Ordered(*(np.concatenate(pair) for pair in zip(self, more, strict=True)))


class Order:
    """The order of a source: every epoch another permutation of its groups, and of the samples in each."""

    def __init__(self, size: int, groups: ImageGroups | None, key: int) -> None:
        self.size = size
        self.groups = groups
        self.key = key
        self.num_units = size if groups is None else len(groups.starts) - 1

    def take(self, cursor: Cursor, number: int) -> Ordered:
        """Return about `number` samples from a place on."""
        num_units = number if self.groups is None else -(-number * self.num_units // self.size) + 1
        units = np.arange(cursor.unit, cursor.unit + num_units)
        epochs = units // self.num_units
        keys = mix64(epochs, self.key) >> np.uint64(8)
        drawn = permute(units % self.num_units, self.num_units, keys)
        if self.groups is None:
            return Ordered(drawn, drawn, units, np.zeros_like(units))
        return self._members(self.groups, drawn, units, epochs).after(cursor.offset)

    def _members(self, groups: ImageGroups, drawn: Ints, units: Ints, epochs: Ints) -> Ordered:
        """Return the samples of some groups, in an order of their own in each epoch."""
        starts = groups.starts[drawn]
        sizes = groups.starts[drawn + 1] - starts
        of = np.repeat(np.arange(len(drawn)), sizes)
        offsets = np.arange(len(of)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        rows = groups.members[np.repeat(starts, sizes) + offsets]
        rank = mix64(rows + mix64(epochs[of], self.key).view(np.int64), self.key)
        return Ordered(rows[np.lexsort((rank, of))], drawn[of], units[of], offsets)


def permute(places: Ints, size: int, key: int | NDArray[np.uint64]) -> Ints:
    """Return what a permutation of 0 … size - 1, a function of `key`, has at some places, in O(1) memory. Each place
    may have a key of its own. The permutation is a Feistel network over the next power of four, walked on until it
    lands inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): a bijection whatever its round
    function is."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.broadcast_to(np.asarray(key, np.uint64), places.shape)
    result = places.astype(np.uint64)
    outside = np.arange(len(result))
    while len(outside):
        values, own = result[outside], keys[outside]
        left, right = values >> half, values & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (mix64(right, own + np.uint64(number)) & mask)
        values = (left << half) | right
        result[outside] = values
        outside = outside[values >= size]
    return result.astype(np.int64)


def mix64(values: NDArray[np.uint64] | Ints, key: int | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a hash of 64-bit numbers (splitmix64, Steele and others, 2014), by one key or by one for each number."""
    with np.errstate(over="ignore"):
        odd = np.uint64((2 * key + 1) % 2**64) if isinstance(key, int) else 2 * key + 1
        x = values.astype(np.uint64) + odd * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)))
