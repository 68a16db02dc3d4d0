"""The size that an image gets, exactly as transformers' Idefics2 processor has it.

An image is scaled down until its longer edge is at most `longest_edge`; then an edge that is shorter than
`shortest_edge` becomes that long, whatever the shape. An image that is split is five: four quarters of the image as it
came, each scaled by itself, and the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

from sft.core.errors import UserError
from sft.core.sample import Tiling
from sft.models.preprocessor import PREPROCESSOR, read_edges


class SizeSettings(NamedTuple):
    """What preprocessor_config.json says of sizes."""

    longest_edge: int
    shortest_edge: int
    is_split: bool

    @classmethod
    def of(cls, preprocessor: Mapping[str, Any]) -> SizeSettings:
        """Read the settings; what is left out is as in the released models.

        Raises:
            UserError: the shortest edge is the longer one, or a setting is of another kind.
        """
        longest, shortest = read_edges(preprocessor, "size", longest_edge=980, shortest_edge=378)
        if shortest > longest:
            raise UserError(f"{PREPROCESSOR}: shortest_edge {shortest} is over longest_edge {longest}")
        return cls(longest, shortest, bool(preprocessor.get("do_image_splitting", True)))

    def scaled(self, width: int, height: int) -> tuple[int, int]:
        """Return height and width after the resize."""
        aspect = width / height
        if width >= height and width > self.longest_edge:
            width, height = self.longest_edge, int(self.longest_edge / aspect)
        elif height > self.longest_edge:
            width, height = int(self.longest_edge * aspect), self.longest_edge
        return max(height, self.shortest_edge), max(width, self.shortest_edge)

    def boxes(self, width: int, height: int) -> list[tuple[slice, slice]]:
        """Return the rows and columns that each tile shows. Halves of a single pixel, of which the processor makes
        nothing and stops, are that pixel."""
        whole = (slice(height), slice(width))
        return [*(product(_halves(height), _halves(width)) if self.is_split else ()), whole]

    def tiling(self, width: int, height: int) -> Tiling:
        """Return how an image is cut."""
        sizes = tuple(
            self.scaled(columns.stop - (columns.start or 0), rows.stop - (rows.start or 0))
            for rows, columns in self.boxes(width, height)
        )
        height, width = map(max, zip(*sizes, strict=True))
        return Tiling(2, 2, height, width, sizes) if self.is_split else Tiling(0, 0, height, width)


def _halves(length: int) -> tuple[slice, slice]:
    middle = length // 2
    return slice(max(middle, 1)), slice(min(middle, length - 1), length)
