"""Normalised discounted cumulative gain: how high a ranking puts what is relevant, in two variants."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ndcg(scores: Sequence[float], relevance: Sequence[float], *, is_cut: bool = True) -> float:
    """Return the gain of a ranking by its scores over that of the best one; 0 where nothing is relevant.

    A place p, from 1 on, counts 1 / log2(p + 1). With `is_cut` only as many places count as options are relevant, as in
    VisDial's own code; else all do, as in scikit-learn's `ndcg_score`. Options of equal scores keep their order.
    """
    gains = np.asarray(relevance, dtype=np.float64)
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    places = int((gains > 0).sum()) if is_cut else len(gains)
    discounts = 1 / np.log2(np.arange(2, places + 2))
    best = float(np.sort(gains)[::-1][:places] @ discounts)
    return float(gains[order][:places] @ discounts) / best if best else 0.0
