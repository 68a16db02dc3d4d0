"""What is held out of training: a function of content alone, so that it is the same in every source.

An image is held out by its hash. A sample is trained on when none of its images is held out, validates when all are,
and is used for neither when only some are: else one of its images would stand on both sides. A sample without images
is held out by its text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from sft.image_keys import NUM_KEYS

Ints = NDArray[np.int64]


class Side(IntEnum):
    """Where a sample belongs."""

    TRAIN = 0
    VALIDATION = 1
    NEITHER = 2


class HoldOut:
    """Which images and texts are held out: a share of all, or the images with some keys."""

    def __init__(self, share: float = 0.0, image_keys: Ints | None = None) -> None:
        self.share = share
        self.image_keys = image_keys

    def images(self, keys: Ints) -> NDArray[np.bool_]:
        """For the key of each image, whether it is held out."""
        if self.image_keys is not None:
            return np.isin(keys, self.image_keys)
        return np.asarray(keys < self.share * NUM_KEYS)

    def texts(self, texts: Iterable[bytes]) -> NDArray[np.bool_]:
        """For the text of each sample without images, whether it is held out."""
        return np.array([xxhash.xxh3_64_intdigest(text) < self.share * 2**64 for text in texts], dtype=np.bool_)

    def sides(self, texts: Iterable[bytes], image_keys: Ints, num_images: Ints) -> NDArray[np.int8]:
        """The side of each sample, by its text and by the keys of its images: those of all samples one after another,
        and how many each has. The texts are asked for only where a share is held out."""
        borders = np.concatenate(([0], np.cumsum(num_images)))
        num_held = np.diff(np.concatenate(([0], np.cumsum(self.images(image_keys))))[borders])
        sides = np.where(num_held == 0, Side.TRAIN, np.where(num_held == num_images, Side.VALIDATION, Side.NEITHER))
        if self.share:
            sides[(num_images == 0) & self.texts(texts)] = Side.VALIDATION
        return sides.astype(np.int8)


def texts_of(batches: Iterable[Any]) -> Iterator[bytes]:
    """The text of each sample in batches of a store's samples/: roles, lengths and characters of its messages, as they
    lie in memory one after another. Equal for equal messages, in whatever parts their text comes."""
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
    """Where each string of an Arrow array begins among the bytes of all, and where the last one ends."""
    return np.frombuffer(strings.buffers()[1], np.int32)[strings.offset : strings.offset + len(strings) + 1]


def _bytes(strings: Any) -> NDArray[np.uint8]:
    return np.frombuffer(strings.buffers()[2] or b"", np.uint8)
