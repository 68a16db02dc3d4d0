"""The choice of a checkpoint: the rule, the card's own rule beside it, and how sure either is.

Shape letters: K checkpoints, B benchmarks that choose, R bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import numpy as np

from sft.core.errors import UserError
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
from sft.selection.record import Average, BenchmarkScores, CategoryScores, CheckpointScore, ChosenOn, Selection

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
    chosen_on: ChosenOn = "all",
    with_weights: Collection[str] | None = None,
    average_of: Sequence[str] = (),
    num_draws: int = NUM_DRAWS,
) -> Selection:
    """Choose among the evaluated checkpoints of a run that have their weights (`with_weights`; all, if left out).

    Several benchmarks choose together, those of weight 0 not at all. Checkpoints that are worse than the model `base`
    of a benchmark are not selected. The mean of some checkpoints (`average_of`), a model as `average_name` says, is
    selected if it is significantly better than the checkpoint of the rule.

    Raises:
        UserError: it is to choose on half of the images, and one of the halves has no questions.
    """
    choice = _Choice(benchmarks, rule, seed, chosen_on, num_draws)
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

    def __init__(
        self, benchmarks: Sequence[Outcomes], rule: Rule, seed: int, chosen_on: ChosenOn, num_draws: int
    ) -> None:
        common = set.intersection(*(set(one.steps) for one in benchmarks))
        steps = {step for one in benchmarks for step in one.steps} - common
        self.warnings = [f"left out: {checkpoint_name(s)}: not evaluated on every benchmark" for s in sorted(steps)]
        self.benchmarks = [one.at_steps(common) for one in benchmarks]
        self.choosers = [one for one in self.benchmarks if one.weight != 0]
        self.names = self.choosers[0].checkpoints
        self.rule, self.seed, self.chosen_on, self.num_draws = rule, seed, chosen_on, num_draws
        halves = [_chooses_and_reports(one, chosen_on) for one in self.choosers]
        self.chooses = joined([half.clusters for half, _ in halves], [one.weight for one in self.choosers])
        self.whole = self.chooses._replace(parts=tuple(one.clusters for one in self.choosers))
        self.reported = [half for _, half in halves]
        self.reports = self.chooses._replace(parts=tuple(half.clusters for half in self.reported))
        self.worse_K = {one.benchmark: self._worse_than_base(one) for one in self.benchmarks if "base" in one.others}
        self.is_free_K = ~np.any([np.full(len(self.names), False), *self.worse_K.values()], axis=0)
        if not self.is_free_K.any():
            self.warnings.append("every checkpoint is significantly worse than the base; none is left out for it")
            self.is_free_K[:] = True

    def select(self, with_weights: Collection[str] | None) -> Selection:
        """Return the choice with everything that is said about it."""
        has_weights_K = np.array([with_weights is None or name in with_weights for name in self.names])
        is_free_K = has_weights_K & self.is_free_K
        selected = self._pick(self.chooses, is_free_K if is_free_K.any() else has_weights_K, self.num_draws)
        draws_B = bootstrap_each(self.reports, seed=self.seed, num_draws=self.num_draws)
        figures_B, chosen = self._cross_fit()
        worth = self.whole.figure(figures_B, self.whole.errors_of(chosen)) if figures_B else None
        is_one = len(self.choosers) == 1
        drawn = self.reports.scores, self.reports.of(draws_B), self.reports.num_clusters
        selection = Selection(
            by="+".join(one.task for one in self.choosers),
            rule=self.rule,
            selected=self.names[selected],
            best=self.names[choose_best(self.chooses.scores)],
            scores=self._checkpoint_scores(has_weights_K),
            tied=tuple(compress(self.names, not_worse(*drawn))),
            cross_fitted=worth.score if worth else None,
            cross_fitted_interval=worth.interval if worth else None,
            detectable_difference=detectable_difference(*drawn),
            categories=_categories(self.reported[0]) if is_one else {},
            benchmarks=self._benchmark_scores(draws_B, figures_B, chosen),
            benchmark="+".join(one.benchmark for one in self.choosers),
            metric=self.reports.metric,
            ranks=self.choosers[0].ranks if is_one else (),
            seed=self.seed,
            chosen_on=self.chosen_on,
            questions=(_num_questions(self.chooses), _num_questions(self.reports)),
            images=self.reports.num_clusters,
        )
        warnings = (*_warnings(selection, self.reports.fewest_clusters), *self.warnings)
        return replace(selection, warnings=warnings)

    def average(self, of: Sequence[str], selected: str) -> Average:
        """Return how the mean of some checkpoints compares with the selected one."""
        name = average_name(of)
        both = [np.vstack([one.values_of(name), one.values_of(selected)]) for one in self.choosers]
        parts = (one.clusters_of(values_2Q) for one, values_2Q in zip(self.choosers, both, strict=True))
        pair = self.whole._replace(parts=tuple(parts))
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
        joint, free_K = self.whole, self.is_free_K
        worth = (
            []
            if joint.fewest_clusters < 2
            else cross_fitted(joint, lambda half: self._pick(half, free_K, HALF_DRAWS), self.seed)
        )
        return worth, self._pick(joint, free_K, self.num_draws)

    def _checkpoint_scores(self, has_weights_K: Mask) -> tuple[CheckpointScore, ...]:
        p_best_K = probability_best(self.reports, seed=self.seed)
        is_few = len(self.choosers) > 1 and self.reports.fewest_clusters < INDEX_IMAGES
        return tuple(
            CheckpointScore(
                checkpoint=self.names[k],
                step=self.choosers[0].steps[k],
                **figure._asdict(),
                p_best=None if is_few else float(p_best_K[k]),
                has_weights=bool(has_weights_K[k]),
                worse_than_base=tuple(name for name, is_worse_K in self.worse_K.items() if is_worse_K[k]),
            )
            for k, figure in enumerate(self.reports.figures())
        )

    def _benchmark_scores(
        self, draws_B: Sequence[Array], figures_B: Sequence[float], chosen: int
    ) -> dict[str, BenchmarkScores]:
        chose = dict(zip((one.benchmark for one in self.choosers), range(len(draws_B)), strict=True))
        found = {}
        for one in self.benchmarks:
            number, alone = chose.get(one.benchmark), Joint((one.clusters,))
            part, draws_RK, weight, worth = alone.parts[0], None, 0.0, None
            if number is not None:
                part, draws_RK, weight = self.reports.parts[number], draws_B[number], self.chooses.weights[number]
                worth = alone.figure([figures_B[number]], alone.errors_of(chosen)) if figures_B else None
            draws_RK = self._bootstrap(alone) if draws_RK is None else draws_RK
            base_Q = one.others.get("base")
            found[one.benchmark] = BenchmarkScores(
                **_scores(part),
                task=one.task,
                metric=one.metric,
                weight=weight,
                reliability=part.reliability,
                images=len(part.weights_C),
                best=self.names[choose_best(part.scores)],
                tied=tuple(compress(self.names, not_worse(part.scores, draws_RK, len(part.weights_C)))),
                cross_fitted=worth.score if worth else None,
                cross_fitted_interval=worth.interval if worth else None,
                base=None if base_Q is None else one.metric.sign * float(one.clusters_of(base_Q[None]).scores[0]),
            )
        return found


def _chooses_and_reports(outcomes: Outcomes, chosen_on: ChosenOn) -> tuple[Outcomes, Outcomes]:
    """Return the questions that choose, and those that figures come from."""
    if chosen_on == "all":
        return outcomes, outcomes
    if len(np.unique(outcomes.halves_Q)) < 2:
        raise UserError(f"{outcomes.benchmark}: a half of its images has no questions; this needs more images")
    return outcomes.only(outcomes.halves_Q == 0), outcomes.only(outcomes.halves_Q == 1)


def _num_questions(joint: Joint) -> int:
    return sum(part.num_questions for part in joint.parts)


def _categories(outcomes: Outcomes) -> dict[str, CategoryScores]:
    names = np.unique(outcomes.categories_Q).tolist()
    parts = (outcomes.only(outcomes.categories_Q == name).clusters for name in names)
    return {name: CategoryScores(**_scores(part)) for name, part in zip(names, parts, strict=True)}


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
            f"{selection.questions[1]} questions cannot tell {len(selection.tied)} of {len(selection.scores)} "
            "checkpoints apart"
            + ("" if difference is None else detectable if difference else "; all of them are answered alike")
        )
    if images < SIMULATED_IMAGES:
        found.append(f"{images} images are fewer than the {SIMULATED_IMAGES} from which on figures were checked")
    return found


def _size_of(difference: float, metric: Metric) -> str:
    return f"{100 * difference:.1f} points" if metric.is_share else f"{difference:.3f} {metric.unit}".rstrip()
