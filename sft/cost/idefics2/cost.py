"""The costs of Idefics2, as `sft.cost.family.ModelCost`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from sft.core.shipped import resolve
from sft.cost.family import Setting
from sft.cost.idefics.shapes import LayerGroup, Linear
from sft.cost.idefics3.cost import InlineCost
from sft.cost.idefics3.shapes import InlineShape, common_sizes
from sft.cost.model_config import load_model_config
from sft.models.idefics2.tilings import SizeSettings
from sft.models.preprocessor import read_preprocessor, with_settings

RELEASED = dict.fromkeys((f"HuggingFaceM4/idefics2-8b{kind}" for kind in ("", "-base", "-chatty")), "idefics2-8b.json")
"""Hub ids whose config is shipped in model_configs/."""


def read_model(path: str, images: Mapping[str, Any] | None = None) -> SizedCost:
    """Return what the model at a path costs, with `images` as `model.images` of a recipe says.

    Raises:
        UserError: there is no config.json, or it is of another family.
    """
    shape = shape_of(load_model_config(path, ("idefics2",), RELEASED))
    return SizedCost(shape, SizeSettings.of(with_settings(read_preprocessor(resolve(path)), images or {})))


@dataclass(frozen=True, kw_only=True)
class SizedShape(InlineShape):
    """The sizes of a model, and those of a tile."""

    tile_patches: int

    @property
    def patches(self) -> int:
        """Patches of a tile, of which some have more and some fewer."""
        return self.tile_patches

    def _connector(self) -> Iterator[Linear]:
        D, E, F, blocks = self.hidden, self.vision_hidden, self.intermediate, self.resampler_layers
        heads, shared = self.resampler_heads * self.resampler_head, self.perceiver_key_values
        for name in ("gate_proj", "up_proj"):
            yield Linear("resampler", name, E, F, "patches", 1)
            yield Linear("resampler", name, D, 4 * D, "latents", blocks)
        yield Linear("resampler", "down_proj", F, D, "patches", 1)
        yield Linear("resampler", "down_proj", 4 * D, D, "latents", blocks)
        yield Linear("resampler", "q_proj", D, heads, "latents", blocks)
        for name in ("k_proj", "v_proj"):
            yield Linear("resampler", name, D, shared, "context", blocks)
        yield Linear("resampler", "o_proj", heads, D, "latents", blocks)

    def _other_parameters(self, group: LayerGroup) -> int:
        """Return the norms, biases, latents and embeddings of a group."""
        perceiver = self.hidden * (3 * self.resampler_layers + self.resampler_latents + 1)
        return perceiver if group == "resampler" else super()._other_parameters(group)


@dataclass(frozen=True)
class SizedCost(InlineCost):
    """What a model of Idefics2 costs."""

    shape: SizedShape
    sizes: SizeSettings

    def mean_tile(self, setting: Setting) -> tuple[InlineShape, int]:
        """Return the model with the mean tile of a micro-batch as its image, and how many tiles there are."""
        tiles = self.num_tiles(1, 1) * setting.images
        return replace(self.shape, tile_patches=ceil((setting.image_weight or 0) / max(tiles, 1))), tiles

    def fullest_images(self, tokens: int, image_weight: int) -> tuple[int, int]:
        """Return as many images as the tokens of a pack hold, and as many patches as the cap allows."""
        edges = (self.sizes.shortest_edge, self.sizes.longest_edge)
        least, most = (self.num_tiles(1, 1) * (edge // self.shape.patch_size) ** 2 for edge in edges)
        images = min(tokens // self.image_tokens(1, 1), image_weight // least)
        return images, min(image_weight, images * most)

    def image_tokens(self, width: int, height: int) -> int:
        """Return how many tokens an image takes, whatever its size."""
        return self.num_tiles(width, height) * (self.shape.states + 1) + 1


def shape_of(values: Mapping[str, Any]) -> SizedShape:
    """Return the shape of a model from the values of its config.json; those left out have transformers' defaults."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(**values)
    vision, perceiver = config.vision_config, config.perceiver_config
    return SizedShape(
        **common_sizes(config),
        tile_patches=(vision.image_size // vision.patch_size) ** 2,
        resampler_layers=perceiver.resampler_depth,
        resampler_heads=perceiver.resampler_n_heads,
        resampler_head=perceiver.resampler_head_dim,
        resampler_latents=perceiver.resampler_n_latents,
        perceiver_key_values=perceiver.num_key_value_heads * perceiver.resampler_head_dim,
    )
