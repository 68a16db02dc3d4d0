"""What the benchmarks share: sides that take turns, memory, and how figures are printed."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def cpu_medians(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """CPU seconds of each side, median over rounds in which the sides alternate. The first round warms caches up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            started = time.process_time()
            side()
            if number:
                seconds[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_bytes() -> int:
    """Largest memory of this process so far, or since `forget_peak`; pages of mapped files that it touched count. Not
    `ru_maxrss`: a process that another one starts begins with that of its parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def forget_peak() -> None:
    """Let the largest memory be what is used now."""
    Path("/proc/self/clear_refs").write_text("5")


def print_measured(sides: Mapping[str, dict[str, Any]], *, as_json: bool) -> None:
    """The figures of each side, with their ratios in front: one JSON object, or a line a figure."""
    ratios = {name: found["ratio"] for name, found in sides.items()}
    rest = {name: {key: value for key, value in found.items() if key != "ratio"} for name, found in sides.items()}
    figures = {"ratios": ratios, **rest}
    print(json.dumps(figures)) if as_json else print_figures(figures)


def print_figures(figures: Mapping[str, Any], indent: str = "") -> None:
    """A line a figure."""
    for name, value in figures.items():
        if isinstance(value, Mapping):
            print(f"{indent}{name}")
            print_figures(value, indent + "  ")
        else:
            print(f"{indent}{name:24} {value:,.4f}" if isinstance(value, float) else f"{indent}{name:24} {value:,}")
