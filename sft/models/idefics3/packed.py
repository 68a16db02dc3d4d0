"""Idefics3 and SmolVLM with a forward over packed micro-batches. Their tiles are square, all of one size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Idefics3ForConditionalGeneration, PreTrainedConfig, SmolVLMForConditionalGeneration

from sft.core.sample import Tiling
from sft.models.inline_model import InlineModel, normalise


class _SquareTiles(InlineModel):
    def encode_images(self, tiles: Sequence[Tensor], tilings: Sequence[Tiling]) -> Tensor:
        """Return the states (R, E) of images: one call of the tower and one of the connector for all tiles."""
        (tiles_KCHW,) = tiles
        tower = self.model.vision_model
        hidden_KPD = tower(pixel_values=normalise(tiles_KCHW).to(tower.dtype)).last_hidden_state
        return torch.as_tensor(self.model.connector(hidden_KPD)).flatten(0, 1)


class PackedIdefics3(_SquareTiles, Idefics3ForConditionalGeneration):  # type: ignore[misc]  # transformers is not typed
    """Idefics3 with a forward for packed micro-batches: `model(batch=batch)`. Anything else goes to transformers."""

    shard_units = ("Idefics3EncoderLayer", "LlamaDecoderLayer")


class PackedSmolVLM(_SquareTiles, SmolVLMForConditionalGeneration):  # type: ignore[misc]  # transformers is not typed
    """SmolVLM with a forward for packed micro-batches: `model(batch=batch)`. Anything else goes to transformers."""

    shard_units = ("SmolVLMEncoderLayer", "LlamaDecoderLayer")


def model_class(config: PreTrainedConfig) -> type[InlineModel]:
    """Return the class of a model."""
    return PackedSmolVLM if config.model_type == "smolvlm" else PackedIdefics3
