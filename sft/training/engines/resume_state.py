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
from typing import Any, TypedDict

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from sft.recipe import EngineName
from sft.training.engines.sharded_state import check_names, trained

TRAINED, OPTIMIZER, PROGRESS = "trained.safetensors", "optimizer.pt", "progress.json"


class Spent(TypedDict):
    """The time and tokens that a run has spent so far, breaks not counted."""

    tokens: int
    seconds: float
    cpu_seconds: float


class Progress(TypedDict):
    """The content of progress.json."""

    engine: EngineName
    processes: int
    """The number of those that wrote the state."""
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

    save_file({name: weight.detach().contiguous() for name, weight in trained(model).items()}, folder / TRAINED)
    torch.save(optimizer.state_dict(), folder / OPTIMIZER)


def load_state(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Set the trained weights and the optimizer of a whole model to what was saved; raise UserError where other tensors
    were trained then."""
    from safetensors.torch import load_file

    saved, parameters = load_file(folder / TRAINED), trained(model)
    check_names(folder, saved, parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    optimizer.load_state_dict(torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True))


def write_progress(folder: Path, progress: Progress) -> None:
    """Write progress.json."""
    (folder / PROGRESS).write_text(json.dumps(progress, separators=(",", ":")) + "\n")


def read_progress(folder: Path) -> Progress:
    """Read progress.json; those from before there were engines do not name one."""
    progress: Progress = {"engine": "ddp", "processes": 1} | json.loads((folder / PROGRESS).read_text())
    return progress
