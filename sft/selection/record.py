"""What `selection.json` holds (design.md section 5)."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sft.core.files import write_atomically
from sft.core.metric import ACCURACY, Metric
from sft.recipe import Rule

FILE, PLOT, KEPT = "selection.json", "selection.svg", "selections"

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
    return "held_out_loss" if keys["by"] == "loss" else str(keys["benchmark"])


def current_selection(run_dir: Path) -> dict[str, Any] | None:
    """Return the keys of `selection.json`, by which the checkpoint of a run is found; None where none was selected."""
    file = run_dir / FILE
    found: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found


def is_current(selection: Selection, run_dir: Path) -> bool:
    """Return whether a selection, which was written, is the current one."""
    current = current_selection(run_dir)
    return current is not None and chooser(current) == chooser(as_json(selection))


def is_chosen_on_half(run_dir: Path) -> bool:
    """Return whether the checkpoint of a run was chosen on one half of the images: figures come from the other."""
    return (current_selection(run_dir) or {}).get("chosen_on") == "half"


def as_json(selection: Selection) -> dict[str, Any]:
    """Return the keys of `selection.json`."""
    return asdict(selection)
