"""What `selection.json` holds (design.md section 5)."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sft.core.files import write_atomically
from sft.core.metric import ACCURACY, Metric
from sft.recipe import Rule

FILE = "selection.json"

ChosenOn = Literal[
    "all",  # all questions; the winner's own figure is then optimistic, the cross-fitted one is not
    "half",  # one half of the images; all other figures come from the other half
]


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
    """Share of bootstrap draws in which it is the best; equals share."""
    has_weights: bool = True
    """Whether its weights are still there to be chosen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CategoryScores:
    """The questions of one category: score and 95 % interval of each checkpoint, in the order of `Selection.scores`."""

    questions: int
    scores: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The choice, and how sure one can be of it."""

    by: str
    """The task that chose."""
    rule: Rule
    selected: str
    best: str
    """The one of the best score, whatever the rule: how the card chose."""
    scores: tuple[CheckpointScore, ...]
    tied: tuple[str, ...]
    """Checkpoints that cannot be told apart from the best: they hold the truly best one with 95 % confidence."""
    cross_fitted: float | None
    """What choosing is worth: chosen on one half of the images, scored on the other, both ways."""
    cross_fitted_interval: tuple[float, float] | None = None
    detectable_difference: float | None = None
    """Smallest difference to the best one that is told apart in 80 % of such comparisons."""
    categories: dict[str, CategoryScores]
    benchmark: str
    metric: Metric = ACCURACY
    ranks: tuple[str, ...] = ()
    seed: int = 0
    chosen_on: ChosenOn = "all"
    questions: tuple[int, int] = (0, 0)
    """Number of questions it was chosen on, and number that the figures come from."""
    images: int = 0
    """Clusters of questions that the figures come from."""
    warnings: tuple[str, ...] = ()


def without_weights(selection: Selection, gone: Collection[str]) -> Selection:
    """Return the same selection after the weights of some checkpoints were removed."""
    scores = (replace(s, has_weights=False) if s.checkpoint in gone else s for s in selection.scores)
    return replace(selection, scores=tuple(scores))


def write_selection(selection: Selection, run_dir: Path) -> None:
    """Write `selection.json`, whole or not at all."""
    write_atomically(run_dir / FILE, json.dumps(as_json(selection), indent=2) + "\n")


def is_chosen_on_half(run_dir: Path) -> bool:
    """Return whether the checkpoint of a run was chosen on one half of the images: figures come from the other."""
    file = run_dir / FILE
    return file.is_file() and bool(json.loads(file.read_text(encoding="utf-8")).get("chosen_on") == "half")


def as_json(selection: Selection) -> dict[str, Any]:
    """Return the keys of `selection.json`."""
    return asdict(selection)
