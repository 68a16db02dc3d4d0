"""The choice of a checkpoint: the rule, the card's own rule beside it, and how sure either is.

Shape letters: K checkpoints, B benchmarks that choose, R bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import numpy as np

from sft.core.metric import Metric
from sft.recipe import Rule
from sft.runs.checkpoint import checkpoint_name
from sft.selection.bootstrap import (
    NUM_DRAWS,
    bootstrap_each,
    bootstrap_scores,
    choose_best,
    clearly_worse,
    compare_pair,
    cross_fitted,
    detectable_difference,
    not_worse,
)
from sft.selection.clusters import Array, Clusters, Joint, Mask, joined
from sft.selection.outcomes import Outcomes
from sft.selection.posterior import probability_best
from sft.selection.record import Average, BenchmarkScores, CategoryScores, CheckpointScore, Selection

SIMULATED_IMAGES = 25
"""Fewest images of a benchmark in scripts/simulate_selection.py, which checks what is said here."""
INDEX_IMAGES = 60
"""From which on P(best) by several benchmarks is said: by 25 images, .73 is said where .62 is true."""
HALF_DRAWS = 300
"""Draws by which the rule `earliest_not_worse` chooses on half of the images, a hundred times."""


def choose(
    *benchmarks: Outcomes,
    rule: Rule = "best",
    seed: int = 0,
    with_weights: Collection[str] | None = None,
    average_of: Sequence[str] = (),
    num_draws: int = NUM_DRAWS,
) -> Selection:
    """Choose among the evaluated checkpoints of a run that have their weights (`with_weights`; all, if left out).

    Several benchmarks choose together, those of weight 0 not at all. Checkpoints that are worse than the model `base`
    of a benchmark are not selected. The mean of some checkpoints (`average_of`), a model as `average_name` says, is
    selected if it is significantly better than the checkpoint of the rule.
    """
    choice = _Choice(benchmarks, rule, seed, num_draws)
    selection = choice.select(with_weights)
    if average_of:
        average = choice.average(average_of, selection.selected)
        selected = average.score.checkpoint if average.is_taken else selection.selected
        selection = replace(selection, average=average, selected=selected)
    return selection


def average_name(checkpoints: Sequence[str]) -> str:
    """Return the name of the mean of some checkpoints: `average-100-200`."""
    return "-".join(["average", *(name.removeprefix("checkpoint-") for name in checkpoints)])


class _Choice:
    """What the benchmarks say of the checkpoints."""

    def __init__(self, benchmarks: Sequence[Outcomes], rule: Rule, seed: int, num_draws: int) -> None:
        common = set.intersection(*(set(one.steps) for one in benchmarks))
        steps = {step for one in benchmarks for step in one.steps} - common
        self.warnings = [f"left out: {checkpoint_name(s)}: not evaluated on every benchmark" for s in sorted(steps)]
        self.benchmarks = [one.at_steps(common) for one in benchmarks]
        self.choosers = [one for one in self.benchmarks if one.weight != 0]
        self.names = self.choosers[0].checkpoints
        self.rule, self.seed, self.num_draws = rule, seed, num_draws
        self.joint = joined([one.clusters for one in self.choosers], [one.weight for one in self.choosers])
        self.fewest_images = min(len(part.weights_C) for part in self.joint.parts)
        self.worse_K = {one.benchmark: self._worse_than_base(one) for one in self.benchmarks if "base" in one.others}
        self.is_free_K = ~np.any([np.full(len(self.names), False), *self.worse_K.values()], axis=0)
        if not self.is_free_K.any():
            self.warnings.append("every checkpoint is significantly worse than the base; none is left out for it")
            self.is_free_K[:] = True

    def select(self, with_weights: Collection[str] | None) -> Selection:
        """Return the choice with everything that is said about it."""
        joint, first, is_one = self.joint, self.choosers[0], len(self.choosers) == 1
        categories = np.unique(first.categories_Q).tolist() if is_one else []
        has_weights_K = np.array([with_weights is None or name in with_weights for name in self.names])
        is_free_K = has_weights_K & self.is_free_K
        draws_B = bootstrap_each(joint, seed=self.seed, num_draws=self.num_draws)
        figures_B, chosen = self._cross_fit()
        worth = joint.figure(figures_B, chosen) if figures_B else None
        drawn = joint.scores, joint.of(draws_B), joint.num_clusters
        selection = Selection(
            by="+".join(one.task for one in self.choosers),
            rule=self.rule,
            selected=self.names[self._pick(joint, is_free_K if is_free_K.any() else has_weights_K, self.num_draws)],
            best=self.names[choose_best(joint.scores)],
            scores=self._checkpoint_scores(has_weights_K),
            tied=tuple(compress(self.names, not_worse(*drawn))),
            cross_fitted=worth.score if worth else None,
            cross_fitted_interval=worth.interval if worth else None,
            detectable_difference=detectable_difference(*drawn),
            categories={name: CategoryScores(**_scores(first.clusters_in(name))) for name in categories},
            benchmarks=self._benchmark_scores(draws_B, figures_B, chosen),
            benchmark="+".join(one.benchmark for one in self.choosers),
            metric=joint.metric,
            ranks=first.ranks if is_one else (),
            seed=self.seed,
            questions=sum(part.num_questions for part in joint.parts),
            images=joint.num_clusters,
        )
        return replace(selection, warnings=(*_warnings(selection, self.fewest_images), *self.warnings))

    def average(self, of: Sequence[str], selected: str) -> Average:
        """Return how the mean of some checkpoints compares with the selected one."""
        name = average_name(of)
        both = (one.clusters_of(np.vstack([one.values_of(name), one.values_of(selected)])) for one in self.choosers)
        pair = self.joint._replace(parts=tuple(both))
        found = compare_pair(pair, seed=self.seed, num_draws=self.num_draws)
        step = max(step for step, own in zip(self.choosers[0].steps, self.names, strict=True) if own in of)
        return Average(
            of=tuple(of),
            score=CheckpointScore(checkpoint=name, step=step, **pair.figures()[0]._asdict()),
            compared_with=selected,
            difference=found.difference,
            interval=found.interval,
            p_better=found.p_better,
            is_taken=found.is_better,
        )

    def _bootstrap(self, joint: Joint) -> Array:
        return bootstrap_scores(joint, seed=self.seed, num_draws=self.num_draws)

    def _pick(self, joint: Joint, allowed_K: Mask, num_draws: int) -> int:
        """Return the number of the checkpoint that the rule chooses among those that are allowed."""
        if self.rule == "earliest_not_worse":
            draws_RK = bootstrap_scores(joint, seed=self.seed, num_draws=num_draws)
            candidates = np.flatnonzero(not_worse(joint.scores, draws_RK, joint.num_clusters) & allowed_K)
            if len(candidates):  # none where the weights of the best ones were deleted by hand
                return int(candidates[0])
        return choose_best(np.where(allowed_K, joint.scores, -np.inf))

    def _worse_than_base(self, one: Outcomes) -> Mask:
        """Return for each checkpoint (K,) whether it is significantly worse than the base on a benchmark."""
        joint = Joint((one.clusters_of(np.vstack([one.others["base"], one.values_KQ])),))
        return clearly_worse(joint.scores, self._bootstrap(joint), than=0)[1:]

    def _cross_fit(self) -> tuple[list[float], int]:
        """Return what choosing by the rule is worth on each benchmark, and the number of the checkpoint that all images
        choose. None where a benchmark is about one image.

        Chosen among all that were evaluated, whether or not their weights are there: those that were pruned are gone
        because of how they answered these very questions.
        """
        chosen = self._pick(self.joint, self.is_free_K, self.num_draws)
        if self.fewest_images < 2:
            return [], chosen
        return cross_fitted(self.joint, lambda half: self._pick(half, self.is_free_K, HALF_DRAWS), self.seed), chosen

    def _checkpoint_scores(self, has_weights_K: Mask) -> tuple[CheckpointScore, ...]:
        p_best_K = probability_best(self.joint, seed=self.seed)
        is_few = len(self.choosers) > 1 and self.fewest_images < INDEX_IMAGES
        return tuple(
            CheckpointScore(
                checkpoint=self.names[k],
                step=self.choosers[0].steps[k],
                **figure._asdict(),
                p_best=None if is_few else float(p_best_K[k]),
                has_weights=bool(has_weights_K[k]),
                worse_than_base=tuple(name for name, is_worse_K in self.worse_K.items() if is_worse_K[k]),
            )
            for k, figure in enumerate(self.joint.figures())
        )

    def _benchmark_scores(
        self, draws_B: Sequence[Array], figures_B: Sequence[float], chosen: int
    ) -> dict[str, BenchmarkScores]:
        chose = [one.benchmark for one in self.choosers]
        draws, weights = dict(zip(chose, draws_B, strict=True)), dict(zip(chose, self.joint.weights, strict=True))
        figures = dict(zip(chose, figures_B, strict=False))  # none of one image
        found = {}
        for one in self.benchmarks:
            name, part = one.benchmark, one.clusters
            alone, base_Q = Joint((part,)), one.others.get("base")
            draws_RK = draws[name] if name in draws else self._bootstrap(alone)
            worth = alone.figure([figures[name]], chosen) if name in figures else None
            found[name] = BenchmarkScores(
                **_scores(part),
                task=one.task,
                metric=one.metric,
                weight=weights.get(name, 0.0),
                reliability=part.reliability,
                images=len(part.weights_C),
                best=self.names[choose_best(part.scores)],
                tied=tuple(compress(self.names, not_worse(part.scores, draws_RK, len(part.weights_C)))),
                cross_fitted=worth.score if worth else None,
                cross_fitted_interval=worth.interval if worth else None,
                base=None if base_Q is None else one.metric.sign * float(one.clusters_of(base_Q[None]).scores[0]),
            )
        return found


def _scores(part: Clusters) -> dict[str, Any]:
    figures = Joint((part,)).figures()
    return {
        "questions": part.num_questions,
        "scores": tuple(figure.score for figure in figures),
        "intervals": tuple(figure.interval for figure in figures),
    }


def _warnings(selection: Selection, images: int) -> list[str]:
    """Return what to know before believing a selection by benchmarks of at least so many images."""
    found, difference = [], selection.detectable_difference
    if len(selection.tied) > 1:
        size = _size_of(difference or 0.0, selection.metric)
        detectable = f"; the smallest difference that they could detect at 80 % power is {size}"
        found.append(
            f"{selection.questions} questions cannot tell {len(selection.tied)} of {len(selection.scores)} "
            "checkpoints apart"
            + ("" if difference is None else detectable if difference else "; all of them are answered alike")
        )
    if images < SIMULATED_IMAGES:
        found.append(f"{images} images are fewer than the {SIMULATED_IMAGES} from which on figures were checked")
    return found


def _size_of(difference: float, metric: Metric) -> str:
    return f"{100 * difference:.1f} points" if metric.is_share else f"{difference:.3f} {metric.unit}".rstrip()
