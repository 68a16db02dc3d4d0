"""DDP: every process has the whole model, its gradients and the optimizer's states; gradients are averaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sft.core.distributed import TIMEOUT
from sft.training.engines import Writers, sharded_state, universal
from sft.training.engines.resume_state import load_state, save_state

KEEPS_GRADIENTS = True
READS = ("ddp", "fsdp2", "zero3")


def check(mode: str, optimizer: str) -> None:
    """It can do everything."""


def check_precision(precision: str) -> None:
    """It trains in every precision."""


def arguments(*, clip: float, precision: str, convert: bool) -> dict[str, Any]:
    """Every parameter gets a gradient on every rank: sft.batches.collate's dummies see to it."""
    return {
        "ddp_timeout": int(TIMEOUT.total_seconds()),
        "use_cpu": not torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
    }


def share_out(model: nn.Module, precision: str) -> None:
    """Nothing is shared out."""


def check_prepared(model: nn.Module) -> None:
    """Alone a process trains the bare model."""


def own_part(tensor: Tensor) -> Tensor:
    """All of it."""
    return tensor


def gradient_norm(trainer: Any, norm: Any) -> Any:
    """As it is."""
    return norm


def gathered(trainer: Any) -> dict[str, Tensor] | None:
    """They are whole."""
    return None


def save(trainer: Any, folder: Path) -> None:
    """The main process writes it all."""
    if trainer.rank.is_main:
        save_state(folder, trainer.unwrapped, trainer.optimizer)


def load(trainer: Any, folder: Path, written_by: Writers) -> None:
    """Each process reads it all, whatever engine has written it."""
    match written_by.engine:
        case "ddp":
            load_state(folder, trainer.unwrapped, trainer.optimizer)
        case "fsdp2":
            sharded_state.load(folder, trainer.unwrapped, trainer.bare_optimizer)
        case "zero3":
            universal.load(folder, trainer.unwrapped, trainer.bare_optimizer, trainer.rank)
