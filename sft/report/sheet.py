"""Charts arranged on one SVG that stands by itself: without the page's style sheet, in the colours of print."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from sft.report.panels import Panel

WIDTH, GAP = 960, 24
WHOLE = WIDTH - 2 * GAP
"""Width of the chart at the top."""
COLUMNS = 3
COLUMN = (WIDTH - (COLUMNS + 1) * GAP) // COLUMNS
"""Width of each chart below it."""
_HEAD = 46
"""Height of a heading of two lines."""
_TITLE_LETTERS = 38
_COLOURS = {
    "card": "#fff", "text": "#22252a", "quiet": "#646a73", "line": "#cfcbc3", "grid": "#eceae5", "accent": "#20639b",
    "second": "#c8553d",
}  # fmt: skip
_STYLE = """
svg { overflow: visible; }
svg text { font: 12px system-ui, sans-serif; fill: var(--quiet); }
svg text.title { font-weight: 600; fill: var(--text); }
"""


def sheet(whole: Panel, others: Sequence[Panel]) -> str:
    """Return an SVG with one chart of width `WHOLE` on top, and those of width `COLUMN` in rows below it. The same
    charts give the same text."""
    parts, top = [*_placed(whole, GAP, GAP, 120)], GAP + _HEAD + _size(whole)[1]
    for row in (others[first : first + COLUMNS] for first in range(0, len(others), COLUMNS)):
        for column, panel in enumerate(row):
            parts += _placed(panel, GAP + column * (COLUMN + GAP), top, _TITLE_LETTERS)
        top += _HEAD + max(_size(panel)[1] for panel in row)
    rules = (Path(__file__).parent / "charts.css.jinja").read_text(encoding="utf-8")
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + GAP}" width="{WIDTH}" '
        f'height="{top + GAP}">\n<style>{_STYLE}{rules}</style>\n'
        f'<rect width="{WIDTH}" height="{top + GAP}" style="fill:var(--card)"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
    return re.sub(r"var\(--(\w+)\)", lambda found: _COLOURS[found[1]], svg)


def _placed(panel: Panel, x: int, y: int, letters: int) -> Iterable[str]:
    title = textwrap.shorten(panel.title.replace("_", " "), letters, placeholder=" …")
    yield f'<text class="title" x="{x}" y="{y + 14}">{escape(title)}</text>'
    yield f'<text x="{x}" y="{y + 30}">{escape(panel.note)}</text>'
    place = f'x="{x}" y="{y + _HEAD - 8}" width="{_size(panel)[0]}" height="{_size(panel)[1]}"'
    yield str(panel.svg).replace("<svg ", f"<svg {place} ", 1)


def _size(panel: Panel) -> tuple[int, int]:
    found = re.search(r'viewBox="0 0 (\d+) (\d+)"', panel.svg)
    return (int(found[1]), int(found[2])) if found else (0, 0)
