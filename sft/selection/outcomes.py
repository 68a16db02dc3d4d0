"""What all evaluated checkpoints of a run scored on a task, item by item, as one table.

Shape letters: K checkpoints, Q questions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sft.core.errors import UserError
from sft.core.metric import Metric
from sft.evaluation.results import Result, read_lines
from sft.evaluation.task import Task
from sft.runs.checkpoint import checkpoint_name, step_of
from sft.selection.clusters import Array, Clusters, Joint, sum_by_cluster

ContentT = TypeVar("ContentT")


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """The scores of all checkpoints on the same items, which are called questions throughout."""

    task: str = ""
    benchmark: str
    """The folder of RUN/evaluations that they were read from."""
    metric: Metric
    ranks: tuple[str, ...]
    """The ways of scoring options over which values are averaged; empty where there is one way only."""
    steps: tuple[int, ...]
    """Of the checkpoints, rising."""
    items: tuple[int | str, ...]
    """Names of the questions."""
    values_KQ: Array
    """Higher is better: scores, with their sign turned where lower is better."""
    weights_Q: Array
    """What an item counts: 1, or trained tokens."""
    clusters_Q: NDArray[np.str_]
    """Questions of one cluster depend on each other."""
    categories_Q: NDArray[np.str_]
    weight: float | None = None
    """What it counts in the choice beside others; None leaves it to its reliability, 0 takes no part."""
    others: Mapping[str, Array] = field(default_factory=dict)
    """Values (Q,) of models that are no checkpoints: `base`, or the mean of some checkpoints."""

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Names of the checkpoints."""
        return tuple(checkpoint_name(step) for step in self.steps)

    @property
    def clusters(self) -> Clusters:
        """The values of all checkpoints, summed by cluster."""
        return self.clusters_of(self.values_KQ)

    def clusters_of(self, values_KQ: Array) -> Clusters:
        """Return values of any models on these questions, summed by cluster."""
        return sum_by_cluster(values_KQ, self.clusters_Q, self.weights_Q, metric=self.metric)

    def clusters_in(self, category: str) -> Clusters:
        """Return the same on the questions of a category."""
        is_in_Q = self.categories_Q == category
        values_KQ, clusters_Q, weights_Q = self.values_KQ[:, is_in_Q], self.clusters_Q[is_in_Q], self.weights_Q[is_in_Q]
        return sum_by_cluster(values_KQ, clusters_Q, weights_Q, metric=self.metric)

    def values_of(self, model: str) -> Array:
        """Return the values (Q,) of a checkpoint or of another model."""
        return self.others[model] if model in self.others else self.values_KQ[self.checkpoints.index(model)]

    def with_model(self, name: str, evaluated: Sequence[tuple[Task, Result]]) -> Outcomes:
        """Return the same with another model, which was asked each task of this benchmark; raise UserError where it was
        asked other questions."""
        if any(tuple(one.item for one in result.outcomes) != self.items for _, result in evaluated):
            raise UserError(f"{self.benchmark}: {name} was asked other questions than the checkpoints")
        return replace(self, others={**self.others, name: self.metric.sign * mean_values(evaluated)})

    def at_steps(self, steps: Collection[int]) -> Outcomes:
        """Return the same for some of the checkpoints."""
        rows = [number for number, step in enumerate(self.steps) if step in steps]
        return replace(self, steps=tuple(self.steps[row] for row in rows), values_KQ=self.values_KQ[rows])


def mean_values(evaluated: Sequence[tuple[Task, Result]]) -> Array:
    """Return a model's value for each item (Q,): the mean over the tasks, which are ways of asking one benchmark."""
    return np.asarray(np.mean([task.paired_scores(result.outcomes) for task, result in evaluated], axis=0))


