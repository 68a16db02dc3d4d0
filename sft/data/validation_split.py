"""What is held out of training: a function of content alone, so that it is the same in every source.

An image is held out by its hash. A sample is trained on when none of its images is held out, validates when all are,
and is used for neither when only some are: else one of its images would stand on both sides. A sample without images
is held out by its text. Of a source so small that the share holds out no sample, the one with the lowest hashes is held
out with its images, which are then held out of every source; unless nothing of a source would be left to train on.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import IntEnum
from itertools import compress, pairwise
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from sft.data.store.image_keys import NUM_KEYS

Ints = NDArray[np.int64]
Sides = NDArray[np.int8]  # the `Side` of each sample


class Side(IntEnum):
    """Where a sample belongs."""

    TRAIN = 0
    VALIDATION = 1
    NEITHER = 2


class SampleKeys(NamedTuple):
    """By what samples are held out: the keys of their images, or of their text."""

    keys: Ints  # of one sample after another
    numbers: Ints  # how many each has


def sample_keys(texts: Iterable[bytes] | None, image_keys: Ints, num_images: Ints) -> SampleKeys:
    """Return the keys of samples by their texts and by the keys of their images, one sample after another, and how
    many each has. Without texts, a sample without images has no key."""
    if texts is None:
        return SampleKeys(image_keys, num_images)
    has_none = num_images == 0
    text_keys = (xxhash.xxh3_64_intdigest(text) >> 1 for text in compress(texts, has_none))
    places = (np.cumsum(num_images) - num_images)[has_none]
    keys = np.insert(image_keys, places, np.fromiter(text_keys, np.int64, len(places)))
    return SampleKeys(keys, np.maximum(num_images, 1))


class HoldOut(NamedTuple):
    """What is held out: a share of all images and texts, and those with some keys."""

    share: float = 0.0
    keys: Ints = np.empty(0, np.int64)

    def holds(self, keys: Ints) -> NDArray[np.bool_]:
        """Return, for the key of each image or text, whether it is held out."""
        held = keys < self.share * NUM_KEYS
        return np.asarray(held | np.isin(keys, self.keys) if len(self.keys) else held)

    def sides(self, samples: SampleKeys) -> Sides:
        """Return the side of each sample."""
        ends = np.cumsum(samples.numbers)
        num_held = np.diff(np.concatenate(([0], np.cumsum(self.holds(samples.keys))))[np.concatenate(([0], ends))])
        has_all = num_held == samples.numbers
        return np.where(num_held == 0, Side.TRAIN, np.where(has_all, Side.VALIDATION, Side.NEITHER)).astype(np.int8)


def hold_out_share(share: float, sources: Sequence[Callable[[], SampleKeys]]) -> tuple[HoldOut, list[Sides]]:
    """Return what a share holds out of all sources, at least a sample of each where that leaves some of each to train
    on, and the sides of the samples of each source. `sources` are read anew by each call, not held in memory."""

    def sides_by(hold_out: HoldOut) -> list[Sides]:
        return [hold_out.sides(read()) for read in sources]

    hold_out = HoldOut(share)
    sides = sides_by(hold_out)
    without = [read for read, own in zip(sources, sides, strict=True) if len(own) and Side.VALIDATION not in own]
    lowest = [_lowest(read()) for read in without]
    if not lowest:
        return hold_out, sides
    hold_out = HoldOut(share, np.unique(np.concatenate(lowest)))
    sides = sides_by(hold_out)
    used_up = [read().keys for read, own in zip(sources, sides, strict=True) if Side.TRAIN not in own]
    if used_up:
        kept = [keys for keys in lowest if not any(np.isin(keys, own).any() for own in used_up)]
        hold_out = HoldOut(share, np.unique(np.concatenate([lowest[0][:0], *kept])))
        sides = sides_by(hold_out)
    return hold_out, sides


def _lowest(samples: SampleKeys) -> Ints:
    """Return the keys of the sample that a growing share would hold out first, whatever the order of samples."""
    starts = np.cumsum(samples.numbers) - samples.numbers
    last = np.maximum.reduceat(samples.keys, starts)
    own = [samples.keys[starts[n] : starts[n] + samples.numbers[n]] for n in np.flatnonzero(last == last.min())]
    return min(own, key=lambda keys: sorted(set(keys.tolist()), reverse=True))


def texts_of(batches: Iterable[Any]) -> Iterator[bytes]:
    """Yield the text of each sample in batches of a store's samples/: roles, lengths and characters of its messages, as
    they lie in memory one after another. Equal for equal messages, in whatever parts their text comes."""
    for batch in batches:
        messages = batch.column("messages")
        content, roles = messages.values.field("content"), messages.values.field("role")
        texts = content.values.field("text")
        message_borders = messages.offsets.to_numpy()
        role_borders, role_bytes = _borders(roles), _bytes(roles)
        # Where the text of each message begins; the text of an image is null, which has no characters.
        text_borders, text_bytes = _borders(texts)[content.offsets.to_numpy()], _bytes(texts)
        for start, stop in pairwise(message_borders):
            lengths = np.diff(text_borders[start : stop + 1])
            role = role_bytes[role_borders[start] : role_borders[stop]]
            text = text_bytes[text_borders[start] : text_borders[stop]]
            yield b"\0".join((role.tobytes(), lengths.tobytes(), text.tobytes()))


def _borders(strings: Any) -> NDArray[np.int32]:
    """Return where each string of an Arrow array begins among the bytes of all, and where the last one ends."""
    return np.frombuffer(strings.buffers()[1], np.int32)[strings.offset : strings.offset + len(strings) + 1]


def _bytes(strings: Any) -> NDArray[np.uint8]:
    return np.frombuffer(strings.buffers()[2] or b"", np.uint8)
