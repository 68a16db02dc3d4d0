"""Charts as inline SVG. Text stays text, colours are the page's own in light and dark, nothing is fetched.

A chart is drawn 440 wide: two of them stand side by side on a laptop, and on a phone one is still readable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from markupsafe import Markup

from sft.report.run_files import Point

Limits = tuple[float, float]

WIDTH = 440
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 10, 26
_DECADES_FOR_LOG = 0.9
"""A quantity that spans more powers of ten than this is drawn on a logarithmic scale, where asked for one."""
_NAMED = 8
"""Steps that there is room to name."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line or set of points."""

    points: Sequence[Point]
    style: Literal["line", "faint", "dots", "scores"] = "line"
    """`faint`: behind the others. `dots`: marked and dashed. `scores`: marked, with intervals."""
    colour: str = "var(--accent)"
    intervals: Sequence[Limits | None] = ()
    tips: Sequence[str] = ()
    """The text that the pointer gets at each point."""
    rings: Sequence[str] = ()
    """For each point the class of a circle around it, `ring` (selected) or `tied`, or an empty text."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """From data to the drawing."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        scale = math.log if self.is_log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, number: int) -> list[float]:
        """Return about `number` round values inside."""
        if not self.is_log:
            return _round_values(self.low, self.high, number)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            found = [f * 10.0**d for d in decades for f in factors if self.low <= f * 10.0**d <= self.high]
            if len(found) <= number + 2:
                return found
        return found


def chart(
    some: Sequence[Series],
    *,
    label: str,
    format_y: Callable[[float], str],
    height: int = 230,
    width: int = WIDTH,
    log: bool = False,
    from_zero: bool = False,
    limits: Limits | None = None,
    chance: float | None = None,
    last_step: float | None = None,
    steps: Sequence[float] = (),
) -> Markup:
    """Return series over steps as an SVG. `label` says to those who cannot see it what is drawn; `limits` are those of
    y, and `steps` are named on the x axis if there are not too many."""
    some = [one for one in some if one.points]
    if not some:
        return Markup("")
    xs = [step for one in some for step, _ in one.points] + ([last_step] if last_step else [])
    x = Axis(low=min(xs), high=max(xs) if max(xs) > min(xs) else min(xs) + 1, start=LEFT, end=width - RIGHT)
    y = _value_axis(some, height, log, from_zero, limits, chance)
    named = steps if 0 < len(steps) <= _NAMED else x.ticks(5)
    parts = [*_grid(x, y, width, height, format_y, named)]
    if chance is not None:
        parts.append(f'<line class="chance" x1="{LEFT}" x2="{width - RIGHT}" y1="{y(chance)}" y2="{y(chance)}"/>')
        parts.append(f'<text class="chance" x="{width - RIGHT}" y="{y(chance) - 5}" text-anchor="end">chance</text>')
    for one in some:
        parts += _draw(one, x, y)
    svg = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    return Markup(svg)


def _value_axis(
    some: Sequence[Series], height: int, log: bool, from_zero: bool, limits: Limits | None, chance: float | None
) -> Axis:
    ys = [point[1] for one in some if one.style != "faint" for point in one.points]
    ys += [limit for one in some for interval in one.intervals if interval for limit in interval]
    ys += [chance] if chance is not None else []
    low, high = limits or (min(ys), max(ys))
    is_log = log and low > 0 and math.log10(high / low) > _DECADES_FOR_LOG
    if is_log:
        low, high = low / 1.15, high * 1.15
    elif not limits:
        low = 0.0 if from_zero else low
        room = (high - low) * 0.07 or abs(high) * 0.1 or 1.0
        low, high = (low if from_zero else max(low - room, 0.0 if low >= 0 else -math.inf)), high + room
    return Axis(low=low, high=high, start=height - BOTTOM, end=TOP, is_log=is_log)


def _grid(
    x: Axis, y: Axis, width: int, height: int, format_y: Callable[[float], str], steps: Sequence[float]
) -> Iterable[str]:
    for value in y.ticks(5):
        at = y(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{at}" y2="{at}"/>'
        yield f'<text x="{LEFT - 7}" y="{at + 4}" text-anchor="end">{escape(format_y(value))}</text>'
    base = height - BOTTOM
    yield f'<line class="axis" x1="{LEFT}" x2="{width - RIGHT}" y1="{base}" y2="{base}"/>'
    for value in steps:
        if value == int(value):
            yield f'<text x="{x(value)}" y="{base + 18}" text-anchor="middle">{int(value):,}</text>'
    # Left of the first number, in the same line, so that no number can run into it.
    yield f'<text class="unit" x="{LEFT - 22}" y="{base + 18}" text-anchor="end">step</text>'


def _draw(one: Series, x: Axis, y: Axis) -> Iterable[str]:
    inside = [(px, min(max(py, y.low), y.high)) for px, py in one.points]
    places = [(x(px), y(py)) for px, py in inside]
    path = " ".join(f"{px},{py}" for px, py in places)
    if len(places) > 1:
        yield f'<polyline class="{one.style}" style="stroke:{one.colour}" points="{path}"/>'
    for (px, _), interval in zip(places, one.intervals, strict=False):
        if interval:
            low, high = (y(min(max(limit, y.low), y.high)) for limit in interval)
            yield f'<line class="interval" style="stroke:{one.colour}" x1="{px}" x2="{px}" y1="{low}" y2="{high}"/>'
    if one.style in ("line", "faint") and len(places) > 1:
        return
    for number, (px, py) in enumerate(places):
        tip = f"<title>{escape(one.tips[number])}</title>" if one.tips else ""
        if one.rings and one.rings[number]:
            yield f'<circle class="{one.rings[number]}" cx="{px}" cy="{py}" r="7.5"/>'
        yield f'<circle class="dot" style="fill:{one.colour}" cx="{px}" cy="{py}" r="3.4">{tip}</circle>'


def _round_values(low: float, high: float, number: int) -> list[float]:
    """Return about `number` multiples of 1, 2, 2.5 or 5 times a power of ten; one that rounding puts outside is the
    border."""
    raw = (high - low) / number
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [min(max(round(k * step, 12), low), high) for k in range(first, math.floor(high / step + 1e-9) + 1)]
