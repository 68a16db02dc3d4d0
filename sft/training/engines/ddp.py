"""DDP: every process has the whole model, its gradients and the optimizer's states; gradients are averaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sft.core.distributed import TIMEOUT
from sft.training.engines import TrainedModel, Writers, get_engine
from sft.training.engines.resume_state import load_state as load_whole
from sft.training.engines.resume_state import save_state

__all__ = ["load_whole"]

KEEPS_GRADIENTS = True


def check_installed() -> None:
    """Do nothing: torch is all that it takes."""


def check_precision(precision: str) -> None:
    """Do nothing: it trains in every precision."""


def check_state(checkpoint: Path, *, written_by: int, read_by: int) -> None:
    """Do nothing: any number of processes reads the whole state."""


def arguments(*, clip: float, precision: str, convert: bool) -> dict[str, Any]:
    """Return DDP's settings. Every parameter gets a gradient on every rank, by the dummies of sft.batches.collate."""
    return {
        "ddp_timeout": int(TIMEOUT.total_seconds()),
        "use_cpu": not torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
    }


def shard(model: nn.Module, precision: str) -> None:
    """Do nothing: the model stays whole."""


def check_prepared(model: nn.Module) -> None:
    """Do nothing: a process alone trains the bare model."""


def own_shard(tensor: Tensor) -> Tensor:
    """Return the tensor, which is whole."""
    return tensor


def gradient_norm(trainer: TrainedModel, norm: Any) -> Any:
    """Return the norm as it is."""
    return norm


def gather_weights(trainer: TrainedModel) -> dict[str, Tensor] | None:
    """Return None: every process has the whole weights."""
    return None


def save(trainer: TrainedModel, folder: Path) -> None:
    """Write everything in the main process."""
    if trainer.rank.is_main:
        save_state(folder, trainer.unwrapped, trainer.bare_optimizer)


def load(trainer: TrainedModel, folder: Path, written_by: Writers) -> None:
    """Read everything in each process, whichever engine has written it."""
    writer = get_engine(written_by.engine)
    writer.load_whole(folder, trainer.unwrapped, trainer.bare_optimizer, trainer.rank)
