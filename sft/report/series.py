"""What a run wrote over its steps, as points to draw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sft.report.charts import Point
from sft.report.run_files import Line, Run


def series(lines: Sequence[Line], key: str) -> list[Point]:
    """Return (step, number under `key`) of each step that has one."""
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def source_losses(lines: Sequence[Line], source: str) -> list[tuple[float, float, float]]:
    """Return (step, mean loss of a source, its trained tokens) of each step that trained any."""
    own = ((line["step"], line["sources"].get(source, {})) for line in lines)
    return [(step, at["loss"], at["trained_tokens"]) for step, at in own if at.get("loss") is not None]


def losses(lines: Sequence[Line]) -> list[tuple[float, float, float]]:
    """Return (step, mean loss, trained tokens) of each step."""
    return [(line["step"], line["loss"], line["trained_tokens"]) for line in lines if line["loss"] is not None]


def binned(points: Sequence[tuple[float, float, float]], bins: int) -> list[Point]:
    """Return at most `bins` points (x, y) of points (x, y, weight), each the weighted mean of a stretch of them: the
    mean loss of its tokens, where the weights are tokens."""
    width = -(-len(points) // bins) if points else 1
    stretches = (np.array(points[first : first + width]) for first in range(0, len(points), width))
    means = (np.average(stretch[:, :2], axis=0, weights=stretch[:, 2]).tolist() for stretch in stretches)
    return [(x, y) for x, y in means]


def held_out(run: Run, source: str | None = None) -> list[Point]:
    """Return the held-out loss of a source, or of all, at each validation; step 0 is the base."""
    found = []
    for step, line in [(0, run.before), *((line["step"], line) for line in run.lines)]:
        validation = line.get("validation") or {}
        own = [validation.get(source, {})] if source else list(validation.values())
        known = [(one["loss"], one["trained_tokens"]) for one in own if one.get("loss") is not None]
        if known:
            found.append((float(step), sum(a * b for a, b in known) / sum(b for _, b in known)))
    return found
