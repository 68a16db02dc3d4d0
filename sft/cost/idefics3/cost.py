"""The costs of Idefics3 and SmolVLM, as `sft.cost.family.ModelCost`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from sft.core.shipped import resolve
from sft.cost.family import Cost, Setting
from sft.cost.idefics.cost import CountedCost, cost_of
from sft.cost.idefics3.shapes import InlineShape, shape_of
from sft.cost.model_config import load_model_config
from sft.models.idefics2.tilings import SizeSettings
from sft.models.idefics3.names import MODEL_TYPES
from sft.models.idefics3.tilings import TileSettings
from sft.models.preprocessor import read_preprocessor, with_settings

RELEASED = {
    **dict.fromkeys((f"HuggingFaceTB/SmolVLM-256M-{kind}" for kind in ("Base", "Instruct")), "smolvlm-256m.json"),
    **dict.fromkeys((f"HuggingFaceTB/SmolVLM-500M-{kind}" for kind in ("Base", "Instruct")), "smolvlm-500m.json"),
    **dict.fromkeys((f"HuggingFaceTB/SmolVLM-{kind}" for kind in ("Base", "Instruct")), "smolvlm-2.2b.json"),
    "HuggingFaceM4/Idefics3-8B-Llama3": "idefics3-8b.json",
}
"""Hub ids whose config is shipped in model_configs/."""

MARKERS = 2
"""Tokens of a tile besides its states, at least: a marker, its row and column."""


def read_model(path: str, images: Mapping[str, Any] | None = None) -> TiledCost:
    """Return what the model at a path costs, with `images` as `model.images` of a recipe says.

    Raises:
        UserError: there is no config.json, or it is of another family.
    """
    shape = shape_of(load_model_config(path, MODEL_TYPES, RELEASED))
    preprocessor = with_settings(read_preprocessor(resolve(path)), images or {})
    return TiledCost(shape, TileSettings.of(preprocessor, shape.image_size))


@dataclass(frozen=True)
class InlineCost(CountedCost):
    """What a model costs whose images are part of the text."""

    shape: InlineShape
    sizes: TileSettings | SizeSettings
    """How images are cut."""

    def num_tiles(self, width: int, height: int) -> int:
        """Return how many tiles an image of a size in pixels is cut into."""
        return self.sizes.tiling(width, height).num_tiles

    def cost(self, setting: Setting) -> Cost:
        """Return memory and operations of a training step on each GPU: of packs full of images or of packs of text
        alone, whichever take more memory. An image's tokens are not trained, and logits are large."""
        shape, tiles = self.mean_tile(setting)
        text = max(setting.tokens - tiles * (shape.states + MARKERS), 1)
        full = replace(setting, images=tiles, trained_tokens=min(setting.trained_tokens, text))
        one = replace(setting, images=1)  # the tile of a dummy
        return max((cost_of(shape, kind) for kind in (full, one)), key=lambda cost: cost.peak_bytes)

    def mean_tile(self, setting: Setting) -> tuple[InlineShape, int]:
        """Return the model with the mean tile of a micro-batch as its image, and how many tiles there are."""
        return self.shape, setting.image_weight or setting.images


class TiledCost(InlineCost):
    """What a model of Idefics3 or SmolVLM costs."""

    def fullest_images(self, tokens: int, image_weight: int) -> tuple[int, int]:
        """Return as many tiles as the tokens of a pack hold, or the cap allows, and how few images they can be."""
        tiles = min(image_weight, tokens // (self.shape.states + MARKERS))
        return ceil(tiles / self.num_tiles(1, 1)), tiles  # a square has most

    def image_tokens(self, width: int, height: int) -> int:
        """Return how many tokens the tiles of an image take at least."""
        return self.num_tiles(width, height) * (self.shape.states + MARKERS)
