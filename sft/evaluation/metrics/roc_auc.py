"""The area under the ROC curve: how likely a positive item scores higher than a negative one, equals counted a half."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def roc_auc_values(scores: Sequence[float], is_positive: Sequence[bool]) -> NDArray[np.float64]:
    """Return a value for each item whose mean is the area, and whose standard error is that of DeLong et al. 1988.

    The area is no mean over items. Its influence values are: with A the area and V_i the share of the other class that
    item i is on the right side of, A + n / n_of_its_class (V_i - A).

    Raises:
        ValueError: all items are of one class.
    """
    all_N, positive_N = np.asarray(scores, dtype=np.float64), np.asarray(is_positive, dtype=bool)
    num_positive, num_negative = int(positive_N.sum()), int((~positive_N).sum())
    if not num_positive or not num_negative:
        raise ValueError("the area under the ROC curve needs items of both classes")
    won_N = np.empty(len(all_N))
    won_N[positive_N] = _share_below(all_N[positive_N], all_N[~positive_N])
    won_N[~positive_N] = 1 - _share_below(all_N[~positive_N], all_N[positive_N])
    area = won_N[positive_N].mean()
    size_N = np.where(positive_N, num_positive, num_negative)
    values_N: NDArray[np.float64] = area + len(all_N) / size_N * (won_N - area)
    return values_N


def _share_below(values_N: NDArray[np.float64], others_M: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return for each value which share of the others is below it, equals counted a half."""
    sorted_M = np.sort(others_M)
    places_N = np.searchsorted(sorted_M, values_N) + np.searchsorted(sorted_M, values_N, "right")
    shares_N: NDArray[np.float64] = places_N / (2 * len(others_M))
    return shares_N
