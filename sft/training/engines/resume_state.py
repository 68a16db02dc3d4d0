"""The `state/` of a checkpoint: what training needs to continue with the next step as if it had never stopped.

    trained.safetensors   the trained weights, exactly: float32, where the weight snapshot is rounded to bfloat16
    optimizer.pt          the optimizer's tensors; read with `weights_only=True`, after their hash matched
    progress.json         everything else: who wrote it, step, schedule, scaler, place in the data, what was spent

Engines that shard a model have files of their own in place of the first two (`sft.training.engines`).

Random numbers are not saved: torch is seeded anew in every micro-step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from sft.core.distributed import ALONE, Rank
from sft.core.errors import UserError

TRAINED, OPTIMIZER, PROGRESS = "trained.safetensors", "optimizer.pt", "progress.json"


class Spent(TypedDict):
    """What a run has spent so far, breaks not counted."""

    tokens: int
    seconds: float
    cpu_seconds: float


class Progress(TypedDict):
    """The content of progress.json."""

    engine: NotRequired[str]
    processes: NotRequired[int]
    step: int
    schedule: dict[str, Any]
    """The state of the learning-rate schedule, by torch."""
    scaler: dict[str, Any] | None
    """The state of the gradient scaler, by torch."""
    data: dict[str, Any]
    """The place in the data, by `MicroBatches.state`."""
    spent: Spent
    sources: str
    """The fingerprint of the prepared sources."""


def save_state(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Write the trained weights and the optimizer of a whole model."""
    from safetensors.torch import save_file

    trained = {name: parameter.detach().contiguous() for name, parameter in _trained(model).items()}
    save_file(trained, folder / TRAINED)
    torch.save(optimizer.state_dict(), folder / OPTIMIZER)


def load_state(folder: Path, model: nn.Module, optimizer: Optimizer, rank: Rank = ALONE) -> None:
    """Set the trained weights and the optimizer of a whole model to what was saved.

    Raises:
        UserError: other tensors were trained then.
    """
    from safetensors.torch import load_file

    saved, trained = load_file(folder / TRAINED), _trained(model)
    if differing := sorted(saved.keys() ^ trained.keys()):
        raise UserError(f"{folder}: other tensors were trained then; {differing[0]} is one of {len(differing)}")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])
    optimizer.load_state_dict(torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True))


def write_progress(folder: Path, progress: Progress) -> None:
    """Write progress.json."""
    (folder / PROGRESS).write_text(json.dumps(progress, separators=(",", ":")) + "\n")


def read_progress(folder: Path) -> Progress:
    """Read progress.json."""
    progress: Progress = json.loads((folder / PROGRESS).read_text())
    return progress


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
