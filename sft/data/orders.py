"""Seeded orders: every epoch of a source another permutation, computed at any place rather than stored."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Groups(NamedTuple):
    """Samples about the same images: group g is `members[starts[g]:starts[g + 1]]`."""

    members: Ints
    starts: Ints


_ROUNDS = 6


def permute(places: Ints, size: int, key: int) -> Ints:
    """A permutation of 0 … size - 1 that is a function of `key`, at some places. O(1) memory.

    A Feistel network over the next power of four, walked on until it lands inside (Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002): a bijection whatever its round function is.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    result = places.astype(np.uint64)
    outside = np.arange(len(result))
    while len(outside):
        values = result[outside]
        left, right = values >> shift, values & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (mix64(right, key + number) & mask)
        values = (left << shift) | right
        result[outside] = values
        outside = outside[values >= size]
    return result.astype(np.int64)


def mix64(values: NDArray[np.uint64] | Ints, key: int) -> NDArray[np.uint64]:
    """A hash of 64-bit numbers (splitmix64, Steele and others, 2014)."""
    with np.errstate(over="ignore"):
        x = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15 * (2 * key + 1) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)))


class Cursor(NamedTuple):
    """A place in the endless order of a source."""

    unit: int = 0
    """Groups gone by, over all epochs; samples, where there are no groups."""
    offset: int = 0
    """Samples of the present group gone by."""


class Taken(NamedTuple):
    """Samples in their order."""

    rows: Ints
    groups: Ints
    """Equal for samples about the same images."""
    units: Ints
    offsets: Ints
    """The place of each, as of a cursor."""

    def part(self, start: int) -> Taken:
        """Those from one on."""
        return Taken(*(array[start:] for array in self))

    def then(self, more: Taken) -> Taken:
        """These and more."""
        return Taken(*(np.concatenate(pair) for pair in zip(self, more, strict=True)))


class Order:
    """The order of a source: every epoch another permutation of its groups, and of the samples in each."""

    def __init__(self, size: int, groups: Groups | None, key: int) -> None:
        self.size = size
        self.groups = groups
        self.key = key
        self.num_units = size if groups is None else len(groups.starts) - 1

    def take(self, cursor: Cursor, number: int) -> Taken:
        """Some samples from a place on, about `number`."""
        units_wanted = number if self.groups is None else -(-number * self.num_units // self.size) + 1
        units = np.arange(cursor.unit, cursor.unit + units_wanted)
        epochs = units // self.num_units
        places = [
            permute(units[epochs == epoch] % self.num_units, self.num_units, self._key(epoch))
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
        drawn = np.concatenate(places)
        if self.groups is None:
            return Taken(drawn, drawn, units, np.zeros_like(units))
        rows, of, offsets = self._expand(drawn, epochs)
        return Taken(rows, drawn[of], units[of], offsets).part(cursor.offset)

    def _expand(self, drawn: Ints, epochs: Ints) -> tuple[Ints, Ints, Ints]:
        """The rows of some groups, in an order of their own in each epoch."""
        assert self.groups is not None
        starts = self.groups.starts[drawn]
        sizes = self.groups.starts[drawn + 1] - starts
        of = np.repeat(np.arange(len(drawn)), sizes)
        ends = np.cumsum(sizes)
        offsets = np.arange(int(ends[-1])) - np.repeat(ends - sizes, sizes)
        rows = self.groups.members[np.repeat(starts, sizes) + offsets]
        rank = mix64(rows + mix64(epochs[of], self.key).view(np.int64), self.key)
        return rows[np.lexsort((rank, of))], of, offsets

    def _key(self, epoch: int) -> int:
        return int(mix64(np.array([epoch]), self.key)[0]) >> 8
