"""Errors and intervals of scores whose items depend on each other within clusters: questions about the same image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

_Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def weighted_mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """Return the mean of the values, each counted by its weight; 0 for no values."""
    if not values:
        return 0.0
    if weights is None:
        return sum(values) / len(values)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def clustered_standard_error(
    values: ArrayLike, clusters: Sequence[str], weights: Sequence[float] | None = None
) -> float:
    """Return the standard error of a mean whose values depend on each other within clusters; 0 for no values.

    sqrt(sum over clusters of (sum of weighted deviations from the mean)^2) / sum of weights: Miller 2024 (arXiv
    2411.00640), equation 4. With a cluster per value it is sqrt(p (1 - p) / n) for hits and misses.
    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return 0.0
    each = np.ones(len(array)) if weights is None else np.asarray(weights, dtype=np.float64)
    _, cluster_of = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(cluster_of, weights=each * (array - np.average(array, weights=each)))
    return float(np.sqrt(np.sum(sums**2)) / each.sum())


def score_interval(
    score: float, standard_error: float, num_clusters: int, num_questions: int = 0, *, is_share: bool
) -> tuple[float, float]:
    """Return the 95 % interval of a score from its standard error by clusters.

    A share has Wilson's, on as many independent questions as have this error, p (1 - p) / SE^2, and no more than were
    asked; every other score has score +- t SE. t is Student's quantile for the number of clusters. Where all questions
    are hits, or all misses, or about one image, nothing is known of the spread between clusters: each then counts once.
    Coverage is measured by scripts/simulate_selection.py.
    """
    others = max(num_clusters - 1, 1)
    t, error = t_quantile(others), standard_error * math.sqrt(num_clusters / others)
    if not is_share:
        return score - t * error, score + t * error
    is_known = error > 1e-9 and 0 < score < 1  # 0, but for rounding
    return wilson_interval(score, min(num_questions, score * (1 - score) / error**2) if is_known else num_clusters, t)


def wilson_interval(share: float, size: float, quantile: float = _Z_95) -> tuple[float, float]:
    """Return Wilson's interval of a share seen in `size` independent trials (Wilson 1927), 95 % if left out; (0, 1) for
    none."""
    if size == 0:
        return 0.0, 1.0
    z2 = quantile**2
    center = (share + z2 / (2 * size)) / (1 + z2 / size)
    margin = quantile / (1 + z2 / size) * math.sqrt(max(share * (1 - share), 0) / size + z2 / (4 * size**2))
    return max(0.0, center - margin), min(1.0, center + margin)


def t_quantile(freedom: int) -> float:
    """Return the two-sided 95 % quantile of Student's distribution with so many degrees of freedom, 1 or more: the
    series of Fisher and Cornish (1960), off by 0.004 at 3 and by 0.0002 at 5."""
    if freedom < 3:
        return (12.7062, 4.3027)[freedom - 1]
    return _Z_95 + 2.37227 / freedom + 2.82250 / freedom**2 + 2.55585 / freedom**3 + 1.58953 / freedom**4
