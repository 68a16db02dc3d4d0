"""The folders of Idefics2."""

from __future__ import annotations

from types import MappingProxyType

from sft.models.idefics2.images import SizedImages
from sft.models.idefics2.packed import model_class
from sft.models.idefics2.text import load_tokenizer
from sft.models.inline_folder import InlineFolder


class SizedFolder(InlineFolder):
    """The folders of Idefics2, whose connector is a gated MLP and a perceiver."""

    model_types = ("idefics2",)
    text_type = "mistral"
    encoder_parts = ("perceiver_config",)
    connector_layers = MappingProxyType(
        {
            "connector.attention": r"model\.connector\.perceiver_resampler\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
            "connector.mlp": (
                r"model\.connector\.(modality_projection|perceiver_resampler\.layers\.\d+\.mlp)\.(gate|up|down)_proj"
            ),
        }
    )
    not_decayed = (*InlineFolder.not_decayed, "perceiver_resampler")
    images = SizedImages
    load_tokenizer = staticmethod(load_tokenizer)
    model_class = staticmethod(model_class)
