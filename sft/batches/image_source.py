"""Where the images of a batch come from: prepared stores, files, or noise for checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from sft.core.images import read_bytes
from sft.core.sample import ImageRef, SkipSample, Tiling
from sft.data.reader import Reader
from sft.models.family import Images, Tiles
from sft.models.image_transform import load_tiles, tiling_of, training_crop


class ImageSource(Protocol):
    """The images of a batch by their numbers."""

    @property
    def images(self) -> Images:
        """How they are cut."""

    def tiling(self, image: int) -> Tiling:
        """Return how an image is cut, which is known even where it cannot be read any more."""

    def tiles(self, image: int) -> Tiles:
        """Return the tiles of an image.

        Raises:
            SkipSample: it cannot be read, or does not decode.
        """


@dataclass(frozen=True)
class StoredImages:
    """Images of prepared stores by their keys: whole, as evaluation sees them, or as an optimizer step does."""

    reader: Reader
    images: Images
    crop: tuple[int, int] | None = None
    """Seed and optimizer step, the first of which is 1, of a random crop; None: the whole image."""
    on_load: Callable[[int], None] = lambda image: None
    """Called with the key of each image before it is read."""
    on_failure: Callable[[int, SkipSample], None] = lambda image, skip: None
    """Called with the key of each image that fails, and why."""

    def tiling(self, image: int) -> Tiling:
        """Return how an image is cut, by the size that its store noted."""
        images = self.images
        return images.tiling(*self.reader.image_size(image)) if images.depends_on_size else images.one_tile

    def tiles(self, image: int) -> Tiles:
        """Return the tiles of an image, or fail as `ImageSource` says."""
        crop = None
        if self.crop is not None:
            seed, step = self.crop
            crop = partial(training_crop, seed=seed, step=step, image_key=image)
        self.on_load(image)
        try:
            content = self.reader.image_bytes(image)
            return load_tiles(content, self.images, crop, self.reader.decoding(image))
        except SkipSample as skip:
            self.on_failure(image, skip)
            raise


@dataclass(frozen=True)
class OpenedImages:
    """Images that are files or encoded bytes, by their places in a list; for evaluation."""

    refs: Sequence[ImageRef]
    images: Images

    def tiling(self, image: int) -> Tiling:
        """Return how an image is cut."""
        return tiling_of(self.refs[image], self.images)

    def tiles(self, image: int) -> Tiles:
        """Return the tiles of an image, or fail as `ImageSource` says."""
        return load_tiles(read_bytes(self.refs[image]), self.images, decoding=self.refs[image].decoding)


@dataclass(frozen=True)
class GivenImages:
    """Images of one tile each, which a function makes of their numbers; for checks, tests and benchmarks."""

    images: Images
    load: Callable[[int], Tiles]

    def tiling(self, image: int) -> Tiling:
        """Return the tiling of one tile."""
        return self.images.one_tile

    def tiles(self, image: int) -> Tiles:
        """Return the tile of an image, (1, C, H, W)."""
        return self.load(image)


@dataclass(frozen=True)
class NoiseImages:
    """Images of noise that depends on their numbers alone, for checks of a model."""

    images: Images

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the images: those of a tile, or of a wide image where that is fewer tiles."""
        width, height = self.images.one_tile.width, self.images.one_tile.height
        sizes = ((width, height), (width, max(height // 4, 1)))
        return min(sizes, key=lambda size: self.images.weight(self.images.tiling(*size)))

    def tiling(self, image: int) -> Tiling:
        """Return how an image is cut."""
        return self.images.tiling(*self.size)

    def tiles(self, image: int) -> Tiles:
        """Return the tiles of an image."""
        width, height = self.size
        noise = np.random.default_rng(image).integers(0, 256, (3, height, width), dtype=np.uint8)
        return self.images.cut(np.ascontiguousarray(noise.transpose(1, 2, 0)), self.tiling(image))
