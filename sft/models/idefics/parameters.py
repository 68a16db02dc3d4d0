"""Which parameters IDEFICS has: their groups, what is trained, where adapters stand, what is stored in 4 bits."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from transformers import IdeficsConfig
from transformers import IdeficsForVisionText2Text as PlainIdefics

from sft.recipe import GROUPS

NEVER_TRAINED = ("model.vision_model.post_layernorm.",)
"""The tower's last hidden state is taken before this norm, so it never gets a gradient. Left trainable, it stops DDP
("Expected to have finished reduction") and leaves holes in optimizer states."""

GROUP_OF = {
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
"""The group of parameters that a name begins with; gates are found by their own names."""

GATES = (".alpha_cross_attn", ".alpha_dense")

LORA_LAYERS = {
    "vision.attention": r"model\.vision_model\.encoder\.layers\.\d+\.self_attn\.(q|k|v|out)_proj",
    "vision.mlp": r"model\.vision_model\.encoder\.layers\.\d+\.mlp\.fc[12]",
    "resampler.attention": r"model\.perceiver_resampler\.blocks\.\d+\.0\.(q|k|v|output)_proj",
    "resampler.mlp": r"model\.perceiver_resampler\.blocks\.\d+\.1\.(fc|c_proj)",
    "language.attention": r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
    "language.mlp": r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
    "cross_attention.attention": r"model\.gated_cross_attn_layers\.\d+\.cross_attn\.(q|k|v|o)_proj",
    "cross_attention.mlp": r"model\.gated_cross_attn_layers\.\d+\.mlp\.(gate|up|down)_proj",
}
"""Whole names of the linear layers that adapters can stand beside. Anchored at the front: `layers.0.self_attn.q_proj`
alone would hit the vision tower too, and `q_proj` everything. The head and the embedding are not among them: PEFT's
adapters do not know of their extra rows."""

QUANTISED = ("language", "cross_attention")
"""Groups whose weight matrices are stored in 4 bits: 7.8 of the 8.9 billion parameters of idefics-9b. The tower, the
resampler, the embedding and the head stay unquantised; 4 bits would save another 0.5 GB."""


def group_of(name: str) -> str:
    """The group of a parameter; an adapter belongs to the group of the layer beside which it stands.

    Raises:
        KeyError: not a parameter of this model.
    """
    if name.endswith(GATES):
        return "gates"
    matching = [group for start, group in GROUP_OF.items() if name.startswith(start)]
    if not matching:
        raise KeyError(name)
    return matching[0]


def lora_pattern(targets: Collection[str]) -> str:
    """A regular expression for the whole names of the linear layers that `model.lora.targets` names."""
    patterns = [pattern for name, pattern in LORA_LAYERS.items() if {name, name.partition(".")[0]} & set(targets)]
    return "|".join(f"({pattern})" for pattern in patterns)


def select_trainable(model: nn.Module, groups: Collection[str] = GROUPS) -> tuple[str, ...]:
    """Make the weights of some groups trainable, and adapters if there are any; freeze everything else.

    Returns the names of parameters of these groups that stay frozen, since they never get a gradient.
    `from_pretrained` silently resets what the config's freeze_* flags say, so this is done after every load.
    """
    frozen = []
    for name, parameter in model.named_parameters():
        of_adapter = ".lora_" in name
        asked = of_adapter or (group_of(name) in groups and ".base_layer." not in name)
        never = name.startswith(NEVER_TRAINED)
        if asked and never:
            frozen.append(name)
        parameter.requires_grad_(asked and not never)
    return tuple(frozen)


def image_cost_in_tokens(config: IdeficsConfig) -> float:
    """What an image costs, in text tokens: how often a weight is multiplied, beside how often for a token.

    A token goes through the language layers and the cross-attention layers. An image's patches go through the tower,
    its latents through the resampler, patches and latents through the resampler's keys and values, and the latents
    through the keys and values of every cross-attention layer. For idefics-9b:
    (257 * 629 M + 64 * 102 M + 321 * 24 M + 64 * 84 M) / (6.48 G + 1.35 G) = 23.
    Left out: attention scores, which are little at these lengths, and the head, which only trained positions see.
    """
    with torch.device("meta"):
        model = PlainIdefics(config).model

    def num(part: str, *names: str) -> int:
        """Weights of a part; of those layers only whose name is among `names`, if any are given."""
        layers = ((name.split(".")[-2], weight) for name, weight in model.get_submodule(part).named_parameters())
        return sum(weight.numel() for name, weight in layers if not names or name in names)

    keys_values = ("k_proj", "v_proj")
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1  # and the class token
    latents, image = patches, patches * num("vision_model.encoder")
    if config.use_resampler:
        latents = config.perceiver_config.resampler_n_latents
        read = num("perceiver_resampler.blocks", *keys_values)
        image += latents * (num("perceiver_resampler.blocks") - read) + (patches + latents) * read
    looked_at = num("gated_cross_attn_layers", *keys_values)
    image += latents * looked_at
    return float(image / (num("layers") + num("gated_cross_attn_layers") - looked_at))
