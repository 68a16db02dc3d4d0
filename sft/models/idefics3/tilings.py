"""How an image of a size is cut, exactly as transformers' Idefics3 and SmolVLM processors do it.

An image is scaled until its longer edge is `longest_edge`, up or down, then to whole tiles, and cut. The last tile is a
small copy of the whole. An image that is not split is that copy alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any, NamedTuple

from sft.core.errors import UserError
from sft.core.sample import Tiling
from sft.models.preprocessor import PREPROCESSOR, read_edges

MAX_EDGE = 4096
"""No image is scaled over this edge (transformers' MAX_IMAGE_SIZE)."""


class TileSettings(NamedTuple):
    """What preprocessor_config.json says of tiles."""

    longest_edge: int
    """The longer edge that an image is scaled to, in pixels."""
    tile: int
    """Edge of a tile in pixels."""
    is_split: bool
    """Whether an image is cut into tiles."""

    @classmethod
    def of(cls, preprocessor: Mapping[str, Any], image_size: int) -> TileSettings:
        """Read the settings; what is left out is as in all released models, whose tower takes tiles of `image_size`
        pixels.

        Raises:
            UserError: tiles are of another size than that, or a setting is of another kind.
        """
        (longest_edge,) = read_edges(preprocessor, "size", longest_edge=4 * image_size)
        (tile,) = read_edges(preprocessor, "max_image_size", longest_edge=image_size)
        if tile != image_size:
            raise UserError(f"{PREPROCESSOR} cuts tiles of {tile} pixels, the vision tower takes {image_size}")
        return cls(longest_edge, tile, is_split=bool(preprocessor.get("do_image_splitting", True)))

    def scaled(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height after the first resize. The shorter edge becomes even, upwards."""
        aspect = width / height
        if width >= height:
            width, height = self.longest_edge, int(self.longest_edge / aspect)
            height += height % 2
        else:
            width, height = int(self.longest_edge * aspect), self.longest_edge
            width += width % 2
        width, height = max(width, 1), max(height, 1)
        aspect = width / height
        if width >= height and width > MAX_EDGE:
            width, height = MAX_EDGE, int(MAX_EDGE / aspect)
        elif height > width and height > MAX_EDGE:
            width, height = int(MAX_EDGE * aspect), MAX_EDGE
        return max(width, 1), max(height, 1)

    def tiling(self, width: int, height: int) -> Tiling:
        """Return how an image is cut."""
        rows = columns = 0
        if self.is_split:
            width, height = self.scaled(width, height)
            aspect = width / height
            if width >= height:
                columns = ceil(width / self.tile)
                rows = ceil(int(columns * self.tile / aspect) / self.tile)
            else:
                rows = ceil(height / self.tile)
                columns = ceil(int(rows * self.tile * aspect) / self.tile)
        return Tiling(*((rows, columns) if rows * columns > 1 else (0, 0)), self.tile, self.tile)
