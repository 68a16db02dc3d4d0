"""Loss spikes: steps whose loss is far above what the last steps lead to expect of the same sources.

The expected loss of a step is the mean of the usual losses of its sources over its trained tokens; the usual distance
from it depends on the sources too. So neither a step that holds more of a hard source nor the end of an easy one is a
spike. "Usual" means the median: mean and standard deviation are moved by the outliers that they are to find, and one
spike would hide the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

WINDOW = 128
"""Number of past steps that a step is compared with. OLMo-core's optimizer, which leaves such steps out, has the same
window and limit."""
LIMIT = 6.0
"""Standard deviations above the expected loss from which on a loss is a spike. Of normal noise not one step in 400,000
is that far."""
LEAST_STEPS, LEAST_OF_SOURCE = 32, 8
"""Steps before the first spike is reported, and steps with a source before its usual loss is known. A spread that is
estimated from 32 steps is within a third of the true one: 2 steps in 100,000 would be spikes."""
LEAST_RISE = 0.1
"""Share of the expected loss below which a rise is no spike, however small the spread before."""
_SIGMA = 1.4826
"""The standard deviation of normal noise, in median absolute deviations."""
_TINY = 1e-12


class Spike(NamedTuple):
    """A loss that is far above the expected loss."""

    loss: float
    expected: float
    spread: float
    """Standard deviation of the difference between loss and expected loss in the steps before."""


class Spikes:
    """The losses of the last steps of a run, with which the next step is compared."""

    def __init__(self, sources: Sequence[str]) -> None:
        self.names = sources
        self._losses: deque[Floats] = deque(maxlen=WINDOW + 1)  # of each source; nan where it had no trained token
        self._weights: deque[Floats] = deque(maxlen=WINDOW + 1)  # share of each source in the trained tokens

    def add(self, line: Mapping[str, Any]) -> Spike | None:
        """Take in a line of metrics.jsonl and return its loss if that is a spike. A loss that is not finite is ignored:
        it is reported in nonfinite.jsonl."""
        own = [line["sources"].get(name, {"loss": None, "trained_tokens": 0}) for name in self.names]
        tokens_S = np.array([source["trained_tokens"] for source in own], np.float64)
        losses_S = np.array([np.nan if source["loss"] is None else source["loss"] for source in own], np.float64)
        if not tokens_S.any() or not np.isfinite(losses_S[tokens_S > 0]).all():
            return None
        self._losses.append(losses_S)
        self._weights.append(tokens_S / tokens_S.sum())
        return self._judge_last() if len(self._losses) > LEAST_STEPS else None

    def _judge_last(self) -> Spike | None:
        """Compare the last of N steps with those before it."""
        losses_NS, weights_NS = np.stack(self._losses), np.stack(self._weights)
        is_known_S = np.isfinite(losses_NS[:-1]).sum(0) >= LEAST_OF_SOURCE
        losses_NK, weights_NK = losses_NS[:, is_known_S], weights_NS[:, is_known_S]
        usual_K = np.nanmedian(losses_NK[:-1], 0)
        spread_K = _SIGMA * np.nanmedian(np.abs(losses_NK[:-1] - usual_K), 0)
        rises_N = np.nansum(weights_NK * (losses_NK - usual_K), 1)
        spreads_N = np.sqrt(((weights_NK * spread_K) ** 2).sum(1)) + _TINY  # were the sources' rises independent
        scaled_N = rises_N / spreads_N
        middle = np.median(scaled_N[:-1])
        spread = float(_SIGMA * np.median(np.abs(scaled_N[:-1] - middle)) * spreads_N[-1])
        rise = float(rises_N[-1] - middle * spreads_N[-1])
        loss = float(np.nansum(weights_NS[-1] * losses_NS[-1]))
        is_spike = rise > max(LIMIT * spread, LEAST_RISE * (loss - rise))
        return Spike(loss, loss - rise, spread) if is_spike else None
