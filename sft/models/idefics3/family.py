"""Idefics3 and SmolVLM as a family: its parts, put together, and what is its own of model folders."""

from types import MappingProxyType

from sft.models.family import Family
from sft.models.idefics3 import text
from sft.models.idefics3.images import TiledImages
from sft.models.idefics3.names import MODEL_TYPES
from sft.models.idefics3.packed import model_class
from sft.models.inline_folder import LORA_LAYERS, InlineFolder


class TiledFolder(InlineFolder):
    """The folders of Idefics3 and SmolVLM, whose tower takes tiles of one size."""

    model_types = MODEL_TYPES
    text_type = "llama"
    encoder_parts = ("vision_config", "scale_factor", "preprocessor")
    lora_layers = MappingProxyType(LORA_LAYERS | {"connector": r"model\.connector\.modality_projection\.proj"})
    images = TiledImages
    load_tokenizer = staticmethod(text.load_tokenizer)
    model_class = staticmethod(model_class)


FAMILY = Family(name="idefics3", text=text, images=TiledImages, weights=TiledFolder())
