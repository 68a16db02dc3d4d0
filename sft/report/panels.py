"""The charts of a run with their headings, in the order of the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from sft.report.charts import WIDTH, Series, chart
from sft.report.numbers import GIB, plain, round_percent, scientific
from sft.report.run_files import Line, Point, Run, held_out, losses, series, source_losses
from sft.report.selection_text import benchmarks_of, metric_of, score_text

BINS = 100
"""Largest number of points of a line of losses."""
HUES = (212, 340, 162, 270, 16, 190, 120, 305, 240)
"""Hues of the sources, as on the page of `inspect`."""
SMALL = 190
"""Height of a panel among many."""


class Panel(NamedTuple):
    """A chart with its heading."""

    title: str
    note: str
    svg: Markup
    hue: int | None = None


# -------------------------------------------------------------------------------------------------------- checkpoints


def score_panels(run: Run) -> Iterable[Panel]:
    """Yield the scores that chose; and those of every way in which the checkpoints were evaluated, if there are several
    or none has chosen yet, but for those that `category_panels` has."""
    chosen = run.selection
    if chosen:
        yield chosen_panel(chosen)
    by_kind: dict[tuple[str, ...], list[Line]] = {}
    for summary in run.evaluations:
        names = (summary.get("protocol") or summary.get("by") or summary.get("task", ""), summary.get("rank", ""))
        number = f"{summary['shots']} shots" if summary.get("shots") else ""
        if summary["benchmark"] not in benchmarks_of(chosen or {}):
            by_kind.setdefault((summary["benchmark"], *names, number), []).append(summary)
    if chosen and len(by_kind) < 2:
        return
    for (benchmark, protocol, rank, shots), summaries in by_kind.items():
        summaries.sort(key=lambda summary: summary["step"])
        last, name = summaries[-1], metric_of(summaries[-1]).name
        label = f"{name} on {benchmark}" + f" by {rank}" * bool(rank)
        svg = _score_chart(summaries, last, chosen, label=label, chance=last.get("chance"))
        note = f"{benchmark}, {protocol}, {last.get('questions', 0):,} questions" + f", {shots}" * bool(shots)
        yield Panel(f"By {rank}" if rank else name[:1].upper() + name[1:], note, svg)


def shots_panels(run: Run) -> Iterable[Panel]:
    """Yield a small panel for each task that the last checkpoint was asked with several numbers of shots."""
    by_task: dict[tuple[str, str], dict[int, dict[int, Line]]] = {}
    for summary in run.evaluations:
        own = by_task.setdefault((summary["benchmark"], summary.get("rank", "")), {})
        own.setdefault(summary["step"], {})[summary.get("shots", 0)] = summary
    for (benchmark, _), by_step in by_task.items():
        step = max((step for step, own in by_step.items() if len(own) > 1), default=None)
        if step is not None:
            scores = [one | {"step": shots} for shots, one in sorted(by_step[step].items())]
            svg = _score_chart(scores, scores[0], None, label=f"score on {benchmark} by shots", height=SMALL)
            yield Panel(f"{benchmark}, by shots", f"{metric_of(scores[0]).name} at step {step:,}", svg)


def chosen_panel(chosen: Line, *, width: int = WIDTH) -> Panel:
    """Return the scores of a selection, which is an object of the keys of selection.json."""
    label = "score of each checkpoint with its interval"
    svg = _score_chart(chosen["scores"], chosen, chosen, is_whole=False, label=label, width=width)
    ranks = " and ".join(chosen.get("ranks", ()))
    what = f"mean of {ranks}" if " and " in ranks else chosen["benchmark"]
    key = "ring: selected" + "; thin: cannot be told apart from the best" * (len(chosen["tied"]) > 1)
    return Panel("Held-out loss" if chosen["by"] == "loss" else "Score", f"{what} · {key}", svg)


def category_panels(chosen: Line, *, width: int = WIDTH) -> Iterable[Panel]:
    """Yield a small panel for each benchmark that chose, or for each category of the only one, if there are several."""
    parts = benchmarks_of(chosen) or chosen.get("categories", {})
    steps = [score["step"] for score in chosen["scores"]]
    for name, part in parts.items() if len(parts) > 1 else ():
        columns = zip(steps, part["scores"], part["intervals"], strict=True)
        scores = [{"step": step, "score": score, "interval": interval} for step, score, interval in columns]
        own = part if "metric" in part else chosen
        svg = _score_chart(scores, own, chosen, label=f"score in {name}", height=SMALL, width=width)
        kind = "samples" if "loss" in (chosen["by"], part.get("task")) else "questions"
        yield Panel(name or "without category", f"{part['questions']:,} {kind}", svg)


def _score_chart(
    scores: Sequence[Line], own: Line, chosen: Line | None, *, is_whole: bool = True, **drawn: Any
) -> Markup:
    """Return scores of checkpoints over their steps, with intervals, and rings around those of the selection. `own`
    says what they measure; with `is_whole`, a share is drawn from 0 to 1."""
    is_share, steps = metric_of(own).is_share, [one["step"] for one in scores]
    rings: dict[float, str] = {}
    if chosen:
        rings |= {one["step"]: "tied" for one in chosen["scores"] if one["checkpoint"] in chosen["tied"]}
        rings |= {one["step"]: "ring" for one in chosen["scores"] if one["checkpoint"] == chosen["selected"]}
    series = Series(
        points=[(one["step"], one["score"]) for one in scores],
        style="scores",
        intervals=[one.get("interval") for one in scores],
        tips=[f"step {one['step']:,}: {score_text(one['score'], own)}" for one in scores],
        rings=[rings.get(step, "") for step in steps],
    )
    limits = (0, 1) if is_share and is_whole else None
    return chart([series], steps=steps, format_y=round_percent if is_share else plain, limits=limits, **drawn)


# ------------------------------------------------------------------------------------------------------------ losses


def loss_panels(run: Run) -> Iterable[Panel]:
    """Yield the loss of training and of held-out data, and the learning rate."""
    if not run.lines:
        return
    svg = _loss_chart(
        losses(run.lines),
        Series(points=held_out(run), style="dots", colour="var(--second)"),
        label="training loss and held-out loss",
    )
    yield Panel("Loss", "per trained token" + "; dots: held out" * bool(held_out(run)), svg)
    rates = series(run.lines, "learning_rate")
    svg = chart([Series(points=_thin(rates))], label="learning rate", format_y=scientific, from_zero=True)
    yield Panel("Learning rate", "of all groups without their own", svg)


def source_panels(run: Run) -> Iterable[Panel]:
    """Yield the training and held-out loss of each source, if there are several."""
    if len(run.recipe.data.mixture) < 2:
        return
    last = float(run.lines[-1]["step"]) if run.lines else None
    for number, source in enumerate(run.recipe.data.mixture):
        points = source_losses(run.lines, source.name)
        hue = HUES[number % len(HUES)]
        apart = held_out(run, source.name)
        tips = [f"held out, step {step:,.0f}: {loss:.3f}" for step, loss in apart]
        svg = _loss_chart(
            points,
            Series(points=apart, style="dots", colour="var(--text)", tips=tips),
            colour=f"hsl({hue} 55% var(--level))",
            label=f"loss of {source.name}",
            last_step=last,
            height=SMALL,
        )
        if svg:
            ends = f"{points[0][1]:.3g} to {_means(points)[-1][1]:.3g}" if points else "not trained yet"
            yield Panel(source.name, ends + (f" · held out {apart[-1][1]:.3g}" if apart else ""), svg, hue)


def _loss_chart(
    points: Sequence[tuple[float, float, float]], apart: Series, *, colour: str = "var(--accent)", **drawn: Any
) -> Markup:
    """Return training losses (step, loss, tokens) with their means, and held-out ones."""
    faint = Series(points=_thin([(step, loss) for step, loss, _ in points]), style="faint", colour=colour)
    return chart([faint, Series(points=_means(points), colour=colour), apart], format_y=plain, log=True, **drawn)


def speed_panels(run: Run) -> Iterable[Panel]:
    """Yield speed, memory and the norm of the gradient, as far as they were recorded."""
    if speeds := series(run.lines, "tokens_per_second"):
        yield Panel("Speed", "tokens/s", _small_chart(*_with_means(speeds), label="tokens per second", from_zero=True))
    if memory := series(run.lines, "peak_memory_bytes"):
        in_gib = Series(points=[(step, size / GIB) for step, size in _thin(memory)])
        svg = _small_chart(in_gib, label="largest memory so far", from_zero=True)
        yield Panel("Memory", "GiB, the highest so far of one process", svg)
    if norms := series(run.lines, "grad_norm"):
        yield Panel("Gradient norm", "before clipping", _small_chart(*_with_means(norms), label="norm", log=True))


def _small_chart(*some: Series, **drawn: Any) -> Markup:
    return chart(some, format_y=plain, height=SMALL, **drawn)


def _with_means(points: Sequence[Point]) -> tuple[Series, Series]:
    means = _means([(step, value, 1.0) for step, value in points])
    return Series(points=_thin(points), style="faint"), Series(points=means)


def _means(points: Sequence[tuple[float, float, float]]) -> list[Point]:
    """Return weighted means of five steps and more, at most `BINS` of them."""
    return binned(points, min(max(len(points) // 5, 12), BINS))


def binned(points: Sequence[tuple[float, float, float]], bins: int) -> list[Point]:
    """Return at most `bins` points (x, y) of points (x, y, weight), each the weighted mean of a stretch of them: the
    mean loss of its tokens, where the weights are tokens."""
    width = -(-len(points) // bins) if points else 1
    stretches = (np.array(points[first : first + width]) for first in range(0, len(points), width))
    means = (np.average(stretch[:, :2], axis=0, weights=stretch[:, 2]).tolist() for stretch in stretches)
    return [(x, y) for x, y in means]


def _thin(points: Sequence[Point], number: int = 600) -> list[Point]:
    """Return at most `number` of the points, the last among them: a run may have 100,000 steps."""
    every = -(-len(points) // number) or 1
    return [*points[:-1:every], *points[-1:]]
