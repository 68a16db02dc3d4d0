"""P(best): how probable it is that a model is truly the best, by a hierarchical normal model.

The share of bootstrap draws in which a model is best says too much: draws are centred on the observed scores, whose
spread is the true spread plus the error, so .74 is said where .54 is true. Here the true scores have a prior whose size
and shape the data weigh, and posterior draws are counted. Errors are taken as equal and independent, so that posterior
means keep the order of the scores. Calibration: scripts/simulate_selection.py.

Shape letters: K models, J = K - 1 contrasts of them, S shapes of the prior, G its sizes, R posterior draws.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from sft.selection.clusters import Array, Clusters, Joint

NUM_DRAWS = 10_000
_SIZES_G = np.tan((np.arange(256) + 0.5) / 256 * np.pi / 2) ** 2
"""Variance of the true scores over that of the errors; even in the angle, which is a half-Cauchy prior on its root."""


class _Prior(NamedTuple):
    """Shapes of the covariance of true scores, each by its axes; the mean variance of each is 1."""

    weights_S: Array
    variances_SJ: Array
    axes_SKJ: Array


def probability_best(joint: Joint, *, seed: int, is_curve: bool = True, num_draws: int = NUM_DRAWS) -> Array:
    """Return P(best) of each model (K,); they sum to 1. Where no score has an error, the highest ones share it.

    `is_curve` says that the models are the checkpoints of a run in their order: neighbours are then taken to be alike
    as far as the scores bear it out. Otherwise the order of the models does not matter. Of several benchmarks, each has
    a posterior of its own: a flat one is then shrunk to what it is, whatever its weight.
    """
    rng = np.random.default_rng(seed)
    draws_RK = joint.of([_posterior_scores(part, rng, is_curve, num_draws) for part in joint.parts])
    is_best_RK = draws_RK >= draws_RK.max(axis=1, keepdims=True) - 1e-12
    shares_K: Array = (is_best_RK / is_best_RK.sum(axis=1, keepdims=True)).mean(axis=0)
    return shares_K


def _posterior_scores(part: Clusters, rng: np.random.Generator, is_curve: bool, num_draws: int) -> Array:
    """Return draws (R, K) of the true scores on one benchmark, apart from their mean."""
    scores_K, error_variance = part.scores, part.error_variance
    if len(scores_K) == 1 or error_variance < 1e-20:
        return np.tile(scores_K, (num_draws, 1))
    prior = _prior(len(scores_K), is_curve)
    along_SJ = np.einsum("skj,k->sj", prior.axes_SKJ, scores_K)
    ratio_SGJ = 1 + _SIZES_G[:, None] * prior.variances_SJ[:, None]  # variance along an axis over its error's
    log_SG = -0.5 * (np.log(ratio_SGJ) + along_SJ[:, None] ** 2 / (error_variance * ratio_SGJ)).sum(axis=2)
    log_SG += np.log(prior.weights_S)[:, None]
    p_SG = np.exp(log_SG - log_SG.max())
    counts = rng.multinomial(num_draws, (p_SG / p_SG.sum()).ravel())
    shape_R, size_R = np.divmod(rng.permutation(np.repeat(np.arange(len(counts)), counts)), len(_SIZES_G))
    kept_RJ = 1 - 1 / ratio_SGJ[shape_R, size_R]
    drawn_RJ = kept_RJ * along_SJ[shape_R] + np.sqrt(kept_RJ * error_variance) * rng.standard_normal(kept_RJ.shape)
    draws_RK = np.empty((num_draws, len(scores_K)))
    for shape in np.unique(shape_R):
        draws_RK[shape_R == shape] = drawn_RJ[shape_R == shape] @ prior.axes_SKJ[shape].T
    return draws_RK


@cache
def _prior(num_models: int, is_curve: bool) -> _Prior:
    """Return shapes of the prior: exchangeable; for a curve also smooth over the index and over its logarithm, three
    lengths each, with and without 20 % noise, and all of these with a trend that levels off early or late."""
    index_K, ones_JJ = np.arange(num_models), np.eye(num_models - 1)
    basis = np.linalg.qr(np.column_stack([np.ones(num_models), np.eye(num_models)[:, 1:]]))[0][:, 1:]
    shapes = [(1.0, ones_JJ)]
    for x_K in (index_K / (num_models - 1), np.log1p(index_K) / np.log(num_models)) if is_curve else ():
        for length in (0.15, 0.3, 0.6):
            smooth = _unit(basis.T @ np.exp(-0.5 * ((x_K[:, None] - x_K) / length) ** 2) @ basis)
            shapes += [(1 / 12, smooth), (1 / 12, 0.8 * smooth + 0.2 * ones_JJ)]
    if is_curve and num_models > 2:
        trends = [basis.T @ trend_K for trend_K in (1 / (1 + index_K), np.log1p(index_K))]
        shapes += [(w / 2, shape + 30 * _unit(np.outer(trend, trend))) for w, shape in shapes for trend in trends]
    found = [np.linalg.eigh(shape) for _, shape in shapes]
    weights_S = np.array([weight for weight, _ in shapes])
    variances_SJ = np.maximum(np.stack([values for values, _ in found]), 0)
    return _Prior(weights_S, variances_SJ, np.stack([basis @ vectors for _, vectors in found]))


def _unit(shape_JJ: Array) -> Array:
    return np.asarray(shape_JJ * len(shape_JJ) / np.trace(shape_JJ))
