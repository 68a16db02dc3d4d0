"""What the cost of a training depends on, besides the shape of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sft.cost.idefics.shapes import Part
from sft.models.idefics.names import GROUPS
from sft.recipe import EngineName, OptimizerName

Mode = Literal["full", "lora", "qlora"]
Precision = Literal["bfloat16", "float16", "float32"]
PARTS: tuple[Part, ...] = ("language", "cross_attention", "resampler", "vision")
"""Parts of the model that have linear layers; groups of the recipe too."""


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
    trainable: tuple[str, ...] | None = None
    """Groups of the recipe whose weights are trained. None: all of them in full training, the extra rows in LoRA."""
    lora_rank: int = 16
    lora_layers: tuple[str, ...] = tuple(f"{part}.{name}" for part in PARTS for name in ("q_proj", "k_proj", "v_proj"))
    """Linear layers that get an adapter, by part and name of `Shape.linears`; in LoRA only."""
    lora_dropout: float = 0.0
    optimizer: OptimizerName = "adamw"
    engine: EngineName = "ddp"
    gpus: int = 1
    checkpointing: float = 0.0
    """Share of the layers whose activations are computed again in the backward pass, layer by layer."""
    encoded: bool = False
    """Images come as what tower and resampler made of them before (`data.feature_cache`)."""
    accumulates: bool = True
    """More than one micro-batch a step: gradients are there while the next one runs."""
    precision: Precision = "bfloat16"
    """What is computed in."""

    @property
    def trained(self) -> tuple[str, ...]:
        """Groups whose weights are trained."""
        return (
            self.trainable if self.trainable is not None else tuple(GROUPS) if self.mode == "full" else ("extra_rows",)
        )

    @property
    def has_frozen(self) -> bool:
        """Whether any group is frozen: then its matrices are stored in half precision."""
        return not set(GROUPS) <= set(self.trained)