def pair_of(first: Sequence[tuple[Task, Result]], second: Sequence[tuple[Task, Result]]) -> Joint:
    """Return what two models scored on the items of a benchmark that both were asked, by cluster; raise UserError where
    there are none."""
    task, outcomes = first[0][0], first[0][1].on_items_of(second[0][1]).outcomes
    if not outcomes:
        raise UserError(f"{task.benchmark}: the two models were asked no question in common")
    sides = (
        [(t, result.on_items_of(a[1])) for t, result in own] for own, a in ((first, second[0]), (second, first[0]))
    )
    values_2Q = task.metric.sign * np.stack([mean_values(side) for side in sides])
    clusters_Q, weights_Q = np.array([one.cluster for one in outcomes]), np.array([one.weight for one in outcomes])
    return Joint((sum_by_cluster(values_2Q, clusters_Q, weights_Q, metric=task.metric),))


def read_outcomes(
    run_dir: Path,
    task: Task,
    *,
    protocol_hashes: Collection[str] | None = None,
    counts: Callable[[str], bool] = lambda checkpoint: True,
    weight: float | None = None,
) -> Outcomes:
    """Return all evaluations of checkpoints on a task's benchmark, in RUN/evaluations, that were asked with images.

    A checkpoint's value for an item is the mean over the ways of scoring options, each by `Task.paired_scores`.
    `protocol_hashes` names the evaluations that count, where there are others, `counts` tells the checkpoints that do.
    Raise UserError where there are none, they are of several protocols, or checkpoints were asked different questions.
    """
    by_step = _files(run_dir / "evaluations" / task.benchmark, protocol_hashes, counts)
    tables = {step: [_read(file, read_lines) for file in ranked.values()] for step, ranked in by_step.items()}
    first = next(iter(tables.values()))[0]
    asked = [outcome.item for outcome in first]
    for step, ranked in tables.items():
        if any([outcome.item for outcome in outcomes] != asked for outcomes in ranked):
            raise UserError(f"{checkpoint_name(step)}: was asked other questions than the others; evaluate it again")
    values_KQ = [np.mean([task.paired_scores(one) for one in ranked], axis=0) for ranked in tables.values()]
    return Outcomes(
        task=task.name,
        benchmark=task.benchmark,
        metric=task.metric,
        ranks=tuple(rank for rank in next(iter(by_step.values())) if rank),
        steps=tuple(tables),
        items=tuple(asked),
        values_KQ=task.metric.sign * np.array(values_KQ, dtype=np.float64),
        weights_Q=np.array([outcome.weight for outcome in first], dtype=np.float64),
        clusters_Q=np.array([outcome.cluster for outcome in first]),
        categories_Q=np.array([outcome.category for outcome in first]),
        weight=weight,
    )


def _files(
    folder: Path, protocol_hashes: Collection[str] | None, counts: Callable[[str], bool]
) -> dict[int, dict[str, Path]]:
    """Return, for each step, the file of the items' lines of each ranking, both in order. Raise UserError where there
    are none, a checkpoint lacks a ranking, or one was asked under several protocols or parts of the benchmark."""
    by_step: dict[int, dict[str, Path]] = {}
    protocols: dict[str, str] = {}
    for file in sorted(folder.glob("*/checkpoint-*.json")):
        if protocol_hashes is not None and file.parent.name not in protocol_hashes:
            continue
        summary = _read(file, lambda file: dict(json.loads(file.read_text(encoding="utf-8"))))
        if not summary.get("with_images", True) or not counts(file.stem):
            continue
        rank = summary.get("rank", "")
        if protocols.setdefault(rank, summary["protocol_hash"]) != summary["protocol_hash"]:
            raise UserError(f"{folder}: evaluations by {rank} of several protocols found; keep one of its folders")
        by_step.setdefault(step_of(file.with_suffix("")), {})[rank] = file.with_suffix(".jsonl")
    if not by_step:
        raise UserError(f"{folder}: no evaluations of checkpoints found; run `idefics-sft select` first")
    for step, ranked in sorted(by_step.items()):
        if len(ranked) < len(protocols):
            name, ranks = checkpoint_name(step), ", ".join(sorted(protocols))
            raise UserError(f"{folder}: {name} lacks some of the rankings {ranks}; evaluate it")
    return {step: dict(sorted(ranked.items())) for step, ranked in sorted(by_step.items())}


def _read(file: Path, read: Callable[[Path], ContentT]) -> ContentT:
    """Return what `read` makes of a file; raise UserError where it is not what was written."""
    try:
        return read(file)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: damaged; delete it and run `idefics-sft select` again") from error
