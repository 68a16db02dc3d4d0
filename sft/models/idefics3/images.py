"""Images as the tower of Idefics3 and SmolVLM takes them: cut into square tiles, each of them tokens of the text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import PreTrainedTokenizerFast

from sft.core.sample import Tiling
from sft.models.family import Pixels, Tiles
from sft.models.idefics3.text import FAKE, GLOBAL, IMAGE
from sft.models.idefics3.tilings import TileSettings
from sft.models.image_transform import resize_in_order
from sft.models.inline_model import InlineImages


@dataclass(frozen=True)
class TiledImages(InlineImages):
    """The images of a model."""

    shares_border = False

    @cached_property
    def tiles(self) -> TileSettings:
        """How images are cut."""
        return TileSettings.of(self.config.preprocessor, self.config.vision_config.image_size)

    @property
    def one_tile(self) -> Tiling:
        """The tiling of an image that is not split."""
        return Tiling(0, 0, self.tiles.tile, self.tiles.tile)

    @property
    def depends_on_size(self) -> bool:
        """Whether images of different sizes have different tilings: not where none is split."""
        return self.tiles.is_split

    @property
    def states_per_tile(self) -> int:
        """States that the connector makes of the patches of a tile."""
        return int((self.tiles.tile // self.config.vision_config.patch_size // self.config.scale_factor) ** 2)

    def tiling(self, width: int, height: int) -> Tiling:
        """Return how an image of a size in pixels is cut."""
        return self.tiles.tiling(width, height)

    def cut(self, pixels: Pixels, tiling: Tiling) -> Tiles:
        """Resize an image as the processors do, in two or three steps of Lanczos' filter, and cut it."""
        height, width, _ = pixels.shape
        tile, (rows, columns) = tiling.height, (tiling.rows or 1, tiling.columns or 1)
        width, height = self.tiles.scaled(width, height)
        image_1CHW = torch.from_numpy(pixels[None]).permute(0, 3, 1, 2)
        grid_1CHW = _lanczos(_lanczos(image_1CHW, height, width), rows * tile, columns * tile)
        cut = grid_1CHW.reshape(3, rows, tile, columns, tile).permute(1, 3, 0, 2, 4).flatten(0, 1)
        return torch.cat([cut, _lanczos(grid_1CHW, tile, tile)]).numpy() if tiling.rows else cut.numpy()

    def token_ids(self, tokenizer: PreTrainedTokenizerFast, tiling: Tiling) -> list[int]:
        """Return the ids of an image: for each tile a marker, its row and column, and its states. Rows and columns are
        a token each in some vocabularies, and plain text in others."""
        states = IMAGE * self.states_per_tile
        rows = (
            "".join(f"{FAKE}<row_{row + 1}_col_{column + 1}>{states}" for column in range(tiling.columns)) + "\n"
            for row in range(tiling.rows)
        )
        text = "".join(rows) + "\n" * bool(tiling.rows) + f"{FAKE}{GLOBAL}{states}{FAKE}"
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def weight(self, tiling: Tiling) -> int:
        """Return the tiles of an image."""
        return tiling.num_tiles

    def preprocessor(self) -> dict[str, Any]:
        """Return what preprocessor_config.json says of the sizes of images and of the kernel, which is Lanczos'."""
        size, max_image_size = {"longest_edge": self.tiles.longest_edge}, {"longest_edge": self.tiles.tile}
        return {"size": size, "max_image_size": max_image_size, "resample": 1}

    def settings(self) -> dict[str, Any]:
        """Return what the tokens of an image depend on."""
        return {**self.tiles._asdict(), "states": self.states_per_tile}

    @cached_property
    def cost_in_tokens(self) -> float:
        """The work of encoding a tile, in text tokens: how often a weight is multiplied, beside how often for a token.

        For SmolVLM-256M: (1,024 patches * 85 M + 64 states * 7 M) / 106 M = 824, so that an image of 640 x 480, which
        is 13 tiles, takes as much as 10,717 tokens. Left out: attention scores, and the head.
        """
        from sft.models.idefics3.packed import model_class

        with torch.device("meta"):
            model: Any = model_class(self.config)(self.config).model

        def weights(module: nn.Module) -> int:
            return sum(weight.numel() for weight in module.parameters())

        patches = (self.tiles.tile // self.config.vision_config.patch_size) ** 2
        image = patches * weights(model.vision_model.encoder) + self.states_per_tile * weights(model.connector)
        return float(image / weights(model.text_model.layers))


def _lanczos(image_1CHW: Tensor, height: int, width: int) -> Tensor:
    """Return an image resized by Lanczos' filter: by torch, within 2 / 255 of Pillow and several times as fast, or by
    Pillow where torch has no such kernel (before 2.12)."""
    if image_1CHW.shape[2:] == (height, width):
        return image_1CHW
    if not _torch_has_lanczos():
        image = Image.fromarray(image_1CHW[0].permute(1, 2, 0).numpy())
        resized_HWC = np.array(image.resize((width, height), Image.Resampling.LANCZOS))
        return torch.from_numpy(resized_HWC[None]).permute(0, 3, 1, 2)
    return resize_in_order(image_1CHW, height, width, "lanczos")


@lru_cache
def _torch_has_lanczos() -> bool:
    try:
        interpolate(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), size=(3, 3), mode="lanczos", antialias=True)
    except (NotImplementedError, ValueError, RuntimeError):
        return False
    return True
