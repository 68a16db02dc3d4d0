"""The score of every checkpoint with its interval over steps, the whole and each category, as RUN/selection.svg."""

from __future__ import annotations

from pathlib import Path

from sft.core.files import write_atomically
from sft.report.panels import category_panels, chosen_panel
from sft.report.sheet import COLUMN, WHOLE, sheet
from sft.selection.record import Selection, as_json


def write_plot(selection: Selection, file: Path) -> None:
    """Write the plot as an SVG that stands by itself; the same selection gives the same bytes."""
    chosen = as_json(selection)
    whole, parts = chosen_panel(chosen, width=WHOLE), category_panels(chosen, width=COLUMN)
    what = f"{selection.questions} questions, with 95 % intervals" if selection.questions else selection.metric.name
    best = f"; thin rings: cannot be told apart from the best, {selection.best}" * (len(selection.tied) > 1)
    rings = f"ring: {selection.selected}, selected{best}"
    write_atomically(file, sheet(whole._replace(title=f"{selection.benchmark}, {what}", note=rings), list(parts)))
