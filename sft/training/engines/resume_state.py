"""What training needs to go on with the next step as if it had never stopped, in the `state/` of a checkpoint.

    trained.safetensors   what is trained, exactly: float32, where the weights beside it are rounded to bfloat16
    optimizer.pt          the optimizer's tensors; read with `weights_only=True`, after their hash matched
    progress.json         everything else: who wrote it, step, schedule, scaler, place in the data

Engines that share a model out have files of their own in place of the first two (`sft.training.engines`).

Random numbers need no place here: torch is seeded anew in every micro-step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sft.core.errors import UserError

TRAINED, OPTIMIZER, PROGRESS = "trained.safetensors", "optimizer.pt", "progress.json"


def save_state(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Write the first two files."""
    from safetensors.torch import save_file

    trained = {name: parameter.detach().contiguous() for name, parameter in _trained(model).items()}
    save_file(trained, folder / TRAINED)
    torch.save(optimizer.state_dict(), folder / OPTIMIZER)


def load_state(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Set what is trained and the optimizer to what was saved.

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


def write_progress(folder: Path, progress: dict[str, Any]) -> None:
    """Write the third; it is JSON."""
    (folder / PROGRESS).write_text(json.dumps(progress, separators=(",", ":")) + "\n")


def read_progress(folder: Path) -> dict[str, Any]:
    """What `write_progress` was given."""
    progress: dict[str, Any] = json.loads((folder / PROGRESS).read_text())
    return progress


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
