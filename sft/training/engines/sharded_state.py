"""The trained weights and AdamW's states as a distributed checkpoint of torch.

Every process writes its shard under the parameter's name; any number of processes, a single one too, read theirs.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from sft.core.errors import UserError

FOLDER = "shards"
WEIGHT, STEP, MOMENTS = "weight", "step", ("exp_avg", "exp_avg_sq")


def save(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Write this process's shard. All processes call it."""
    from torch.distributed.checkpoint.state_dict_saver import save as save_shards

    save_shards(_flat(_states(model, optimizer)), checkpoint_id=folder / FOLDER)


def load(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Read this process's shard. All processes call it. Raise UserError where other tensors were trained then."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_shards

    for parameter in trained(model).values():
        begin(optimizer, parameter)
    tensors = _flat(_states(model, optimizer))
    reader = FileSystemReader(folder / FOLDER)
    check_names(folder, reader.read_metadata().state_dict_metadata, tensors)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process reads it all
        load_shards(tensors, storage_reader=reader, no_dist=not torch.distributed.is_initialized())


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def begin(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Make AdamW's states of a parameter before the first step, as torch's AdamW would make them."""
    fused = any(group.get("fused") for group in optimizer.param_groups)
    state = {STEP: torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu")}
    state |= {name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in MOMENTS}
    optimizer.state[parameter] = state
    return state


def check_names(folder: Path, found: Mapping[str, object], expected: Mapping[str, object]) -> None:
    """Raise UserError where other tensors were trained when a state was written than are trained now."""
    if differing := sorted(found.keys() ^ expected.keys()):
        raise UserError(f"{folder}: other tensors were trained then; {differing[0]} is one of {len(differing)}")


def _states(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """Return each trained parameter with the optimizer's states of it."""
    return {
        name: {WEIGHT: parameter.detach(), **optimizer.state[parameter]} for name, parameter in trained(model).items()
    }


def _flat(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{name}/{what}": tensor for name, own in states.items() for what, tensor in own.items()}
