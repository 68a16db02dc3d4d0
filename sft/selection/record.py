"""What `selection.json` holds (design.md section 5)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sft.core.files import write_atomically
from sft.core.metric import ACCURACY, Metric
from sft.recipe import Rule
from sft.selection.clusters import INDEX, Interval

FILE, PLOT, KEPT = "selection.json", "selection.svg", "selections"

MEANINGS = {
    "interval": "A 95 % interval holds the true score in 95 of 100 such evaluations.",
    "p_best": "P(best) is the probability that a checkpoint is truly the best, if neighbours are alike as far as the "
    "scores bear it out.",
    "tied": "The checkpoints that cannot be told apart from the best hold the truly best one with 95 % confidence.",
    "cross_fitted": "The cross-fitted figure is the mean score over 50 halvings of the images, each half scored by the "
    "checkpoint that the other half chooses, so it is free of the winner's luck.",
    "detectable_difference": "The detectable difference is the smallest one to the best checkpoint that 80 of 100 such "
    "comparisons would tell apart.",
    "index": "The index is the mean of the benchmarks' scores in standard deviations over checkpoints, each counted by "
    "its weight.",
}
"""What each figure means; printed beside it, and kept with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointScore:
    """One checkpoint. What only the items' own scores tell is None without them."""

    checkpoint: str
    step: int
    score: float
    standard_error: float | None = None
    interval: tuple[float, float] | None = None
    """95 %"""
    p_best: float | None = None
    has_weights: bool = True
    """Whether its weights are still there to be chosen."""
    worse_than_base: tuple[str, ...] = ()
    """Benchmarks of `evaluation.not_worse_than_base` on which it is significantly worse; it is not selected then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CategoryScores:
    """The questions of one category: score and 95 % interval of each checkpoint, in the order of `Selection.scores`."""

    questions: int
    scores: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkScores(CategoryScores):
    """The same for one of the benchmarks that were evaluated, and what it says of the choice."""

    task: str
    metric: Metric
    weight: float
    """Its share of the choice, a fraction of 1."""
    reliability: float
    """The share of the variance over checkpoints that is not noise."""
    images: int
    best: str
    tied: tuple[str, ...]
    """Checkpoints that it cannot tell apart from its best; all of them where it is flat."""
    cross_fitted: float | None
    """Mean score of what one half of all images chooses, on the other half."""
    cross_fitted_interval: Interval | None
    base: float | None
    """Score of the base, where it was evaluated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Average:
    """The mean of the weights of checkpoints that cannot be told apart, beside the one that the rule selects."""

    of: tuple[str, ...]
    score: CheckpointScore
    compared_with: str
    difference: float
    """Positive where it is better."""
    interval: Interval
    p_better: float
    is_taken: bool
    """Whether it is significantly better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The choice, and how sure one can be of it."""

    by: str
    """The task that chose; several are joined by `+`."""
    rule: Rule
    selected: str
    best: str
    """The one of the best score, whatever the rule: how the card chose."""
    scores: tuple[CheckpointScore, ...]
    tied: tuple[str, ...]
    """Checkpoints that cannot be told apart from the best: they hold the truly best one with 95 % confidence."""
    cross_fitted: float | None
    """What choosing is worth: chosen on one half of the images, scored on the other, both ways, over 50 halvings."""
    cross_fitted_interval: tuple[float, float] | None = None
    detectable_difference: float | None = None
    """Smallest difference to the best one that is told apart in 80 % of such comparisons; None for too few images."""
    categories: dict[str, CategoryScores]
    benchmarks: dict[str, BenchmarkScores] = field(default_factory=dict)
    average: Average | None = None
    benchmark: str
    metric: Metric = ACCURACY
    ranks: tuple[str, ...] = ()
    seed: int = 0
    questions: int = 0
    images: int = 0
    """Clusters of questions."""
    warnings: tuple[str, ...] = ()


def write_selection(selection: Selection, run_dir: Path, *, use: bool = False) -> str:
    """Keep a selection in `selections/`, a file for each benchmark, and make it the current one, `selection.json`,
    where `use` says so, no other is, or the current one is by the same benchmark. Return where its plot belongs."""
    current = current_selection(run_dir)
    for keys in (current, as_json(selection)):  # one of an earlier version is kept only now
        if keys is not None:
            (run_dir / KEPT).mkdir(exist_ok=True)
            write_atomically(run_dir / KEPT / f"{chooser(keys)}.json", json.dumps(keys, indent=2) + "\n")
    if use or current is None or is_current(selection, run_dir):
        write_atomically(run_dir / FILE, json.dumps(as_json(selection), indent=2) + "\n")
    return plot_of(selection, run_dir)


def plot_of(selection: Selection, run_dir: Path) -> str:
    """Return where the plot of a selection, which was written, belongs in the folder of its run."""
    return PLOT if is_current(selection, run_dir) else f"{KEPT}/{chooser(as_json(selection))}.svg"


def chooser(keys: Mapping[str, Any]) -> str:
    """Return what chose, by the keys of a selection."""
    return "held_out_loss" if keys["by"] == "loss" else str(keys["benchmark"])[:200]


def current_selection(run_dir: Path) -> dict[str, Any] | None:
    """Return the keys of `selection.json`, by which the checkpoint of a run is found; None where none was selected."""
    file = run_dir / FILE
    found: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found


def is_current(selection: Selection, run_dir: Path) -> bool:
    """Return whether a selection, which was written, is the current one."""
    current = current_selection(run_dir)
    return current is not None and chooser(current) == chooser(as_json(selection))


def as_json(selection: Selection) -> dict[str, Any]:
    """Return the keys of `selection.json`, with the meaning of each figure that is there."""
    keys = asdict(selection)
    there = {"index": selection.metric == INDEX, "tied": len(selection.tied) > 1}
    there |= {"interval": bool(selection.tied), "p_best": selection.scores[0].p_best is not None}
    meaning = {name: text for name, text in MEANINGS.items() if there.get(name, keys.get(name))}
    return keys | {"meaning": meaning}
