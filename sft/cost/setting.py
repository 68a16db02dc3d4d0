"""What the cost of a training depends on, besides the shape of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["full", "lora", "qlora"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
Engine = Literal["ddp", "zero3", "fsdp2"]
Precision = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One way to train: what is trained, how, on how many GPUs, and the largest micro-batch."""

    tokens: int
    """Of a micro-batch: all its packs, full."""
    images: int
    """Distinct images of a micro-batch, at the recipe's cap."""
    trained_tokens: int
    """Positions of a micro-batch that reach the head."""
    mode: Mode = "full"
    lora_rank: int = 16
    lora_parts: tuple[str, ...] = ("language", "cross_attention", "resampler", "vision")
    """Where adapters are: parts of `Shape.linears`."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Names of the linear layers that get an adapter."""
    lora_dropout: float = 0.0
    optimizer: Optimizer = "adamw"
    engine: Engine = "ddp"
    gpus: int = 1
    checkpointing: bool = False
    """Activations are computed again in the backward pass, layer by layer."""
    accumulates: bool = True
    """More than one micro-batch a step: gradients are there while the next one runs."""
    precision: Precision = "bfloat16"
    """What is computed in."""
