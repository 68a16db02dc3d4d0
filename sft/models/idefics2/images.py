"""Images as the tower of Idefics2 takes them: of many sizes, each image, or each quarter of it, tokens of the text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import Idefics2Model, PreTrainedTokenizerFast

from sft.core.sample import Tiling
from sft.models.family import Pixels, Tiles
from sft.models.idefics2.tilings import SizeSettings
from sft.models.idefics3.text import FAKE, IMAGE
from sft.models.image_transform import resize_in_order
from sft.models.inline_model import InlineImages


@dataclass(frozen=True)
class SizedImages(InlineImages):
    """The images of a model."""

    depends_on_size = True
    shares_border = True

    @cached_property
    def sizes(self) -> SizeSettings:
        """Which sizes images get."""
        return SizeSettings.of(self.config.preprocessor)

    @property
    def one_tile(self) -> Tiling:
        """The tiling of the smallest image, not split."""
        return Tiling(0, 0, self.sizes.shortest_edge, self.sizes.shortest_edge)

    @property
    def states_per_tile(self) -> int:
        """The latents of the perceiver."""
        return int(self.config.perceiver_config.resampler_n_latents)

    def tiling(self, width: int, height: int) -> Tiling:
        """Return how an image of a size in pixels is cut."""
        return self.sizes.tiling(width, height)

    def cut(self, pixels: Pixels, tiling: Tiling) -> Tiles:
        """Resize an image and its quarters, if it is split, by antialiased bilinear interpolation, each by itself."""
        tiles = np.zeros((tiling.num_tiles, 3, tiling.height, tiling.width), np.uint8)
        boxes = self.sizes.boxes(pixels.shape[1], pixels.shape[0])
        for tile, box, (height, width) in zip(tiles, boxes, tiling.tile_sizes, strict=True):
            image_1CHW = torch.from_numpy(pixels[box][None]).permute(0, 3, 1, 2)
            tile[:, :height, :width] = resize_in_order(image_1CHW, height, width, "bilinear")[0]
        return tiles

    def token_ids(self, tokenizer: PreTrainedTokenizerFast, tiling: Tiling) -> list[int]:
        """Return the ids of an image: a marker before the states of each tile, and one after the last."""
        fake, image = tokenizer.convert_tokens_to_ids([FAKE, IMAGE])
        return [*([fake] + [image] * self.states_per_tile) * tiling.num_tiles, fake]

    def weight(self, tiling: Tiling) -> int:
        """Return the patches of an image: of 64 states each, tiles take the tower from 729 to 4,900 patches."""
        patch = self.config.vision_config.patch_size
        return sum((height // patch) * (width // patch) for height, width in tiling.tile_sizes)

    def preprocessor(self) -> dict[str, Any]:
        """Return what preprocessor_config.json says of the sizes of images and of the kernel, which is bilinear."""
        size = {"longest_edge": self.sizes.longest_edge, "shortest_edge": self.sizes.shortest_edge}
        return {"size": size, "do_image_splitting": self.sizes.is_split, "resample": 2}

    def settings(self) -> dict[str, Any]:
        """Return what tokens and weight of an image depend on."""
        return {**self.sizes._asdict(), "states": self.states_per_tile, "patch": self.config.vision_config.patch_size}

    @cached_property
    def cost_in_tokens(self) -> float:
        """The work of encoding a patch, in text tokens: how often a weight is multiplied, beside how often for a token.

        For Idefics2-8b: (411 M of the tower + 92 M of the MLP) / 6,979 M = 0.072, so that an image of 640 x 480, which
        is 1,530 patches, takes as much as 110 tokens. Left out: attention scores, the perceiver, and the head.
        """
        with torch.device("meta"):
            model: Any = Idefics2Model(self.config)
        parts = (model.vision_model.encoder, model.connector.modality_projection, model.text_model.layers)
        tower, projection, text = (sum(weight.numel() for weight in part.parameters()) for part in parts)
        return float((tower + projection) / text)
