"""IDEFICS-1 (9b, 80b and their instruct models): everything that is peculiar to it, as `ModelFamily` lists it.

The weights are those of `transformers.IdeficsForVisionText2Text`, on disk too.
"""

from sft.models.family import PackedOutput
from sft.models.idefics.base import EXTRA_EMBEDDING, EXTRA_HEAD, prepare_base
from sft.models.idefics.folders import (
    image_size,
    load_config,
    max_positions,
    states_of_image,
    tower_settings,
    weight_files,
    write_config,
)
from sft.models.idefics.loading import load_model, save_model
from sft.models.idefics.packed import PackedIdefics, plain_logits, use_grouped_attention
from sft.models.idefics.parameters import QUANTISED, group_of, image_cost_in_tokens, lora_pattern, select_trainable
from sft.models.idefics.pixels import CLIP_MEAN, CLIP_STD, normalise, save_processor
from sft.models.idefics.prompts import (
    ENDS,
    NEVER_WRITTEN,
    encode_prompt,
    generation_inputs,
    image_attention_mask,
)
from sft.models.idefics.tokens import (
    CHAT_TEMPLATE,
    END_OF_UTTERANCE,
    EXTRA_TOKENS,
    FAKE,
    IMAGE,
    golden_ids,
    load_tokenizer,
    num_rows,
    tokens_per_image,
)

__all__ = [
    "CHAT_TEMPLATE",
    "CLIP_MEAN",
    "CLIP_STD",
    "ENDS",
    "END_OF_UTTERANCE",
    "EXTRA_EMBEDDING",
    "EXTRA_HEAD",
    "EXTRA_TOKENS",
    "FAKE",
    "IMAGE",
    "NEVER_WRITTEN",
    "QUANTISED",
    "PackedIdefics",
    "PackedOutput",
    "encode_prompt",
    "generation_inputs",
    "golden_ids",
    "group_of",
    "image_attention_mask",
    "image_cost_in_tokens",
    "image_size",
    "load_config",
    "load_model",
    "load_tokenizer",
    "lora_pattern",
    "max_positions",
    "normalise",
    "num_rows",
    "plain_logits",
    "prepare_base",
    "save_model",
    "save_processor",
    "select_trainable",
    "states_of_image",
    "tokens_per_image",
    "tower_settings",
    "use_grouped_attention",
    "weight_files",
    "write_config",
]
