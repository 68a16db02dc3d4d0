"""Values summed by cluster: all that the figures of a selection are computed from, of one benchmark or of several.

Shape letters: K models, Q questions, C clusters, B benchmarks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.core.metric import ACCURACY, Metric
from sft.evaluation.statistics import score_interval

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Interval = tuple[float, float]

INDEX = Metric(name="index", is_share=False, unit="standard deviations")
"""What several benchmarks that choose together are measured by."""


class Figure(NamedTuple):
    """A score as it is printed: with the sign that its metric has."""

    score: float
    standard_error: float
    interval: Interval
    """95 %"""


class Clusters(NamedTuple):
    """The values of K models on one benchmark, higher is better, summed over the questions of each cluster."""

    sums_KC: Array
    """Of values, each times its weight."""
    weights_C: Array
    num_questions: int
    metric: Metric = ACCURACY

    @property
    def scores(self) -> Array:
        """The mean value of each model (K,)."""
        return np.asarray(self.sums_KC.sum(axis=1) / self.weights_C.sum())

    @property
    def deviations(self) -> Array:
        """What each cluster adds to the error of each score (K, C). To first order the covariance of the scores is the
        sum of products over clusters (Miller 2024, arXiv 2411.00640, equation 4)."""
        return np.asarray((self.sums_KC - self.scores[:, None] * self.weights_C) / self.weights_C.sum())

    @property
    def error_variance(self) -> float:
        """The variance of a score's error about the mean error of all models."""
        own_KC, (num_models, num_clusters) = self.deviations - self.deviations.mean(axis=0), self.sums_KC.shape
        return float((own_KC**2).sum() / max(num_models - 1, 1) * num_clusters / max(num_clusters - 1, 1))

    @property
    def reliability(self) -> float:
        """The share of the variance of the scores that is not noise: max(0, 1 - variance of the errors / variance)."""
        variance = float(self.scores.var(ddof=1)) if len(self.sums_KC) > 1 else 0.0
        return max(0.0, 1 - self.error_variance / variance) if variance > 1e-24 else 0.0


def sum_by_cluster(
    values_KQ: Array, clusters_Q: NDArray[np.str_], weights_Q: Array | None = None, *, metric: Metric = ACCURACY
) -> Clusters:
    """Return the sums over the questions of each cluster. The order of the questions does not matter."""
    weights_Q = np.ones(values_KQ.shape[1]) if weights_Q is None else weights_Q
    _, cluster_of_Q = np.unique(clusters_Q, return_inverse=True)
    *sums_KC, weights_C = [np.bincount(cluster_of_Q, weights=row) for row in (*values_KQ * weights_Q, weights_Q)]
    return Clusters(np.asarray(sums_KC), np.asarray(weights_C), len(weights_Q), metric)


class Joint(NamedTuple):
    """Benchmarks whose scores are one: the sum over them of factor x (score - centre)."""

    parts: tuple[Clusters, ...]
    factors: tuple[float, ...] = (1.0,)
    centers: tuple[float, ...] = (0.0,)
    weights: tuple[float, ...] = (1.0,)
    """What each counts; 1 in sum."""

    def of(self, scores_B: Sequence[Array] | Sequence[float]) -> Array:
        """Return the joint scores from those on each benchmark, in the same shape."""
        terms = zip(self.factors, scores_B, self.centers, strict=True)
        return np.asarray(sum(factor * (np.asarray(score) - center) for factor, score, center in terms))

    @property
    def scores(self) -> Array:
        """The score of each model (K,)."""
        return self.of([part.scores for part in self.parts])

    @property
    def deviations(self) -> Array:
        """What each cluster of any benchmark adds to the error of each score (K, C); see `Clusters`."""
        return np.hstack([factor * part.deviations for factor, part in zip(self.factors, self.parts, strict=True)])

    @property
    def num_clusters(self) -> int:
        """C"""
        return sum(len(part.weights_C) for part in self.parts)

    @property
    def metric(self) -> Metric:
        """What the joint score measures."""
        return self.parts[0].metric if len(self.parts) == 1 else INDEX

    def figure(self, values_B: Sequence[float], model: int) -> Figure:
        """Return the joint score of values on each benchmark, with the error of a model. Its interval recovers the
        variances from those of the benchmarks (Zou and Donner 2008, Statistics in Medicine 27, 1693-1702); of one it
        is its own."""
        errors_B = [float(np.linalg.norm(part.deviations[model])) for part in self.parts]
        limits = [
            score_interval(value, error, len(part.weights_C), part.num_questions, is_share=part.metric.is_share)
            for part, value, error in zip(self.parts, values_B, errors_B, strict=True)
        ]
        scaled = np.array(self.factors)[:, None] * (np.array(limits) - np.array(values_B)[:, None])
        score, (below, above) = float(self.of(values_B)), np.linalg.norm(scaled, axis=0).tolist()
        low, high = sorted(self.metric.sign * limit for limit in (score - below, score + above))
        error = float(np.linalg.norm(np.multiply(self.factors, errors_B)))
        return Figure(self.metric.sign * score, error, (low, high))

    def figures(self) -> list[Figure]:
        """Return the score of each model with its error and interval."""
        values_KB = np.stack([part.scores for part in self.parts], axis=1).tolist()
        return [self.figure(values_B, k) for k, values_B in enumerate(values_KB)]

    def on_clusters(self, masks_B: Sequence[Mask]) -> Joint:
        """Return the same on some of the clusters of each benchmark."""
        parts = (
            part._replace(sums_KC=part.sums_KC[:, mask], weights_C=part.weights_C[mask])
            for part, mask in zip(self.parts, masks_B, strict=True)
        )
        return self._replace(parts=tuple(parts))


def joined(parts: Sequence[Clusters], weights: Sequence[float | None]) -> Joint:
    """Return one score from several benchmarks: the mean of z-scores over models, each counted by the given weight, or
    where None is given by its reliability. One benchmark alone keeps its own score.

    Plain z-scores blow the noise of a flat benchmark up to the size of a real gain: simulated on 8 benchmarks, two of
    them nearly flat, choosing by them loses twice as much as by weighted ones. Where nothing is reliable, all count
    alike.
    """
    if len(parts) == 1:
        return Joint(tuple(parts))
    own = np.array([p.reliability if weight is None else weight for p, weight in zip(parts, weights, strict=True)])
    own = own / own.sum() if own.any() else np.full(len(parts), 1 / len(parts))
    spreads = np.array([part.scores.std() for part in parts])
    factors = np.divide(own, spreads, out=np.zeros_like(own), where=spreads > 1e-12)
    centers = [float(part.scores.mean()) for part in parts]
    return Joint(tuple(parts), tuple(factors.tolist()), tuple(centers), tuple(own.tolist()))
