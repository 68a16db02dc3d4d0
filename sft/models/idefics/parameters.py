"""Which parameters IDEFICS has: their groups, what is trained, where adapters stand, what is stored in 4 bits."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from sft.models.model_folder import choose_trainable, find_group, layer_pattern

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

NOT_DECAYED = ("bias", "alpha", "layernorm", "ln", "layer_norm", "perceiver_resampler")
"""Parameters whose name holds one of these are not decayed (m4's config.py): gates and the whole resampler among them.
The final `model.norm` and the tower's misspelt `pre_layrnorm` do not match and are decayed, as in 2023."""

QUANTISED = ("language", "cross_attention")
"""Groups whose weight matrices are stored in 4 bits: 7.8 of the 8.9 billion parameters of idefics-9b. The tower, the
resampler, the embedding and the head stay unquantised; 4 bits would save another 0.5 GB."""

EXACT = ("lm_head.",)
"""Matrices that are float32 wherever they are frozen, by the beginnings of their names."""


def group_of(name: str) -> str:
    """Return the group of a parameter; an adapter belongs to the group of its layer.

    Raises:
        KeyError: not a parameter of this model.
    """
    if name.endswith(GATES):
        return "gates"
    return find_group(name, GROUP_OF)


def lora_pattern(targets: Collection[str]) -> str:
    """Return a regular expression for the whole names of the linear layers that `model.lora.targets` names."""
    return layer_pattern(LORA_LAYERS, targets)


def select_trainable(model: nn.Module, groups: Collection[str] | None = None) -> tuple[str, ...]:
    """Make the weights of some groups (None: all) trainable, and adapters if there are any; freeze everything else.

    Returns the names of parameters of these groups that stay frozen, since they never get a gradient.
    """
    return choose_trainable(model, lambda name: groups is None or group_of(name) in groups, NEVER_TRAINED)


def is_decayed(name: str) -> bool:
    """Return whether weight decay acts on a parameter."""
    return not any(part in name for part in NOT_DECAYED)
