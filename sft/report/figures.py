"""The figures of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from sft.report.charts import GIB, Series, chart, percent, plain, round_percent, scientific
from sft.report.reading import Line, Point, Run, binned, held_out, losses, series, source_losses
from sft.report.telling import score_of, score_text

BINS = 100
"""Largest number of points of a line of losses."""
HUES = (212, 340, 162, 270, 16, 190, 120, 305, 240)
"""Of the sources, as on the page of `inspect`."""
SMALL = 190
"""Height of a panel among many."""


class Figure(NamedTuple):
    """A chart with its heading."""

    title: str
    note: str
    svg: Markup
    hue: int | None = None


# -------------------------------------------------------------------------------------------------------- checkpoints


def score_figures(run: Run) -> Iterable[Figure]:
    """The scores that chose; and each ranking of each benchmark, if there are several or none has chosen yet."""
    if run.selection:
        yield Figure(*_chosen_by(run, run.selection))
    by_kind: dict[tuple[str, ...], list[Line]] = {}
    for summary in run.evaluations:
        kind = (summary["benchmark"], summary.get("protocol") or summary.get("by", ""), summary.get("rank", ""))
        by_kind.setdefault(kind, []).append(summary)
    if run.selection and len(by_kind) < 2:
        return
    for (benchmark, protocol, rank), summaries in by_kind.items():
        summaries.sort(key=lambda summary: summary["step"])
        svg = _score_chart(
            run,
            [(summary["step"], summary["accuracy"]) for summary in summaries],
            intervals=[summary.get("interval") for summary in summaries],
            tips=[f"step {summary['step']:,}: {percent(summary['accuracy'])}" for summary in summaries],
            label=f"accuracy on {benchmark}" + f" by {rank}" * bool(rank),
            limits=(0, 1),
            chance=summaries[-1].get("chance"),
        )
        note = f"{benchmark}, {protocol}, {summaries[-1].get('questions', 0):,} questions"
        yield Figure(f"By {rank}" if rank else "Accuracy", note, svg)


def _score_chart(
    run: Run,
    points: Sequence[Point],
    *,
    intervals: Sequence[tuple[float, float] | None],
    tips: Sequence[str],
    is_loss: bool = False,
    **how: Any,
) -> Markup:
    """Scores of checkpoints over their steps, with intervals, and a ring around the selected one."""
    selected = score_of(run.selection, run.selection["selected"])["step"] if run.selection else None
    steps = [step for step, _ in points]
    rings = [step == selected for step in steps]
    scores = Series(points=points, style="scores", intervals=intervals, tips=tips, rings=rings)
    return chart([scores], steps=steps, format_y=plain if is_loss else round_percent, **how)


def _chosen_by(run: Run, chosen: Line) -> tuple[str, str, Markup]:
    is_loss = chosen["by"] == "loss"
    scores = chosen["scores"]
    svg = _score_chart(
        run,
        [(score["step"], score["score"]) for score in scores],
        intervals=[score.get("interval") for score in scores],
        tips=[f"{score['checkpoint']}: {score_text(score['score'], chosen)}" for score in scores],
        is_loss=is_loss,
        label="score of each checkpoint with its interval",
    )
    ranks = " and ".join(chosen.get("ranks", ()))
    what = f"mean of {ranks}" if " and " in ranks else chosen["benchmark"]
    return "Held-out loss" if is_loss else "Score", f"{what} · ring: selected", svg


def category_figures(run: Run) -> Iterable[Figure]:
    """Small panels, if there is more than one category."""
    chosen = run.selection
    if not chosen or len(chosen["categories"]) < 2:
        return
    steps = [score["step"] for score in chosen["scores"]]
    is_loss = chosen["by"] == "loss"
    for name, category in chosen["categories"].items():
        svg = _score_chart(
            run,
            list(zip(steps, category["scores"], strict=True)),
            intervals=category["intervals"],
            tips=[score_text(score, chosen) for score in category["scores"]],
            is_loss=is_loss,
            label=f"score in the category {name}",
            limits=None if is_loss else (0, 1),
            height=SMALL,
        )
        kind = "samples" if is_loss else "questions"
        yield Figure(name or "without category", f"{category['questions']:,} {kind}", svg)


# ------------------------------------------------------------------------------------------------------------ losses


def loss_figures(run: Run) -> Iterable[Figure]:
    if not run.lines:
        return
    points = losses(run.lines)
    svg = chart(
        [
            Series(points=_thin([(step, loss) for step, loss, _ in points]), style="faint"),
            Series(points=_means(points)),
            Series(points=held_out(run), style="dots", colour="var(--second)"),
        ],
        label="training loss and held-out loss",
        format_y=plain,
        log=True,
    )
    yield Figure("Loss", "per trained token" + "; dots: held out" * bool(held_out(run)), svg)
    rates = series(run.lines, "learning_rate")
    svg = chart([Series(points=_thin(rates))], label="learning rate", format_y=scientific, from_zero=True)
    yield Figure("Learning rate", "of the groups that have none of their own", svg)


def source_figures(run: Run) -> Iterable[Figure]:
    """Train and held-out loss of each source."""
    last = float(run.lines[-1]["step"]) if run.lines else None
    for number, source in enumerate(run.recipe.data.mixture):
        points = source_losses(run.lines, source.name)
        hue = HUES[number % len(HUES)]
        colour = f"hsl({hue} 55% var(--level))"
        apart = held_out(run, source.name)
        svg = chart(
            [
                Series(points=_thin([(step, loss) for step, loss, _ in points]), style="faint", colour=colour),
                Series(points=_means(points), colour=colour),
                Series(
                    points=apart,
                    style="dots",
                    colour="var(--text)",
                    tips=[f"held out, step {step:,.0f}: {loss:.3f}" for step, loss in apart],
                ),
            ],
            label=f"loss of {source.name}",
            format_y=plain,
            log=True,
            last_step=last,
            height=SMALL,
        )
        if svg:
            ends = f"{points[0][1]:.3g} to {_means(points)[-1][1]:.3g}" if points else "not trained yet"
            yield Figure(source.name, ends + (f" · held out {apart[-1][1]:.3g}" if apart else ""), svg, hue)


def speed_figures(run: Run) -> Iterable[Figure]:
    speeds, memory = series(run.lines, "tokens_per_second"), series(run.lines, "peak_memory_bytes")
    norms = series(run.lines, "grad_norm")
    if speeds:
        lines = [Series(points=_thin(speeds), style="faint"), Series(points=_smooth(speeds))]
        yield Figure(
            "Speed", "tokens/s", chart(lines, label="tokens per second", format_y=plain, from_zero=True, height=SMALL)
        )
    if memory:
        svg = chart(
            [Series(points=[(step, size / GIB) for step, size in _thin(memory)])],
            label="largest memory so far",
            format_y=plain,
            from_zero=True,
            height=SMALL,
        )
        yield Figure("Memory", "GiB, the peak so far of one process", svg)
    if norms:
        lines = [Series(points=_thin(norms), style="faint"), Series(points=_smooth(norms))]
        yield Figure(
            "Gradient norm", "before clipping", chart(lines, label="norm", format_y=plain, log=True, height=SMALL)
        )


def _smooth(points: Sequence[Point]) -> list[Point]:
    return _means([(step, value, 1.0) for step, value in points])


def _means(points: Sequence[tuple[float, float, float]]) -> list[Point]:
    """Weighted means of five steps and more, at most `BINS` of them."""
    return binned(points, min(max(len(points) // 5, 12), BINS))


def _thin(points: Sequence[Point], number: int = 600) -> list[Point]:
    """At most so many of them, the last among them: a run may have 100,000 steps."""
    every = -(-len(points) // number) or 1
    return [*points[:-1:every], *points[-1:]]
