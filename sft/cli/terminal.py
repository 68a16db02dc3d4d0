"""The parts of all output: tables, progress, one line for a mistake. With --json, stdout holds one JSON object."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from textwrap import fill
from typing import Annotated, Any, Protocol

import typer
from rich.console import Console, Group
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from sft.cli.completion import complete_override, complete_recipe
from sft.core.errors import printable


def examples(commands: Iterable[str]) -> str:
    """Return the end of a command's help: examples, a line each."""
    lines = "\n".join(f"  idefics-sft {command}" for command in commands)
    return f"Examples:\n{lines}".replace("[", "\\[")


_RECIPE = "A recipe file, a shipped name, or a RUN folder."
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help=_RECIPE, autocompletion=complete_recipe)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="training.max_steps=100 …", autocompletion=complete_override),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")]


def quiet_libraries() -> None:
    """Keep other people's progress bars and hints off the screen; warnings that matter are ours to give."""
    import logging
    import warnings

    import torch
    import transformers

    if not torch.cuda.is_available():
        # DeepSpeed, which accelerate imports wherever it is installed, would say on stdout that there is no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("bitsandbytes", "accelerate.accelerator"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("transformers", r"torch\.distributed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=name)


_progress_is_shown = True


def show_progress(wanted: bool) -> None:
    """Choose whether bars, and notes on the way, are shown; --quiet turns them off."""
    global _progress_is_shown
    _progress_is_shown = wanted


def is_quiet() -> bool:
    """Return whether only results and errors are wanted."""
    return not _progress_is_shown


def notes(to_stderr: bool = False) -> Console:
    """Return the console for notes on the way, which shows nothing under --quiet."""
    out = console(to_stderr)
    out.quiet = is_quiet()
    return out


WIDTH = 80
"""Columns of what is no terminal."""


def console(to_stderr: bool = False) -> Console:
    """Return the console for tables and progress. Data are printed there, so nothing is read as markup. A terminal
    folds lines between words; a file or a pipe gets them whole."""
    is_terminal = Console(stderr=to_stderr).is_terminal
    width = None if is_terminal else WIDTH
    return Console(stderr=to_stderr, highlight=False, soft_wrap=not is_terminal, markup=False, emoji=False, width=width)


def folded(text: str, width: int, indent: int = 2) -> str:
    """Return a text in lines of `width`, folded between words; the lines after the first are indented."""
    return fill(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def print_problems(*problems: object) -> None:
    """Print what is wrong on stderr, a line each; a terminal gets it folded between words."""
    width = Console(stderr=True).width if sys.stderr.isatty() else None
    for problem in problems:
        line = f"idefics-sft: {printable(problem)}"
        print(folded(line, width) if width else line, file=sys.stderr)


def print_json(value: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Print the one JSON value."""
    sys.stdout.write(json.dumps(value) + "\n")


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> Group:
    """Return a plain table. Numbers stand to the right and are never cut; text may be folded. The title may be wider
    than the columns."""
    result = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name, *cells in zip(header, *rows, strict=True):
        is_number = bool(name) and all(_NUMBER.match(str(cell)) for cell in cells) and any(cells)
        least = max(map(len, cells)) if is_number else None
        result.add_column(name, justify="right" if is_number else "left", overflow="fold", min_width=least)
    for row in rows:
        result.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))  # no text is markup
    return Group(Text(title, "bold"), result)


_NUMBER = re.compile(r"[-+≤]? ?\d|$|none$|nan$|inf$")
"""How a cell begins that is a number, or is left empty."""


def percent(share: float) -> str:
    """Return a share as a percentage: 0.077 -> 7.7 %"""
    return f"{share * 100:.1f} %"


class Update(Protocol):
    """Takes how much is done, and a note on it."""

    def __call__(self, done: int, note: str = "") -> None: ...


@contextmanager
def progress(description: str, total: int | None, out: Console) -> Iterator[Update]:
    """Show a bar with time used and time left; yield `update(done, note)`. In a log it prints a line now and then."""
    if is_quiet() or not out.is_terminal:
        yield _lines(description, total, Console(quiet=True) if is_quiet() else out)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn() if total else TextColumn("{task.completed:,.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=out) as bar:
        task = bar.add_task(description, total=total, note="")

        def update(done: int, note: str = "") -> None:
            bar.update(task, completed=done, note=note)

        yield update


@contextmanager
def preparation(out: Console) -> Iterator[Callable[[str, int, float], None]]:
    """Show a bar for each dataset that is prepared; yield `update(name, records, share of the whole)`."""
    if is_quiet() or not out.is_terminal:
        yield _preparation_lines(Console(quiet=True) if is_quiet() else out)
        return
    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=30)),
        BarColumn(bar_width=12),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=out) as bar:
        shown: dict[str, tuple[TaskID, _Speed]] = {}

        def update(name: str, records: int, share: float) -> None:
            if name not in shown:
                shown[name] = bar.add_task(printable(name), total=1.0, note=""), _Speed()
            task, speed = shown[name]
            rate, _ = speed.after(records, share, time.monotonic())
            bar.update(task, completed=share, note=f"{records:,}{rate}")

        yield update


class _Speed:
    """The speed at which a dataset is prepared since the first report: what that one counts may have been done by an
    earlier run."""

    def __init__(self, now: float = 0.0) -> None:
        self.first: tuple[int, float, float] | None = None
        """Records, share and time of the first report."""
        self.printed = now
        """When a log got its last line; infinite after the last of all."""

    def after(self, records: int, share: float, now: float) -> tuple[str, str]:
        """Return the rate as `, 1,234/s` and the time left as `, 15 s left`; nothing while they cannot be known."""
        if self.first is None or records < self.first[0]:
            self.first = (records, share, now) if records else None
            return "", ""
        done, grown, seconds = records - self.first[0], share - self.first[1], now - self.first[2]
        rate = f", {done / seconds:,.0f}/s" if done and seconds > 1 else ""
        return rate, f", {seconds * (1 - share) / grown:,.0f} s left" if grown > 0 and share < 1 else ""


_LOG_EVERY_SECONDS = 15.0


def _preparation_lines(out: Console) -> Callable[[str, int, float], None]:
    """Return the same for a log: it prints a line at the beginning, one now and then, one at the end."""
    speeds: dict[str, _Speed] = {}

    def update(name: str, records: int, share: float) -> None:
        now = time.monotonic()
        if name not in speeds:
            speeds[name] = _Speed(now)
            if not share:
                out.print(f"preparing {printable(name)}")
        speed = speeds[name]
        rate, left = speed.after(records, share, now)
        if now - speed.printed < _LOG_EVERY_SECONDS and (share < 1 or speed.printed == math.inf):
            return
        speed.printed = now if share < 1 else math.inf
        out.print(f"preparing {printable(name)}: {records:,}{rate}{left}")

    return update


def _lines(description: str, total: int | None, out: Console) -> Update:
    """Return an update for a log, which prints eight lines or so."""
    printed = 0

    def update(done: int, note: str = "") -> None:
        nonlocal printed
        step = max((total or 20_000) // 8, 1)
        if done // step > printed // step or done == total:
            out.print(folded(f"{description} {done}{f'/{total}' if total else ''} {note}".rstrip(), WIDTH))
        printed = done

    return update
