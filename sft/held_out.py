"""What is held out of training: a function of content alone, so that it is the same in every source.

An image is held out by its hash. A sample is trained on when none of its images is held out, validates when all are,
and is used for neither when only some are: else one of its images would stand on both sides. A sample without images
is held out by its key.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import xxhash
from numpy.typing import NDArray

from sft.errors import UserError


class Side(IntEnum):
    """Where a sample belongs."""

    TRAIN = 0
    VALIDATION = 1
    NEITHER = 2


@dataclass(frozen=True)
class HoldOut:
    """Which images and texts are held out."""

    share: float = 0.0
    hashes: Collection[str] = frozenset()
    """sha256 of images that are held out whatever their share."""

    def images(self, hashes: Iterable[str]) -> NDArray[np.bool_]:
        """For each image, whether it is held out."""
        return np.array([h in self.hashes or int(h[:16], 16) < self.share * 2**64 for h in hashes], dtype=np.bool_)

    def texts(self, keys: Iterable[str]) -> NDArray[np.bool_]:
        """For each key of a sample without images, whether it is held out."""
        return np.array([xxhash.xxh3_64_intdigest(key.encode()) < self.share * 2**64 for key in keys], dtype=np.bool_)

    def sides(
        self,
        keys: Sequence[str],
        image_hashes: Sequence[str],
        image_rows: NDArray[np.int64],
        offsets: NDArray[np.int64],
    ) -> NDArray[np.int8]:
        """The side of each sample of a dataset, whose images are `image_rows[offsets[i]:offsets[i + 1]]`."""
        num_images = np.diff(offsets)
        is_held = self.images(image_hashes)[image_rows] if len(image_rows) else np.empty(0, dtype=np.bool_)
        num_held = np.diff(np.concatenate(([0], np.cumsum(is_held)))[offsets])
        sides = np.where(num_held == 0, Side.TRAIN, np.where(num_held == num_images, Side.VALIDATION, Side.NEITHER))
        text = np.flatnonzero(num_images == 0)
        sides[text[self.texts(keys[row] for row in text.tolist())]] = Side.VALIDATION
        return sides.astype(np.int8)


def check_not_empty(name: str, sides: NDArray[np.int8]) -> None:
    """
    Raises:
        UserError: nothing of a source is left to train on.
    """
    if not (sides == Side.TRAIN).any():
        raise UserError(f"source {name!r}: data.validation holds out all of its {len(sides):,} samples")
