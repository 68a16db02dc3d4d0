"""Model folders of IDEFICS (`sft.models.family.Weights`): its parameters by name, and a base whose vocabulary has
`<end_of_utterance>`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedConfig

from sft import models
from sft.models.family_folder import FamilyFolder
from sft.models.idefics import images
from sft.models.idefics.names import MODEL_TYPES
from sft.models.idefics.packed import PackedIdefics
from sft.models.idefics.text import END_OF_UTTERANCE, EXTRA_TOKENS, load_tokenizer
from sft.models.model_folder import check_weights, local_folder, new_base, weight_files, write_json

GATES = (".alpha_cross_attn", ".alpha_dense")

EXTRA_EMBEDDING = "model.embed_tokens.additional_embedding.weight"

EXTRA_HEAD = "lm_head.additional_fc.weight"

BASE_EMBEDDING = "model.embed_tokens.weight"

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class IdeficsFolder(FamilyFolder):
    """The folders of IDEFICS. The head computes in float32 in evaluation, and is always float32.

    Gates are found by their own names. Names of layers for adapters are anchored at the front:
    `layers.0.self_attn.q_proj` alone would hit the vision tower too, and `q_proj` everything. The head and the
    embedding are not among them: PEFT's adapters do not know of their extra rows.
    """

    model_types = MODEL_TYPES
    encoder_parts = ("vision_config", "use_resampler", "perceiver_config")
    groups = MappingProxyType(
        {
            "model.vision_model.": "vision",
            "model.perceiver_resampler.": "resampler",
            "model.layers.": "language",
            "model.norm.": "language",
            "model.gated_cross_attn_layers.": "cross_attention",
            "model.embed_tokens.additional_embedding.": "extra_rows",
            "model.embed_tokens.weight": "embeddings",
            "lm_head.additional_fc.": "extra_rows",
            "lm_head.": "head",
        }
    )
    lora_layers = MappingProxyType(
        {
            "vision.attention": r"model\.vision_model\.encoder\.layers\.\d+\.self_attn\.(q|k|v|out)_proj",
            "vision.mlp": r"model\.vision_model\.encoder\.layers\.\d+\.mlp\.fc[12]",
            "resampler.attention": r"model\.perceiver_resampler\.blocks\.\d+\.0\.(q|k|v|output)_proj",
            "resampler.mlp": r"model\.perceiver_resampler\.blocks\.\d+\.1\.(fc|c_proj)",
            "language.attention": r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
            "language.mlp": r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
            "cross_attention.attention": r"model\.gated_cross_attn_layers\.\d+\.cross_attn\.(q|k|v|o)_proj",
            "cross_attention.mlp": r"model\.gated_cross_attn_layers\.\d+\.mlp\.(gate|up|down)_proj",
        }
    )
    exact = ("lm_head.",)
    quantised = ("language", "cross_attention")
    """7.8 of the 8.9 billion parameters of idefics-9b. The tower, the resampler, the embedding and the head stay
    unquantised; 4 bits would save another 0.5 GB."""
    not_decayed = ("bias", "alpha", "layernorm", "ln", "layer_norm", "perceiver_resampler")
    """m4's config.py: gates and the whole resampler among them. The final `model.norm` and the tower's misspelt
    `pre_layrnorm` do not match and are decayed, as in 2023."""
    never_trained = ("model.vision_model.post_layernorm.",)
    """The tower's last hidden state is taken before this norm, so it never gets a gradient. Left trainable, it stops
    DDP ("Expected to have finished reduction") and leaves holes in optimizer states."""
    save_processor = staticmethod(images.save_processor)

    def model_class(self, config: PreTrainedConfig) -> type[PackedIdefics]:
        """Return the class of a model."""
        return PackedIdefics

    def group_of(self, name: str) -> str:
        """Return the group of a parameter, or fail as `FamilyFolder` says."""
        return "gates" if name.endswith(GATES) else super().group_of(name)

    def prepare_base(self, path: str | Path, output: Path, images: Mapping[str, Any] | None = None) -> None:
        """Write a base folder whose vocabulary has `<end_of_utterance>`, so that every engine loads a plain checkpoint.

        Only the shards that hold the extra rows are rewritten, the others are linked. The new row of the embedding and
        of the head is the mean of the base embedding rows (the method of HuggingFaceM4's update_model_embeds.py). A
        base that has the token already (an instruct model) is linked as it is. `resize_token_embeddings` cannot do
        this: it grows the *base* rows and throws the extra rows of the head away. There are no settings of `images`.

        Raises:
            UserError: the folder is not an IDEFICS model.
        """
        source = local_folder(path)
        config = models.read_config(source, self.model_types)
        check_weights(source, self.expected_weights(self.load_config(source)))
        with new_base(source, output, TOKENIZER_FILES) as folder:
            if config["additional_vocab_size"] == len(EXTRA_TOKENS) - 1:
                _grow_extra_rows(source, folder)
                config["additional_vocab_size"] += 1
            write_json(folder / "config.json", config)
            tokenizer = load_tokenizer(source)
            tokenizer.add_tokens([END_OF_UTTERANCE], special_tokens=True)
            tokenizer.save_pretrained(folder)


weights = IdeficsFolder()


def _grow_extra_rows(source: Path, output: Path) -> None:
    """Write the shards that hold the extra rows with one row more."""
    from safetensors.torch import load_file, save_file

    shards = weight_files(source)
    mean = load_file(source / shards[BASE_EMBEDDING])[BASE_EMBEDDING].float().mean(0, keepdim=True)
    for name in {shards[EXTRA_EMBEDDING], shards[EXTRA_HEAD]}:
        tensors = load_file(source / name)
        for key in (EXTRA_EMBEDDING, EXTRA_HEAD):
            if key in tensors:
                tensors[key] = torch.cat([tensors[key], mean.to(tensors[key].dtype)])
        save_file(tensors, output / name, metadata={"format": "pt"})
