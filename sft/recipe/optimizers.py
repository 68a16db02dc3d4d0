"""The optimizers that `training.optimizer` can name. A row of OPTIMIZERS is all that it takes to add one.

The recipe's choices and their documentation, the memory that `plan` counts, the room that checkpoints need, the advice
when memory is short and what sharded engines refuse all follow from the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import nn

    from sft.recipe.config import TrainingConfig

Groups = Sequence[dict[str, Any]]
"""Groups of parameters, each with its learning rate and weight decay, as torch's optimizers take them."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """One optimizer: how it is made, and what its states take."""

    meaning: str
    """What it is, for the reference of recipe keys."""
    make: Callable[[Groups, TrainingConfig, nn.Module, bool], torch.optim.Optimizer]
    """Makes it over the groups of a model. The last argument tells whether gradients come from a gradient scaler."""
    bytes_per_parameter: float
    """Bytes of its states for each trained parameter."""
    bytes_per_line: float = 0.0
    """Bytes of its states for each row and each column of a matrix, and for each number of a vector."""
    bytes_per_embedding_parameter: float | None = None
    """The same as `bytes_per_parameter` for the embedding, where that differs."""
    is_paged: bool = False
    """Its states move to main memory when the GPU's is short; `plan` counts nothing for them."""
    is_shardable: bool = False
    """Whether engines that shard the model can shard and save its states (AdamW's two moments and a step)."""
    needs_bitsandbytes: bool = False

    @property
    def gpu_bytes_per_parameter(self) -> float:
        """Bytes a parameter that its states take of the GPU when memory is short."""
        return 0.0 if self.is_paged else self.bytes_per_parameter


def _make_adamw(groups: Groups, settings: TrainingConfig, model: nn.Module, is_scaled: bool) -> torch.optim.Optimizer:
    import torch

    # A gradient scaler leaves a step out by not calling the optimizer, which accelerate notices; it calls fused AdamW
    # all the same, and the step would look as if it had been made.
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=not is_scaled)


def _make_adamw_8bit(
    groups: Groups, settings: TrainingConfig, model: nn.Module, is_scaled: bool, *, paged: bool = False
) -> torch.optim.Optimizer:
    from bitsandbytes import optim  # takes a second to import, and most trainings do not need it
    from torch import cuda, nn

    # Rows of an embedding are updated rarely, so its states stay float32, as bitsandbytes advises. Tensors of fewer
    # than 4,096 elements keep float32 states too, by bitsandbytes' own default.
    manager = optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    kind = optim.PagedAdamW8bit if paged and cuda.is_available() else optim.AdamW8bit
    optimizer: torch.optim.Optimizer = kind(groups, lr=settings.learning_rate, betas=settings.betas)
    return optimizer


def _make_adafactor(
    groups: Groups, settings: TrainingConfig, model: nn.Module, is_scaled: bool
) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    # torch's own Adafactor always scales an update by the root mean square of its tensor, at least 1e-3 (torch 2.13):
    # gates and adapters, which begin at zero, would hardly move. With the two switches off, the recipe's learning rates
    # mean what they mean for AdamW.
    optimizer: torch.optim.Optimizer = Adafactor(
        groups, lr=settings.learning_rate, scale_parameter=False, relative_step=False
    )
    return optimizer


_EIGHT_BIT_STATES = 2 * (1 + 4 / 256)
"""Bytes a parameter of Adam's two states in 8 bits: a float32 scale for 256 numbers (bitsandbytes' blockwise kind)."""

OPTIMIZERS = {
    "adamw": Optimizer(
        meaning="AdamW, fused; 8 bytes of states a parameter",
        make=_make_adamw,
        bytes_per_parameter=8,
        is_shardable=True,
    ),
    "adamw_8bit": Optimizer(
        meaning="AdamW with states in 8 bits, but float32 for embeddings and for tensors under 4,096 elements; "
        "a quarter of the memory",
        make=_make_adamw_8bit,
        bytes_per_parameter=_EIGHT_BIT_STATES,
        bytes_per_embedding_parameter=8,
        needs_bitsandbytes=True,
    ),
    "paged_adamw_8bit": Optimizer(
        meaning="the same, and states move to main memory when the GPU is full; without a GPU it is `adamw_8bit`",
        make=partial(_make_adamw_8bit, paged=True),
        bytes_per_parameter=_EIGHT_BIT_STATES,
        bytes_per_embedding_parameter=8,
        is_paged=True,
        needs_bitsandbytes=True,
    ),
    "adafactor": Optimizer(
        meaning="Adafactor without momentum; the second moment of a matrix is kept as a number for each row and each "
        "column, which takes next to no memory; `betas` are not used",
        make=_make_adafactor,
        bytes_per_parameter=0,
        bytes_per_line=4,
    ),
}

if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]


def lighter_optimizers(name: OptimizerName) -> list[OptimizerName]:
    """Return the optimizers whose states take less of the GPU than those of `name`, the heaviest first."""
    sizes = {other: optimizer.gpu_bytes_per_parameter for other, optimizer in OPTIMIZERS.items()}
    return sorted((other for other in sizes if sizes[other] < sizes[name]), key=sizes.__getitem__, reverse=True)
