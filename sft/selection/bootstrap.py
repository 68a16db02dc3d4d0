"""How sure one can be of a comparison: scores of several models on the same questions, which come in clusters.

Everything is read off one paired cluster bootstrap: clusters are drawn with replacement, each with all its questions,
and every model is scored on the same draw (Davison and Hinkley 1997, sections 2.4 and 3.8). Higher is better
throughout. How well it works is measured by scripts/simulate_selection.py.

Shape letters: K models, Q questions, C clusters, R bootstrap draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

NUM_DRAWS = 10_000
CONFIDENCE = 0.95
POWER = 0.8
_EQUAL = 1e-12
"""Scores closer than this are equal: they are sums of the same numbers in another order."""
_DRAWS_AT_ONCE = 500


def mean_scores(values_KQ: Array, weights_Q: Array | None = None) -> Array:
    """Return the score of each model (K,): the mean of its values, weighted if told so."""
    means_K: Array = np.average(values_KQ, axis=1, weights=weights_Q)
    return means_K


def bootstrap_scores(
    values_KQ: Array,
    clusters_Q: NDArray[np.str_],
    *,
    weights_Q: Array | None = None,
    seed: int,
    num_draws: int = NUM_DRAWS,
) -> Array:
    """Return the scores (R, K) of all models on R resamples of the clusters, the same resample for all of them.

    score = sum of drawn values / sum of drawn weights, where the weight of a question is 1 unless told otherwise.
    Memory: C times a few kilobytes.
    """
    weights_Q = np.ones(values_KQ.shape[1]) if weights_Q is None else weights_Q
    names, cluster_of_Q = np.unique(clusters_Q, return_inverse=True)
    weights_C = np.bincount(cluster_of_Q, weights=weights_Q)
    sums_KC = np.stack([np.bincount(cluster_of_Q, weights=values_Q * weights_Q) for values_Q in values_KQ])
    rng = np.random.default_rng(seed)
    parts = []
    for first in range(0, num_draws, _DRAWS_AT_ONCE):
        times_RC = _draw_clusters(rng, min(_DRAWS_AT_ONCE, num_draws - first), len(names))
        parts.append((times_RC @ sums_KC.T) / (times_RC @ weights_C)[:, None])
    return np.concatenate(parts)


def _draw_clusters(rng: np.random.Generator, num_draws: int, num_clusters: int) -> Array:
    """Return how often each cluster is drawn, (R, C): C times with replacement in every draw."""
    drawn_RC = rng.integers(num_clusters, size=(num_draws, num_clusters))
    places_RC = drawn_RC + num_clusters * np.arange(num_draws)[:, None]
    times = np.bincount(places_RC.ravel(), minlength=num_draws * num_clusters)
    return times.reshape(num_draws, num_clusters).astype(np.float64)


def standard_errors(draws_RK: Array) -> Array:
    """Return the standard error of each score (K,): the standard deviation of its draws."""
    errors_K: Array = draws_RK.std(axis=0, ddof=1)
    return errors_K


def intervals(draws_RK: Array) -> Array:
    """Return the 95 % percentile interval of each score (K, 2)."""
    tail = (1 - CONFIDENCE) / 2
    limits_K2: Array = np.quantile(draws_RK, [tail, 1 - tail], axis=0).T
    return limits_K2


def share_best(draws_RK: Array) -> Array:
    """Return P(best) of each model (K,): the share of draws in which it has the highest score; equals share a draw."""
    is_best_RK = np.isclose(draws_RK, draws_RK.max(axis=1, keepdims=True), rtol=0, atol=_EQUAL)
    shares: Array = (is_best_RK / is_best_RK.sum(axis=1, keepdims=True)).mean(axis=0)
    return shares


def not_worse(scores_K: Array, draws_RK: Array) -> NDArray[np.bool_]:
    """Return for each model (K,) whether it may be the best: the set that cannot be told apart from the best.

    The set holds the truly best model with 95 % confidence. A model is out when the lead of some other one, in standard
    errors of that lead, is larger than the largest such lead that chance alone gives in 95 % of the draws, over all
    others at once: the bootstrap form, studentised and one-sided, of Hsu's multiple comparisons with the best (Annals
    of Statistics 9, 1981, 1026-1034). Comparing each with the winner alone, as if the winner had been named
    beforehand, leaves the truly best out more often the more models there are.
    """
    models = range(len(scores_K))
    return np.array([_largest_lead(scores_K, draws_RK, k) <= _critical_lead(scores_K, draws_RK, k) for k in models])


def detectable_difference(
    scores_K: Array, draws_RK: Array, *, disagreements_K: Array | None = None, power: float = POWER
) -> float:
    """Return how far a model has to be behind the best one to be told apart by `not_worse` with this probability.

    (critical lead + normal quantile of the power) x standard error of the difference; the median over all others. 0 for
    one model, and where all answer alike. `disagreements_K` are the shares of questions that each model and the best
    one answer differently: with them it is taken into account that a model which is further behind disagrees more.
    """
    best = choose_best(scores_K)
    quantile = NormalDist().inv_cdf(power)
    found = []
    for k in (k for k in range(len(scores_K)) if k != best):
        factor, error = _critical_lead(scores_K, draws_RK, k) + quantile, float(_lead_errors(draws_RK, k)[best])
        disagreement = 0.0 if disagreements_K is None else float(disagreements_K[k])
        found.append(_difference_of(factor, error, disagreement))
    return float(np.median(found)) if found else 0.0


def _difference_of(factor: float, error: float, disagreement: float) -> float:
    """Return the difference that is `factor` times its own standard error.

    Two models that differ by D on average and disagree on a share d of n questions: error^2 = (d - D^2) / n. As D
    grows, d does, from what it is now, d0, to about sqrt(d0^2 + D^2): seen in scripts/simulate_selection.py, where
    without it 51 % in place of 80 % are detected by 60 questions.
    """
    difference = factor * error
    if disagreement == 0 or error <= _EQUAL:
        return difference
    num_questions = disagreement / error**2
    for _ in range(50):  # it converges from below in a few rounds
        grown = math.hypot(disagreement, difference)
        difference = factor * math.sqrt((grown - min(difference, grown) ** 2) / num_questions)
    return difference


def disagreements(values_KQ: Array, weights_Q: Array | None = None) -> Array:
    """Return the mean squared difference of each model to the best one (K,): for hits, the share answered
    differently."""
    best = choose_best(mean_scores(values_KQ, weights_Q))
    return mean_scores((values_KQ - values_KQ[best]) ** 2, weights_Q)


def _lead_errors(draws_RK: Array, k: int) -> Array:
    """Return the standard error of the lead of each model over model k (K,)."""
    return standard_errors(draws_RK - draws_RK[:, [k]])


def _largest_lead(scores_K: Array, draws_RK: Array, k: int) -> float:
    """Return the largest lead of any model over model k, in standard errors; infinite where every draw says the
    same."""
    leads_K, errors_K = scores_K - scores_K[k], _lead_errors(draws_RK, k)
    is_certain_K = errors_K <= _EQUAL
    if (leads_K[is_certain_K] > _EQUAL).any():
        return float("inf")
    return float((leads_K / np.where(is_certain_K, 1, errors_K))[~is_certain_K].max(initial=0.0))


def _critical_lead(scores_K: Array, draws_RK: Array, k: int) -> float:
    """Return what the largest lead over model k stays under in 95 % of draws if none is better, in standard errors."""
    errors_K = _lead_errors(draws_RK, k)
    by_chance_RK = (draws_RK - scores_K) - (draws_RK - scores_K)[:, [k]]
    in_errors_RK = by_chance_RK / np.where(errors_K <= _EQUAL, np.inf, errors_K)
    return float(np.quantile(in_errors_RK.max(axis=1), CONFIDENCE))


def choose_best(scores_K: Array) -> int:
    """Return the number of the model with the highest score; the earlier of equals."""
    return int(np.flatnonzero(np.isclose(scores_K, scores_K.max(), rtol=0, atol=_EQUAL))[0])


def cross_fitted(values_KQ: Array, halves_Q: NDArray[np.int64], choose: Callable[[NDArray[np.bool_]], int]) -> Array:
    """Return what choosing by these questions is worth, question by question (Q,): chosen on one half, scored on the
    other.

    `choose` is given the mask of the questions to choose on, and returns the number of a model. Each question is scored
    once, by the model that the other half chose; the mean is free of the winner's optimism.
    """
    values_Q = np.empty(values_KQ.shape[1])
    for half in (0, 1):
        is_other_Q = halves_Q != half
        values_Q[is_other_Q] = values_KQ[choose(~is_other_Q)][is_other_Q]
    return values_Q


def should_stop(scores: Sequence[float], patience: int) -> bool:
    """Return whether the last `patience` scores of a run, in order, are all no higher than the best one before them."""
    if len(scores) <= patience:
        return False
    return max(scores[-patience:]) <= max(scores[:-patience]) + _EQUAL
