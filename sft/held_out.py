"""What is held out of training: a function of content alone, so that it is the same in every source.

An image is held out by its hash. A sample is trained on when none of its images is held out, validates when all are,
and is used for neither when only some are: else one of its images would stand on both sides. A sample without images
is held out by its key.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

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

    def texts(self, keys: Iterable[str]) -> NDArray[np.bool_]:
        """For the key of each sample without images, whether it is held out."""
        return np.array([xxhash.xxh3_64_intdigest(key.encode()) < self.share * 2**64 for key in keys], dtype=np.bool_)

    def sides(self, keys: Iterable[str], image_keys: Ints, num_images: Ints) -> NDArray[np.int8]:
        """The side of each sample, by its key and by the keys of its images: those of all samples one after another,
        and how many each has."""
        borders = np.concatenate(([0], np.cumsum(num_images)))
        num_held = np.diff(np.concatenate(([0], np.cumsum(self.images(image_keys))))[borders])
        sides = np.where(num_held == 0, Side.TRAIN, np.where(num_held == num_images, Side.VALIDATION, Side.NEITHER))
        if self.share:
            sides[(num_images == 0) & self.texts(keys)] = Side.VALIDATION
        return sides.astype(np.int8)
