"""The score of every checkpoint with its interval over steps: all questions first, then each category."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sft.core.files import whole_file
from sft.selection.rules import CategoryScores, Selection

if TYPE_CHECKING:  # matplotlib takes a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE = "selection.svg"
_COLUMNS = 4
_TITLE_WIDTH = 36
_BLUE, _GREY, _ORANGE = "#20639b", "#8a8f98", "#c8553d"


def plot(selection: Selection, file: Path) -> None:
    """Write the plot as an SVG that stands by itself; the same selection gives the same bytes."""
    import matplotlib

    with (
        matplotlib.rc_context({"svg.hashsalt": "idefics-sft", "svg.fonttype": "path", "font.size": 8}),
        whole_file(file) as opened,
    ):
        draw(selection).savefig(opened, format="svg", metadata={"Date": None})


def draw(selection: Selection) -> Figure:
    """The whole on top, a small panel for each category below."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = 1 + math.ceil(len(_shown(selection)) / _COLUMNS)
    figure = Figure(figsize=(10, 3.2 + 1.9 * (rows - 1)), layout="constrained")
    grid = figure.add_gridspec(rows, _COLUMNS, height_ratios=[1.7] + [1] * (rows - 1))
    whole = figure.add_subplot(grid[0, :])
    scores = [score.score for score in selection.scores]
    intervals = [score.interval for score in selection.scores if score.interval]
    _draw_line(whole, scores, intervals, selection)
    _mark(whole, selection)
    what = "held-out loss" if selection.by == "loss" else f"{selection.benchmark}, {selection.questions[1]} questions"
    whole.set_title(f"{what}{', with 95 % intervals' if intervals else ''}")
    whole.set_xlabel("step")
    whole.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    whole.legend(loc="best", frameon=False)
    axes = None
    for number, (name, category) in enumerate(_shown(selection).items()):
        # Shares can be compared over categories; the losses of sources are of different sizes.
        shared = None if selection.by == "loss" else axes
        axes = figure.add_subplot(grid[1 + number // _COLUMNS, number % _COLUMNS], sharey=shared)
        _draw_line(axes, category.scores, category.intervals, selection)
        title = f"{name or 'without category'} ({category.questions})".replace("_", " ")
        axes.set_title(textwrap.fill(title, _TITLE_WIDTH), fontsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    return figure


def _shown(selection: Selection) -> dict[str, CategoryScores]:
    """One category alone says nothing new."""
    return selection.categories if len(selection.categories) > 1 else {}


def _draw_line(
    axes: Axes, scores: Sequence[float], intervals: Sequence[tuple[float, float]], selection: Selection
) -> None:
    """Scores over steps, a bar for each interval if there are any, and where the selected one stands."""
    from matplotlib.ticker import PercentFormatter

    steps = [score.step for score in selection.scores]
    axes.plot(steps, scores, color=_BLUE, marker="o", markersize=3, linewidth=1)
    if intervals:
        low, high = zip(*intervals, strict=True)
        axes.vlines(steps, low, high, color=_BLUE, linewidth=1, alpha=0.5)
    selected = next(score.step for score in selection.scores if score.checkpoint == selection.selected)
    axes.axvline(selected, color=_ORANGE, linewidth=0.8, linestyle="--", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    if selection.by != "loss":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def _mark(axes: Axes, selection: Selection) -> None:
    """The tied set, the selected one and, where it is another, the best."""
    at = {score.checkpoint: (score.step, score.score) for score in selection.scores}
    marks = (
        (selection.tied, _GREY, "s", "cannot be told apart from the best"),
        ((selection.best,) if selection.best != selection.selected else (), _BLUE, "^", f"best: {selection.best}"),
        ((selection.selected,), _ORANGE, "o", f"selected: {selection.selected}"),
    )
    for names, color, marker, label in marks:
        if names:
            steps, scores = zip(*(at[name] for name in names), strict=True)
            axes.scatter(steps, scores, facecolors="none", edgecolors=color, marker=marker, s=70, label=label, zorder=3)
