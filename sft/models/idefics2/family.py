"""Idefics2 as a family: its parts, put together, and what is its own of model folders."""

from types import MappingProxyType

from sft.models.family import Family
from sft.models.idefics2 import text
from sft.models.idefics2.images import SizedImages
from sft.models.idefics2.packed import PackedIdefics2
from sft.models.inline_folder import LORA_LAYERS, InlineFolder


class SizedFolder(InlineFolder):
    """The folders of Idefics2, whose connector is a gated MLP and a perceiver."""

    model_types = ("idefics2",)
    text_type = "mistral"
    encoder_parts = ("vision_config", "perceiver_config", "preprocessor")
    lora_layers = MappingProxyType(
        LORA_LAYERS
        | {
            "connector.attention": r"model\.connector\.perceiver_resampler\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
            "connector.mlp": (
                r"model\.connector\.(modality_projection|perceiver_resampler\.layers\.\d+\.mlp)\.(gate|up|down)_proj"
            ),
        }
    )
    not_decayed = (*InlineFolder.not_decayed, "perceiver_resampler")
    images = SizedImages
    load_tokenizer = staticmethod(text.load_tokenizer)
    model_class = staticmethod(lambda config: PackedIdefics2)


FAMILY = Family(name="idefics2", text=text, images=SizedImages, weights=SizedFolder())
