"""How sure one can be of a comparison: scores of several models on the same questions, which come in clusters.

Leads are judged by one paired cluster bootstrap: clusters are drawn with replacement, each with all its questions, and
every model is scored on the same draw (Davison and Hinkley 1997, sections 2.4 and 3.8). Higher is better throughout.
How well it works is measured by scripts/simulate_selection.py.

Shape letters: K models, C clusters, R bootstrap draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.evaluation.statistics import score_interval
from sft.selection.clusters import Array, Interval, Joint
from sft.selection.posterior import probability_best

NUM_DRAWS = 10_000
CONFIDENCE = 0.95
MIN_IMAGES = 100
"""From which on the detectable difference is said."""
_QUANTILE = NormalDist().inv_cdf(0.8)
"""Of its power, 80 %."""
HALVINGS = 50
"""How often the images are halved for the cross-fitted figure."""
_EQUAL = 1e-12
"""Scores closer than this are equal: they are sums of the same numbers in another order."""
_DRAWS_AT_ONCE = 500


def bootstrap_each(joint: Joint, *, seed: int, num_draws: int = NUM_DRAWS) -> list[Array]:
    """Return the scores (R, K) of all models on R resamples of the clusters of each benchmark, the same resample for
    all of them: sum of drawn values / sum of drawn weights. Memory: C times a few kilobytes."""
    rng = np.random.default_rng(seed)
    drawn = []
    for part in joint.parts:
        rounds = []
        for first in range(0, num_draws, _DRAWS_AT_ONCE):
            times_RC = _draw_clusters(rng, min(_DRAWS_AT_ONCE, num_draws - first), len(part.weights_C))
            rounds.append((times_RC @ part.sums_KC.T) / (times_RC @ part.weights_C)[:, None])
        drawn.append(np.concatenate(rounds))
    return drawn


def bootstrap_scores(joint: Joint, *, seed: int, num_draws: int = NUM_DRAWS) -> Array:
    """Return the joint scores (R, K) of all models on the resamples of `bootstrap_each`."""
    return joint.of(bootstrap_each(joint, seed=seed, num_draws=num_draws))


def _draw_clusters(rng: np.random.Generator, num_draws: int, num_clusters: int) -> Array:
    """Return how often each cluster is drawn, (R, C): C times with replacement in every draw."""
    drawn_RC = rng.integers(num_clusters, size=(num_draws, num_clusters))
    places_RC = drawn_RC + num_clusters * np.arange(num_draws)[:, None]
    times = np.bincount(places_RC.ravel(), minlength=num_draws * num_clusters)
    return times.reshape(num_draws, num_clusters).astype(np.float64)


def not_worse(scores_K: Array, draws_RK: Array, num_clusters: int = 0) -> NDArray[np.bool_]:
    """Return for each model (K,) whether it may be the best: the set that cannot be told apart from the best.

    The set holds the truly best model with 95 % confidence. A model is out when the lead of some other one, in standard
    errors of that lead, is larger than the largest such lead that chance alone gives in 95 % of the draws, over all
    others at once: the bootstrap form, studentised and one-sided, of Hsu's multiple comparisons with the best (Annals
    of Statistics 9, 1981, 1026-1034). Comparing each with the winner alone, as if the winner had been named
    beforehand, leaves the truly best out more often the more models there are. Of the others, those that are clearly
    behind the model are left out: see `_critical_lead`.
    """
    models = range(len(scores_K))
    return np.array(
        [_leads(scores_K, draws_RK, k).max() <= _critical_lead(scores_K, draws_RK, k, num_clusters) for k in models]
    )


def clearly_worse(scores_K: Array, draws_RK: Array, than: int) -> NDArray[np.bool_]:
    """Return for each model (K,) whether it is significantly worse than one that was named beforehand. Of models that
    are not, 5 % at most are found to be, over all of them at once."""
    worse_K = _leads(-scores_K, -draws_RK, than)
    return np.asarray(worse_K > max(_critical_lead(-scores_K, -draws_RK, than), _EQUAL))


def detectable_difference(scores_K: Array, draws_RK: Array, num_clusters: int) -> float | None:
    """Return how far a model has to be behind the best one to be told apart by `not_worse` in 80 % of comparisons: the
    median over all others of (critical lead + quantile of the power) x standard error of the difference.

    0 for one model, and where all answer alike. None for too few images: one which is further behind disagrees more,
    so that 70 % are detected by 60 images (scripts/simulate_selection.py).
    """
    if num_clusters < MIN_IMAGES:
        return None
    best = choose_best(scores_K)
    found = [
        (_critical_lead(scores_K, draws_RK, k, num_clusters) + _QUANTILE) * _lead_errors(draws_RK, k)[best]
        for k in range(len(scores_K))
        if k != best
    ]
    return float(np.median(found)) if found else 0.0


def _lead_errors(draws_RK: Array, k: int) -> Array:
    """Return the standard error of the lead of each model over model k (K,)."""
    errors_K: Array = (draws_RK - draws_RK[:, [k]]).std(axis=0, ddof=1)
    return errors_K


def _leads(scores_K: Array, draws_RK: Array, k: int) -> Array:
    """Return the lead of each model over model k (K,), in standard errors; infinite where every draw says the same."""
    leads_K, errors_K = scores_K - scores_K[k], _lead_errors(draws_RK, k)
    certain_K = np.where(np.abs(leads_K) > _EQUAL, np.copysign(np.inf, leads_K), 0)
    return np.where(errors_K > _EQUAL, leads_K / np.where(errors_K > _EQUAL, errors_K, 1), certain_K)


def _critical_lead(scores_K: Array, draws_RK: Array, k: int, num_clusters: int = 0) -> float:
    """Return what the largest lead over model k stays under in 95 % of draws if none is better, in standard errors.

    Models that are behind model k by more than sqrt(2 log log C) standard errors do not count: they cannot be the best
    (Hansen 2005, Journal of Business and Economic Statistics 23, 365-380). For few clusters all of them count.
    """
    errors_K = _lead_errors(draws_RK, k)
    by_chance_RK = (draws_RK - scores_K) - (draws_RK - scores_K)[:, [k]]
    in_errors_RK = by_chance_RK / np.where(errors_K <= _EQUAL, np.inf, errors_K)
    limit = math.sqrt(2 * math.log(math.log(num_clusters))) if num_clusters >= 16 else math.inf
    in_errors_RK = in_errors_RK[:, _leads(scores_K, draws_RK, k) >= -limit]
    return float(np.quantile(in_errors_RK.max(axis=1), CONFIDENCE))


def choose_best(scores_K: Array) -> int:
    """Return the number of the model with the highest score; the earlier of equals."""
    return int(np.argmax(scores_K >= scores_K.max() - _EQUAL))


def cross_fitted(joint: Joint, choose: Callable[[Joint], int], seed: int, halvings: int = HALVINGS) -> list[float]:
    """Return what choosing is worth on each benchmark: the mean score of what the other half of its clusters chooses.

    `choose` is given the half to choose on, of every benchmark, and returns the number of a model. The mean over many
    seeded, balanced halvings is a smooth function of all data, so the error of the chosen model is its own; it is free
    of the winner's optimism. Each benchmark needs two clusters at least.
    """
    rng = np.random.default_rng(seed)
    sums = np.zeros(len(joint.parts))
    for _ in range(halvings):
        firsts = [rng.permutation(len(part.weights_C)) < len(part.weights_C) // 2 for part in joint.parts]
        half, other = joint.on_clusters(firsts), joint.on_clusters([~first for first in firsts])
        for scored, chosen in ((other, choose(half)), (half, choose(other))):
            sums += [part.sums_KC[chosen].sum() for part in scored.parts]
    return [float(s / halvings / part.weights_C.sum()) for s, part in zip(sums, joint.parts, strict=True)]


class Comparison(NamedTuple):
    """The first of two models against the second. Higher is better."""

    difference: float
    interval: Interval
    p_better: float
    detectable_difference: float | None
    """None for too few images to say."""
    is_better: bool
    """Whether the first one is significantly better, one-sided, at 5 %."""


def compare_pair(pair: Joint, *, seed: int, num_draws: int = NUM_DRAWS) -> Comparison:
    """Return how the first of two models differs from the second, paired by cluster."""
    scores_K, draws_RK = pair.scores, bootstrap_scores(pair, seed=seed, num_draws=num_draws)
    difference, error = float(scores_K[0] - scores_K[1]), float(np.linalg.norm(np.subtract(*pair.deviations)))
    if pair.metric.is_share:  # half a question more in each cell of hits and misses: Agresti and Min 2005
        error = math.hypot(error, 1 / pair.parts[0].num_questions)
    return Comparison(
        difference=difference,
        interval=score_interval(difference, error, pair.num_clusters, is_share=False),
        p_better=float(probability_best(pair, seed=seed, is_curve=False)[0]),
        detectable_difference=detectable_difference(scores_K, draws_RK, pair.num_clusters),
        is_better=bool(clearly_worse(scores_K, draws_RK, than=0)[1]),
    )


def should_stop(scores: Sequence[float], patience: int) -> bool:
    """Return whether the last `patience` scores of a run, in order, are all no higher than the best one before them."""
    if len(scores) <= patience:
        return False
    return max(scores[-patience:]) <= max(scores[:-patience]) + _EQUAL
