"""The choice by the held-out loss that training wrote down: means only, so nothing says how sure it is."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from sft.core.metric import LOSS
from sft.runs.checkpoint import checkpoint_name
from sft.selection.bootstrap import choose_best
from sft.selection.record import CheckpointScore, Selection


def choose_by_recorded_loss(losses: dict[int, float], with_weights: Collection[str] | None = None) -> Selection:
    """Return the checkpoint of the lowest held-out loss that training wrote down, among those that have their weights;
    all, if left out."""
    steps = sorted(losses)
    scores = tuple(
        CheckpointScore(
            checkpoint=(name := checkpoint_name(step)),
            step=step,
            score=losses[step],
            has_weights=with_weights is None or name in with_weights,
        )
        for step in steps
    )

    def best(allowed: list[CheckpointScore]) -> str:
        return allowed[choose_best(np.array([-score.score for score in allowed]))].checkpoint

    return Selection(
        by="loss",
        rule="best",
        selected=best([score for score in scores if score.has_weights]),
        best=best(list(scores)),
        scores=scores,
        tied=(),
        cross_fitted=None,
        categories={},
        benchmark="metrics.jsonl",
        metric=LOSS,
    )
