"""The costs of Idefics3 and SmolVLM, as `sft.cost.family.ModelCost`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from sft.core.shipped import resolve
from sft.cost.family import Cost, Setting
from sft.cost.idefics.cost import cost_of
from sft.cost.idefics.trained_model import TrainedModel
from sft.cost.idefics3.shapes import InlineShape, TiledShape, shape_of
from sft.cost.model_config import load_model_config
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
class InlineCost:
    """What a model costs whose images are part of the text."""

    shape: InlineShape

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        return self.shape.parameters

    def cost(self, setting: Setting) -> Cost:
        """Return memory and operations of a training step on each GPU: of packs full of images or of packs of text
        alone, whichever take more memory. An image's tokens are not trained, and logits are large."""
        shape, tiles = self.mean_tile(setting)
        text = max(setting.tokens - tiles * (shape.states + MARKERS), 1)
        full = replace(setting, images=tiles, trained_tokens=min(setting.trained_tokens, text))
        one = replace(setting, images=1)  # the tile of a dummy
        return max((cost_of(_counted(shape, kind)) for kind in (full, one)), key=lambda cost: cost.peak_bytes)

    def mean_tile(self, setting: Setting) -> tuple[InlineShape, int]:
        """Return the model with the mean tile of a micro-batch as its image, and how many tiles there are."""
        return self.shape, setting.image_weight or setting.images

    def trained_parameters(self, setting: Setting) -> int:
        """Return how many parameters get a gradient, those of adapters included."""
        return sum(_counted(self.shape, setting).trained.values())

    def lora_layers(self, targets: Collection[str]) -> tuple[str, ...]:
        """Return the linear layers that `model.lora.targets` names, as `group.layer`."""
        asked = {_counted_as(target) for target in targets}
        return tuple(linear.layer for linear in self.shape.linears if {linear.group, linear.target} & asked)


@dataclass(frozen=True)
class TiledCost(InlineCost):
    """What a model of Idefics3 or SmolVLM costs."""

    shape: TiledShape
    tiles: TileSettings

    def fullest_images(self, tokens: int, image_weight: int) -> tuple[int, int]:
        """Return as many tiles as the tokens of a pack hold, or the cap allows, and how few images they can be."""
        tiles = min(image_weight, tokens // (self.shape.states + MARKERS))
        largest = self.tiles.tiling(1, 1).num_tiles  # a square
        return ceil(tiles / largest), tiles

    def image_tokens(self, width: int, height: int) -> int:
        """Return how many tokens the tiles of an image take at least."""
        return self.tiles.tiling(width, height).num_tiles * (self.shape.states + MARKERS)

    def feature_bytes(self, width: int, height: int) -> int:
        """Return the bytes of an image in the feature cache: its states in float16."""
        return 2 * self.tiles.tiling(width, height).num_tiles * self.shape.states * self.shape.state_size


def _counted(shape: InlineShape, setting: Setting) -> TrainedModel:
    """Return a model whose connector is counted as a resampler."""
    trainable = setting.trainable and tuple(_counted_as(group) for group in setting.trainable)
    return TrainedModel(shape, replace(setting, trainable=trainable))


def _counted_as(group: str) -> str:
    return group.replace("connector", "resampler")
