"""The choice by the held-out loss that training wrote down: means only, so nothing says how sure it is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from sft.core.metric import LOSS
from sft.evaluation.held_out_loss import recorded_losses
from sft.evaluation.tasks import named_tasks
from sft.recipe import Recipe
from sft.runs.checkpoint import checkpoint_name, step_of
from sft.selection.bootstrap import choose_best
from sft.selection.record import CheckpointScore, Selection


def enough_losses(
    recipe: Recipe, paths: Sequence[Path], every_steps: int, left_out: Collection[int]
) -> dict[int, float]:
    """Return the losses of every so many steps that training wrote down, where they are enough to choose: by the rule
    `best`, without a look at the base, and every checkpoint has one."""
    settings = recipe.evaluation
    is_by_loss = [task.name for task in named_tasks(settings)] == ["loss"]
    if not paths or not is_by_loss or settings.rule != "best" or settings.not_worse_than_base:
        return {}
    losses, steps = recorded_losses(Path(recipe.output_dir)), [step_of(path) for path in paths]
    if not all(step in losses for step in steps):
        return {}
    counted = (step for step in losses if step <= max(steps) and step % every_steps == 0 and step not in left_out)
    return {step: losses[step] for step in counted}


def choose_by_recorded_loss(losses: dict[int, float], with_weights: Collection[str] | None = None) -> Selection:
    """Return the checkpoint of the lowest held-out loss that training wrote down, among those that have their weights;
    all, if left out."""
    steps = sorted(losses)
    names = [checkpoint_name(step) for step in steps]
    values_K = -np.array([losses[step] for step in steps])
    has_weights_K = [with_weights is None or name in with_weights for name in names]
    columns = zip(names, steps, has_weights_K, strict=True)
    return Selection(
        by="loss",
        rule="best",
        selected=names[choose_best(np.where(has_weights_K, values_K, -np.inf))],
        best=names[choose_best(values_K)],
        scores=tuple(
            CheckpointScore(checkpoint=name, step=step, score=losses[step], has_weights=has_weights)
            for name, step, has_weights in columns
        ),
        tied=(),
        cross_fitted=None,
        categories={},
        benchmark="metrics.jsonl",
        metric=LOSS,
    )
