"""What a person sees: tables, progress, one line for a mistake. With --json, stdout holds one JSON object."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, a shipped name, or a RUN folder.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="training.max_steps=100 …")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")]


def quiet_libraries() -> None:
    """Keep other people's progress bars and hints off the screen; warnings that matter are ours to give."""
    import logging
    import warnings

    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def console(to_stderr: bool = False) -> Console:
    """Where tables and progress go."""
    found = Console(stderr=to_stderr, highlight=False, soft_wrap=True)
    return found if found.is_terminal else Console(stderr=to_stderr, highlight=False, soft_wrap=True, width=120)


def print_json(value: dict[str, Any]) -> None:
    """The one JSON object."""
    sys.stdout.write(json.dumps(value) + "\n")


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A plain table; the first column is text, the others are numbers."""
    result = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for number, name in enumerate(header):
        result.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        result.add_row(*row)
    return result


def percent(share: float) -> str:
    """0.077 -> 7.7 %"""
    return f"{share * 100:.1f} %"


@contextmanager
def progress(description: str, total: int | None, out: Console) -> Iterator[Any]:
    """A bar with time used and time left; yields `update(done, note)`. In a log it prints a line now and then."""
    if not out.is_terminal:
        yield _lines(description, total, out)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=out) as bar:
        task = bar.add_task(description, total=total, note="")

        def update(done: int, note: str = "") -> None:
            bar.update(task, completed=done, note=note)

        yield update


def _lines(description: str, total: int | None, out: Console) -> Any:
    printed = 0

    def update(done: int, note: str = "") -> None:
        nonlocal printed
        step = max((total or 20_000) // 8, 1)
        if done // step > printed // step or done == total:
            out.print(f"{description} {done}{f'/{total}' if total else ''} {note}".rstrip())
        printed = done

    return update
