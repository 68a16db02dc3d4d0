"""The folders of Idefics3 and SmolVLM."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from transformers import PreTrainedConfig

from sft.core.errors import UserError
from sft.models.idefics3.images import TiledImages
from sft.models.idefics3.names import MODEL_TYPES
from sft.models.idefics3.packed import model_class
from sft.models.idefics3.text import load_tokenizer
from sft.models.inline_folder import InlineFolder
from sft.models.preprocessor import PREPROCESSOR


class TiledFolder(InlineFolder):
    """The folders of Idefics3 and SmolVLM, whose tower takes tiles of one size."""

    model_types = MODEL_TYPES
    text_type = "llama"
    encoder_parts = ("scale_factor",)
    connector_layers = MappingProxyType({"connector": r"model\.connector\.modality_projection\.proj"})
    images = TiledImages
    load_tokenizer = staticmethod(load_tokenizer)
    model_class = staticmethod(model_class)

    def load_config(self, path: str | Path) -> PreTrainedConfig:
        """Load the config of a model folder or hub id, with what its preprocessor_config.json says.

        Raises:
            UserError: as `InlineFolder.load_config`, or tiles are of another size than the tower takes.
        """
        config = super().load_config(path)
        tile, image_size = TiledImages(config).tiles.tile, config.vision_config.image_size
        if tile != image_size:
            raise UserError(f"{path}: {PREPROCESSOR} cuts tiles of {tile} pixels, the vision tower takes {image_size}")
        return config
