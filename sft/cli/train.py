"""`idefics-sft train RECIPE`: fine-tune, writing checkpoints."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sft.cli.several import start
from sft.cli.terminal import (
    Json,
    Overrides,
    RecipeName,
    console,
    notes,
    preparation,
    print_json,
    progress,
    quiet_libraries,
    table,
)
from sft.core.distributed import ALONE, Rank, from_main
from sft.core.errors import UserError, printable
from sft.core.launch import STOPPED

if TYPE_CHECKING:
    from sft.recipe import Recipe
    from sft.runs.status import RunStatus

BAR_WIDTH = 70
"""Columns of a terminal that the bar, the steps and the times take."""
NOTABLE_WAIT = 0.1
"""The share of a step waited for data from which on the bar shows it; `data.num_workers` may lower it."""
EXAMPLES = (
    "train my-data.yaml                # resumes an unfinished run",
    "train my-data.yaml --dry-run      # memory and time of a step",
    "train my-data.yaml --nproc 8 training.max_steps=500",
)


def run(
    context: typer.Context,
    recipe: RecipeName,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine, one a GPU, that train together.")] = 1,
    resume: Annotated[
        str, typer.Option(metavar="auto|none|PATH", help="Resume, start over, or a checkpoint to resume from.")
    ] = "auto",
    allow_changed: Annotated[
        bool, typer.Option("--allow-changed", help="Resume although settings of the recipe changed.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, measure memory and time of a step, write nothing to output_dir.")
    ] = False,
    json: Json = False,
) -> None:
    """Fine-tune as a recipe says; prepares what is missing and resumes an unfinished run."""
    from sft.core.distributed import launched_rank, process_group
    from sft.runs.names import find_recipe

    found = find_recipe(recipe, overrides or ())
    named = [recipe, *(overrides or ())]
    if dry_run:
        if nproc > 1 or launched_rank().of > 1:
            raise UserError("--dry-run measures one process; leave --nproc and launchers out")
        _show_dry_run(found, json=json)
        return
    if nproc > 1:
        start(context, lambda: _prepare_for(nproc, found, console(to_stderr=json), resume, allow_changed))
    with redirect_stdout(sys.stderr) if json else nullcontext(), process_group() as rank:  # DeepSpeed prints
        out = notes(to_stderr=json)
        out.quiet |= not rank.is_main
        status = train(found, out, resume=resume, allow_changed=allow_changed, rank=rank, named=named)
    if rank.is_main:
        _show(found, status, [*named, *(["--nproc", str(rank.of)] if rank.of > 1 else [])], json=json)


def _show(recipe: Recipe, status: RunStatus, arguments: list[str], *, json: bool) -> None:
    """Print how the training ended and the command that comes next."""
    out = console(to_stderr=json)
    if json:
        print_json({"output_dir": recipe.output_dir} | vars(status))
    if status.status == "stopped":
        out.print(f"Resume with: idefics-sft train {shlex.join(arguments)}", markup=False, soft_wrap=True)
        raise typer.Exit(STOPPED)
    if not json:
        # A checkpoint can be selected by a benchmark, or by the loss on held-out data.
        selects = recipe.evaluation.benchmark or (Path(recipe.output_dir) / "before.json").is_file()
        why = "" if status.why in ("", "training.max_steps", "training.epochs") else f" ({status.why})"
        out.print(
            f"{recipe.output_dir}: {status.status} at step {status.step}{why}. "
            f"Next: idefics-sft {'select' if selects else 'chat'} {recipe.output_dir}"
        )


def train(
    recipe: Recipe,
    out: Console,
    *,
    resume: str = "auto",
    allow_changed: bool = False,
    rank: Rank = ALONE,
    named: Sequence[str] = (),
) -> RunStatus:
    """Prepare and train with a progress bar; a finished run of the same recipe is left as it is. One of several
    processes, `rank` of them, prepares nothing: all would. `named` names the recipe on the command line. Raise
    UserError where a run of another recipe is in the folder, or the checkpoint to resume from is not complete."""
    from sft.data.check_recipe import check_recipe
    from sft.runs.status import RunStatus
    from sft.training.resume import find_run

    found = from_main(lambda: find_run(recipe, resume, allow_changed, out.print))
    if isinstance(found, RunStatus):
        return found
    if rank.of == 1:
        check_recipe(recipe)  # before torch is loaded
    quiet_libraries()
    from sft.batches.look_ahead import describe_data
    from sft.data.prepare import open_prepared, prepare
    from sft.data.statistics import not_read
    from sft.training import run as runs

    check_before_preparing(recipe)
    if rank.of > 1:
        sources, _ = open_prepared(recipe, named)
    else:
        with preparation(out) as on_progress:
            sources = prepare(recipe, on_progress)
    for source, parts in zip(recipe.data.mixture, sources.parts, strict=True):
        for line in (line for part in parts for line in not_read(part.store)):
            out.print(printable(f"{source.name}: {line}"))
    ahead = from_main(partial(runs.plan_ahead, recipe, sources, found))
    for data_line in describe_data(ahead):
        out.print(data_line)
    with progress("training", ahead["steps"], out) as update:

        def on_step(step: int, line: dict[str, Any]) -> None:
            update(step, note(line, out.width - BAR_WIDTH if out.is_terminal else None))

        return runs.train(recipe, sources, on_step, out.print, found, rank, ahead)


def note(line: dict[str, Any], width: int | None) -> str:
    """Return the text after the bar: loss, speed, and the losses of as many sources as `width` has room for."""
    parts = [f"{name} {own['loss']:.3f}" for name, own in line["sources"].items() if own["loss"] is not None]
    head = "loss not finite" if line["loss"] is None else f"loss {line['loss']:.3f}"
    speed = f"{line['tokens_per_second']:,.0f} tokens/s"
    if (waited := line.get("data_wait", 0.0)) >= NOTABLE_WAIT:
        speed += f", {waited * 100:.0f} % waiting for data"
    for number in range(len(parts), 0, -1):
        sources = ", ".join(parts[:number]) + ", …" * (number < len(parts))
        text = f"{head} ({sources})  {speed}"
        if len(parts) > 1 and (width is None or len(text) <= width):
            return text
    return f"{head}  {speed}"


def check_before_preparing(recipe: Recipe) -> None:
    """Raise UserError before hours of preparation for what training would refuse after them: a folder that cannot be
    written to or holds other things, a tracker or a precision that is not there."""
    from sft.checks.before_training import check_writable
    from sft.core.precision import choose_precision, device
    from sft.training.run_folder import check_ours
    from sft.training.trackers import check_trackers

    check_writable(Path(recipe.output_dir))
    check_ours(Path(recipe.output_dir))
    check_trackers(recipe.training.report_to)
    choose_precision(recipe.training.precision, device())


def _prepare_for(nproc: int, recipe: Recipe, out: Console, resume: str, allow_changed: bool) -> None:
    """Prepare the data for several processes; what they would refuse is refused before, as by `train`."""
    from sft.data.prepare import prepare
    from sft.training.engines import choose_engine
    from sft.training.resume import check_changes

    if resume != "none":
        check_changes(recipe, allow_changed)
    choose_engine(recipe.distributed.engine, recipe.model.mode, Rank(0, nproc), recipe.training.optimizer)
    quiet_libraries()
    check_before_preparing(recipe)
    with preparation(out) as update:
        prepare(recipe, update)


def _show_dry_run(recipe: Recipe, *, json: bool) -> None:
    """Prepare the data, do two steps of the training, and print what they take. Nothing is written to output_dir."""
    quiet_libraries()
    from sft.checks.before_training import check_writable
    from sft.core.precision import choose_precision, device
    from sft.data.prepare import prepare
    from sft.training.dry_run import dry_run

    out = console(to_stderr=json)
    check_writable(Path(recipe.output_dir))
    with preparation(out) as update:
        sources = prepare(recipe, update)
    measured = dry_run(recipe, sources, notes(to_stderr=json).print)
    precision = choose_precision(recipe.training.precision, device())
    if json:
        print_json({"device": device().type, "precision": precision, "micro_batches": list(map(asdict, measured))})
        return
    rows = []
    for one in measured:
        speed, peak = f"{one.tokens_per_second:,.0f}", f"{one.peak_memory_bytes / 2**30:.2f}"
        rows.append((one.what, f"{one.tokens:,}", f"{one.images:,}", f"{one.seconds:.2f}", speed, peak))
    header = ("micro-batch", "tokens", "images", "seconds", "tokens/s", "peak GiB")
    out.print(table(f"On {device().type} in {precision}", header, rows))
    out.print(f"nothing was written to {recipe.output_dir}")
