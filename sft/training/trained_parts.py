"""The table of what is trained, which is printed before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from sft.models.family import Weights
from sft.recipe import TrainingConfig
from sft.training.optimizer import parameter_groups


class TrainedPart(NamedTuple):
    """A row of the table: the trained weights, or the adapters, of one group of parameters."""

    group: str
    what: str
    """`weights`, or `adapters` of frozen weights."""
    tensors: int
    parameters: int
    learning_rate: float
    weight_decay: str
    """Weight decay of the decayed tensors; `0.1 (12 at 0)` where 12 tensors are not decayed."""
    dtype: str


def trained_parts(model: nn.Module, settings: TrainingConfig, weights: Weights) -> tuple[TrainedPart, ...]:
    """Return what is trained, by group. Frozen parameters are left out."""
    adapters = {id(parameter) for name, parameter in model.named_parameters() if "lora_" in name}
    parts: dict[tuple[str, str], list[tuple[torch.Tensor, dict[str, Any]]]] = {}
    for group in parameter_groups(model, settings, weights):
        for parameter in group["params"]:
            what = "adapters" if id(parameter) in adapters else "weights"
            parts.setdefault((group["name"], what), []).append((parameter, group))
    return tuple(_part(*key, members) for key, members in parts.items())


def _part(group: str, what: str, members: list[tuple[torch.Tensor, dict[str, Any]]]) -> TrainedPart:
    decays = [settings["weight_decay"] for _, settings in members]
    undecayed = decays.count(0.0)
    highest = f"{max(decays):g}"
    return TrainedPart(
        group=group,
        what=what,
        tensors=len(members),
        parameters=sum(parameter.numel() for parameter, _ in members),
        learning_rate=members[0][1]["lr"],
        weight_decay=f"{highest} ({undecayed} at 0)" if undecayed and max(decays) else highest,
        dtype=", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter, _ in members})),
    )


def trained_table(parts: Sequence[TrainedPart]) -> str:
    """Return the table as lines of text, with the sums in the last one. They fit 80 columns for IDEFICS-80b."""
    header = ("group", "trained", "tensors", "parameters", "rate", "decay", "dtype")
    rows = [
        (p.group, p.what, f"{p.tensors:,}", f"{p.parameters:,}", f"{p.learning_rate:g}", p.weight_decay, p.dtype)
        for p in parts
    ]
    rows.append(("all", "", f"{sum(p.tensors for p in parts):,}", f"{sum(p.parameters for p in parts):,}", "", "", ""))
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    right = {2, 3, 4}
    lines = (
        " ".join(
            cell.rjust(w) if n in right else cell.ljust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)
