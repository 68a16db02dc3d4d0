"""What is trained, at which learning rate, by which optimizer: groups of parameters, AdamW, the schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer

from sft.recipe import TrainingConfig

NO_DECAY = ("bias", "alpha", "layernorm", "ln", "layer_norm", "perceiver_resampler")
"""Parameters whose name holds one of these are not decayed (m4's config.py): gates and the whole resampler among them.
The final `model.norm` and the tower's misspelt `pre_layrnorm` do not match and are decayed, as in 2023."""


def parameter_groups(
    model: nn.Module, settings: TrainingConfig, group_of: Callable[[str], str]
) -> list[dict[str, Any]]:
    """Trainable parameters by the group they belong to, decayed and not, as torch's optimizers take them.

    `group_of` names the group of a parameter; `settings.groups` may give it a learning rate and weight decay.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group, decayed = group_of(name), not any(part in name for part in NO_DECAY)
        own: Any = settings.groups.get(group)  # type: ignore[call-overload]
        rate = own.learning_rate if own and own.learning_rate is not None else settings.learning_rate
        decay = own.weight_decay if own and own.weight_decay is not None else settings.weight_decay
        place = groups.setdefault((group, decayed), {"name": group, "params": [], "lr": rate, "weight_decay": decay})
        place["weight_decay"] = decay if decayed else 0.0
        place["params"].append(parameter)
    return list(groups.values())


def make_optimizer(
    groups: Sequence[dict[str, Any]], settings: TrainingConfig, model: nn.Module, *, scaled: bool = False
) -> Optimizer:
    """The optimizer of `settings`. States of the 8-bit kinds stay float32 for embeddings, whose rows are rare (the
    advice of bitsandbytes), and for tensors of fewer than 4,096 elements (its default).

    `scaled`: gradients come from a gradient scaler. It leaves a step out by not calling the optimizer, which accelerate
    notices; fused AdamW it calls all the same, and the step looks as if it had been made.
    """
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=not scaled)
    from bitsandbytes import optim  # takes a second, and not every machine that trains needs it

    paged = settings.optimizer == "paged_adamw_8bit" and torch.cuda.is_available()  # else there is nothing to page to
    kind = optim.PagedAdamW8bit if paged else optim.AdamW8bit
    manager = optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    optimizer: Optimizer = kind(groups, lr=settings.learning_rate, betas=settings.betas)
    return optimizer


def linear_schedule(warmup_steps: int, decay_steps: int, final_factor: float) -> Callable[[int], float]:
    """Factor on the peak learning rate at a step: up from 0 over `warmup_steps`, then a line to `final_factor` at
    `decay_steps`."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min((step - warmup_steps) / max(decay_steps - warmup_steps, 1), 1.0)
        return 1 + progress * (final_factor - 1)

    return factor


def schedule(optimizer: Optimizer, settings: TrainingConfig) -> LambdaLR:
    """The linear schedule of `settings`; every group keeps its proportion to the peak.

    The final learning rate of a card may be where a longer decay was cut off: idefics-9b-instruct has 1e-5 to 1.2e-6,
    which is a line to 0 at 25,000 steps, left at 22,000.
    """
    end = settings.decay_steps or settings.max_steps
    final = 0.0 if settings.decay_steps else settings.final_learning_rate or 0.0
    return LambdaLR(optimizer, linear_schedule(settings.warmup_steps, end, final / settings.learning_rate))


class TrainedPart(NamedTuple):
    """A line of the table of what is trained."""

    group: str
    what: str
    """`weights`, or `adapters` beside frozen weights."""
    tensors: int
    parameters: int
    learning_rate: float
    weight_decay: str
    """Of the tensors that are decayed; `0.1 (12 tensors 0)` where some are not."""
    dtype: str


def what_is_trained(
    model: nn.Module, settings: TrainingConfig, group_of: Callable[[str], str]
) -> tuple[TrainedPart, ...]:
    """What is trained, by group; nothing that is frozen."""
    adapters = {id(parameter) for name, parameter in model.named_parameters() if "lora_" in name}
    parts: dict[tuple[str, str], list[tuple[torch.Tensor, dict[str, Any]]]] = {}
    for group in parameter_groups(model, settings, group_of):
        for parameter in group["params"]:
            what = "adapters" if id(parameter) in adapters else "weights"
            parts.setdefault((group["name"], what), []).append((parameter, group))
    return tuple(_part(*key, members) for key, members in parts.items())


def _part(group: str, what: str, members: list[tuple[torch.Tensor, dict[str, Any]]]) -> TrainedPart:
    decays = [settings["weight_decay"] for _, settings in members]
    spared = decays.count(0.0)
    highest = f"{max(decays):g}"
    return TrainedPart(
        group=group,
        what=what,
        tensors=len(members),
        parameters=sum(parameter.numel() for parameter, _ in members),
        learning_rate=members[0][1]["lr"],
        weight_decay=f"{highest} ({spared} tensors 0)" if spared and max(decays) else highest,
        dtype=", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter, _ in members})),
    )


def table_of(parts: Sequence[TrainedPart]) -> str:
    """The table as lines of text, the sum last."""
    header = ("group", "trained", "tensors", "parameters", "learning rate", "weight decay", "dtype")
    rows = [
        (p.group, p.what, f"{p.tensors:,}", f"{p.parameters:,}", f"{p.learning_rate:g}", p.weight_decay, p.dtype)
        for p in parts
    ]
    rows.append(("all", "", f"{sum(p.tensors for p in parts):,}", f"{sum(p.parameters for p in parts):,}", "", "", ""))
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    right = {2, 3, 4}
    lines = (
        "  ".join(
            cell.rjust(w) if n in right else cell.ljust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)
