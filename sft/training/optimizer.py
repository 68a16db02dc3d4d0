"""The update of trained parameters: groups with learning rates and weight decay, the table of them that is printed
before the first step, the optimizer, the schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer

from sft.models.family import Weights
from sft.recipe import OPTIMIZERS, GroupConfig, TrainingConfig
from sft.recipe.optimizers import Groups


def parameter_groups(model: nn.Module, settings: TrainingConfig, weights: Weights) -> list[dict[str, Any]]:
    """Return the trainable parameters by the group they belong to, decayed and not, as torch's optimizers take them.
    `weights` names the group of a parameter; `settings.groups` may give a group its own learning rate and decay."""
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group, is_decayed = weights.group_of(name), weights.is_decayed(name)
        own = settings.groups.get(group, GroupConfig())
        rate = settings.learning_rate if own.learning_rate is None else own.learning_rate
        decay = settings.weight_decay if own.weight_decay is None else own.weight_decay
        new: dict[str, Any] = {"name": group, "params": [], "lr": rate, "weight_decay": decay if is_decayed else 0.0}
        groups.setdefault((group, is_decayed), new)["params"].append(parameter)
    return list(groups.values())


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
    """Return the rows of the table. Frozen parameters are left out."""
    adapters = {id(parameter) for name, parameter in model.named_parameters() if "lora_" in name}
    parts: dict[tuple[str, str], list[tuple[Tensor, dict[str, Any]]]] = {}
    for group in parameter_groups(model, settings, weights):
        for parameter in group["params"]:
            what = "adapters" if id(parameter) in adapters else "weights"
            parts.setdefault((group["name"], what), []).append((parameter, group))
    return tuple(_part(*key, members) for key, members in parts.items())


def _part(group: str, what: str, members: list[tuple[Tensor, dict[str, Any]]]) -> TrainedPart:
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
    lines = (
        " ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, "<<>>><<", widths, strict=True))
        for row in (header, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)


def make_optimizer(groups: Groups, settings: TrainingConfig, model: nn.Module, *, is_scaled: bool = False) -> Optimizer:
    """Return the optimizer of `settings`. `is_scaled`: its gradients come from a gradient scaler."""
    return OPTIMIZERS[settings.optimizer].make(groups, settings, model, is_scaled)


def linear_schedule(warmup_steps: int, decay_steps: int, final_factor: float) -> Callable[[int], float]:
    """Return the factor on the peak learning rate after `step` steps: a line up over `warmup_steps`, then a line to
    `final_factor` at `decay_steps`. The first step has 1 / `warmup_steps`, the last of the warm-up the peak.
    transformers begins at 0, with a step that trains nothing, and is a step behind until the peak."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min((step - warmup_steps) / max(decay_steps - warmup_steps, 1), 1.0)
        return 1 + progress * (final_factor - 1)

    return factor


def schedule(optimizer: Optimizer, settings: TrainingConfig) -> LambdaLR:
    """Return the linear schedule of `settings`, under which every group keeps its proportion to the peak. The final
    learning rate of a card may be where a longer decay was cut off: idefics-9b-instruct has 1e-5 to 1.2e-6, which is a
    line to 0 at 25,000 steps, left at 22,000."""
    end = settings.decay_steps or settings.steps
    final = 0.0 if settings.decay_steps else settings.final_learning_rate or 0.0
    return LambdaLR(optimizer, linear_schedule(settings.warmup_steps or 0, end, final / settings.learning_rate))


def resume_schedule(schedule: LambdaLR, optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Set a schedule to the step of a saved one, and the optimizer's learning rates to what `schedule`, not the saved
    one, has there."""
    step: int = saved["last_epoch"]
    pairs = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    rates = [rate * factor(step) for rate, factor in pairs]
    schedule.load_state_dict({**saved, "base_lrs": schedule.base_lrs, "_last_lr": rates})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


@contextmanager
def kept_settings(optimizer: Optimizer) -> Iterator[None]:
    """Keep the settings of every group of parameters while a saved optimizer is loaded, which brings its own."""
    before = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    yield
    for group, own in zip(optimizer.param_groups, before, strict=True):
        group.update(own)
