"""The choice of a checkpoint: the rule, the card's own rule beside it, and how sure either is.

Shape letters: K checkpoints, Q questions, R bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.core.errors import UserError
from sft.core.metric import LOSS, Metric
from sft.evaluation.statistics import wilson_interval
from sft.recipe import Rule
from sft.runs.checkpoint import checkpoint_name
from sft.selection.bootstrap import (
    NUM_DRAWS,
    Array,
    bootstrap_scores,
    choose_best,
    cross_fitted,
    detectable_difference,
    disagreements,
    intervals,
    mean_scores,
    not_worse,
    share_best,
    standard_errors,
)
from sft.selection.outcomes import Outcomes
from sft.selection.record import CategoryScores, CheckpointScore, ChosenOn, Selection

MIN_IMAGES = 50
"""Of a benchmark whose figures can be relied on: from 25 images, 95 % intervals of a score near 90 % hold the truth in
91 % of cases, and 60 % in place of 80 % of differences are detected (scripts/simulate_selection.py)."""


def choose(
    outcomes: Outcomes,
    *,
    by: str,
    rule: Rule = "best",
    seed: int = 0,
    chosen_on: ChosenOn = "all",
    with_weights: Collection[str] | None = None,
    num_draws: int = NUM_DRAWS,
) -> Selection:
    """Choose among the evaluated checkpoints of a run that have their weights (`with_weights`; all, if left out).

    Raises:
        UserError: it is to choose on half of the images, and one of the halves has no questions.
    """
    draws = _Draws(seed, num_draws)
    chooses, reports = _chooses_and_reports(outcomes, chosen_on)
    evaluated_K = np.full(len(outcomes.steps), True)
    has_weights_K = np.array([with_weights is None or name in with_weights for name in outcomes.checkpoints])
    selected = draws.pick(chooses, has_weights_K, rule)
    best = draws.pick(chooses, evaluated_K, "best")
    scores_K, draws_RK = draws.score(reports)
    is_tied_K = not_worse(scores_K, draws_RK)
    worth, worth_interval = draws.cross_fit(outcomes, rule)
    selection = Selection(
        by=by,
        rule=rule,
        selected=outcomes.checkpoints[selected],
        best=outcomes.checkpoints[best],
        scores=_checkpoint_scores(reports, scores_K, draws_RK, has_weights_K),
        tied=tuple(name for name, is_tied in zip(outcomes.checkpoints, is_tied_K, strict=True) if is_tied),
        cross_fitted=worth,
        cross_fitted_interval=worth_interval,
        detectable_difference=detectable_difference(scores_K, draws_RK, disagreements_K=_disagreements(reports)),
        categories=_categories(reports, draws),
        benchmark=outcomes.benchmark,
        metric=outcomes.metric,
        ranks=outcomes.ranks,
        seed=seed,
        chosen_on=chosen_on,
        questions=(chooses.num_questions, reports.num_questions),
        images=len(np.unique(reports.clusters_Q)),
    )
    return replace(selection, warnings=_warnings(selection))


class _Draws(NamedTuple):
    """The draws of the bootstrap: the same ones wherever the same questions are asked."""

    seed: int
    number: int

    def score(self, outcomes: Outcomes) -> tuple[Array, Array]:
        """Return scores (K,) and their draws (R, K)."""
        values_KQ, weights_Q = outcomes.values_KQ, outcomes.weights_Q
        draws_RK = bootstrap_scores(
            values_KQ, outcomes.clusters_Q, weights_Q=weights_Q, seed=self.seed, num_draws=self.number
        )
        return mean_scores(values_KQ, weights_Q), draws_RK

    def pick(self, outcomes: Outcomes, allowed_K: NDArray[np.bool_], rule: Rule) -> int:
        """Return the number of the checkpoint that a rule chooses among those that are allowed."""
        if rule == "earliest_not_worse":
            candidates = np.flatnonzero(not_worse(*self.score(outcomes)) & allowed_K)
            if len(candidates):  # none where the weights of the best ones were deleted by hand
                return int(candidates[0])
        scores_K = mean_scores(outcomes.values_KQ, outcomes.weights_Q)
        return choose_best(np.where(allowed_K, scores_K, -np.inf))

    def cross_fit(self, outcomes: Outcomes, rule: Rule) -> tuple[float, tuple[float, float]] | tuple[None, None]:
        """Return what choosing by a rule is worth, with its interval; None where a half has no questions.

        Chosen among all that were evaluated, whether or not their weights are there: those that were pruned are gone
        because of how they answered these very questions.
        """
        if len(np.unique(outcomes.halves_Q)) < 2:
            return None, None
        evaluated_K = np.full(len(outcomes.steps), True)
        fitted_Q = cross_fitted(
            outcomes.values_KQ, outcomes.halves_Q, lambda mask: self.pick(outcomes.only(mask), evaluated_K, rule)
        )
        fitted = replace(outcomes, values_KQ=fitted_Q[None])
        scores_1, draws_R1 = self.score(fitted)
        return outcomes.metric.sign * float(scores_1[0]), _intervals(fitted, scores_1, draws_R1)[0]


def _chooses_and_reports(outcomes: Outcomes, chosen_on: ChosenOn) -> tuple[Outcomes, Outcomes]:
    """Return the questions that choose, and those that figures come from."""
    if chosen_on == "all":
        return outcomes, outcomes
    if len(np.unique(outcomes.halves_Q)) < 2:
        raise UserError(f"{outcomes.benchmark}: a half of its images has no questions; this needs more images")
    return outcomes.only(outcomes.halves_Q == 0), outcomes.only(outcomes.halves_Q == 1)


def _disagreements(outcomes: Outcomes) -> Array | None:
    """Return the share of questions that each checkpoint and the best one answer differently (K,); None for a score
    that is no share of right answers."""
    return disagreements(outcomes.values_KQ, outcomes.weights_Q) if outcomes.metric.is_share else None


def _checkpoint_scores(
    outcomes: Outcomes, scores_K: Array, draws_RK: Array, has_weights_K: NDArray[np.bool_]
) -> tuple[CheckpointScore, ...]:
    errors_K, p_best_K = standard_errors(draws_RK), share_best(draws_RK)
    limits_K = _intervals(outcomes, scores_K, draws_RK)
    return tuple(
        CheckpointScore(
            checkpoint=name,
            step=outcomes.steps[k],
            score=outcomes.metric.sign * float(scores_K[k]),
            standard_error=float(errors_K[k]),
            interval=limits_K[k],
            p_best=float(p_best_K[k]),
            has_weights=bool(has_weights_K[k]),
        )
        for k, name in enumerate(outcomes.checkpoints)
    )


def _warnings(selection: Selection) -> tuple[str, ...]:
    """Return what to know before believing a selection."""
    found = []
    num_questions, difference = selection.questions[1], selection.detectable_difference or 0.0
    if len(selection.tied) > 1:
        size = _size_of(difference, selection.metric)
        detectable = f"the smallest difference that they could detect at 80 % power is {size}"
        found.append(
            f"{num_questions} questions cannot tell {len(selection.tied)} of {len(selection.scores)} checkpoints "
            f"apart; {detectable if difference else 'all of them are answered alike'}"
        )
    if selection.images < MIN_IMAGES:
        found.append(
            f"figures from {selection.images} images are less sure than they say; "
            f"from {MIN_IMAGES} on they can be relied on"
        )
    return tuple(found)


def _size_of(difference: float, metric: Metric) -> str:
    return f"{100 * difference:.1f} points" if metric.is_share else f"{difference:.3f} {metric.unit}".rstrip()


def _categories(outcomes: Outcomes, draws: _Draws) -> dict[str, CategoryScores]:
    found = {}
    for category in np.unique(outcomes.categories_Q).tolist():
        part = outcomes.only(outcomes.categories_Q == category)
        scores_K, draws_RK = draws.score(part)
        found[category] = CategoryScores(
            questions=part.num_questions,
            scores=tuple((part.metric.sign * scores_K).tolist()),
            intervals=_intervals(part, scores_K, draws_RK),
        )
    return found


def _intervals(outcomes: Outcomes, scores_K: Array, draws_RK: Array) -> tuple[tuple[float, float], ...]:
    """Return the 95 % interval of each score. Where all clusters of hits and misses are alike, so are all draws, and
    nothing is known of their spread: then it is Wilson's, in which each cluster counts once."""
    num_clusters, metric = len(np.unique(outcomes.clusters_Q)), outcomes.metric
    found = []
    for score, (low, high) in zip(scores_K.tolist(), (metric.sign * intervals(draws_RK)).tolist(), strict=True):
        is_known = not metric.is_share or abs(high - low) > 1e-12
        found.append((min(low, high), max(low, high)) if is_known else wilson_interval(score, num_clusters))
    return tuple(found)


def choose_by_recorded_loss(losses: dict[int, float], with_weights: Collection[str] | None = None) -> Selection:
    """Return the checkpoint of the lowest held-out loss that training wrote down, among those that have their weights
    (all, if left out): means only, so nothing says how sure."""
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
