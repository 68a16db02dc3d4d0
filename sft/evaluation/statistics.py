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


def effective_size(share: float, standard_error: float, num_clusters: int) -> float:
    """Return how many independent questions would have this standard error: p (1 - p) / SE^2.

    Where all are hits, or all misses, or about one image, nothing is known of the spread between clusters: then each
    counts once.
    """
    if standard_error < 1e-9:  # 0, but for rounding
        return num_clusters
    return share * (1 - share) / standard_error**2


def wilson_interval(share: float, size: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share seen in `size` independent trials (Wilson 1927); (0, 1) for none."""
    if size == 0:
        return 0.0, 1.0
    z2 = _Z_95**2
    center = (share + z2 / (2 * size)) / (1 + z2 / size)
    margin = _Z_95 / (1 + z2 / size) * math.sqrt(share * (1 - share) / size + z2 / (4 * size**2))
    return max(0.0, center - margin), min(1.0, center + margin)


def normal_interval(mean: float, standard_error: float) -> tuple[float, float]:
    """Return the 95 % interval of a mean by the normal distribution."""
    return mean - _Z_95 * standard_error, mean + _Z_95 * standard_error
