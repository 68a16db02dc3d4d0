"""Which layers compute their activations again in the backward pass, where `training.gradient_checkpointing` is a share
of them. Between all and none of them lies what memory there is to spare."""

from __future__ import annotations

from math import floor
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the formula of `plan` needs no torch
    from torch import nn


def is_recomputed(number: int, share: float) -> list[bool]:
    """For each of a row of layers, evenly spread. The last is the last to be: the backward pass begins with it, when
    everything else is still kept."""
    return [floor((number - i) * share) > floor((number - i - 1) * share) for i in range(number)]


def recompute_share(model: nn.Module, share: float) -> None:
    """Leave activation checkpointing on in a share of the layers of each part, after it was enabled in all."""
    from torch import nn
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layers in model.modules():
        if isinstance(layers, nn.ModuleList) and all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
            for layer, again in zip(layers, is_recomputed(len(layers), share), strict=True):
                layer.gradient_checkpointing = again  # type: ignore[assignment]
