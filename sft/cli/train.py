"""`idefics-sft train RECIPE`: fine-tune, writing checkpoints."""

import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sft.cli.terminal import (
    Json,
    Overrides,
    RecipeName,
    console,
    is_quiet,
    notes,
    preparation,
    print_json,
    progress,
    quiet_libraries,
    table,
)
from sft.core.distributed import ALONE, Rank, from_main
from sft.core.errors import UserError
from sft.core.launch import STOPPED
from sft.training.resume import check_changes, what_is_there

BAR_WIDTH = 70
"""Columns of a terminal that the bar, the steps and the times take."""
EXAMPLES = (
    "train my-data.yaml                # goes on with what was begun",
    "train my-data.yaml --dry-run      # memory and time of a step",
    "train my-data.yaml --nproc 8 training.max_steps=500",
)


def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine, one a GPU, that train together.")] = 1,
    resume: Annotated[
        str, typer.Option(metavar="auto|none|PATH", help="Go on with an unfinished run, start anew, or a checkpoint.")
    ] = "auto",
    allow_changed: Annotated[
        bool, typer.Option("--allow-changed", help="Go on although settings of the recipe changed.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, measure memory and time of a step, write nothing to output_dir.")
    ] = False,
    json: Json = False,
) -> None:
    """Fine-tune as a recipe says; prepares what is missing, and goes on with what was begun."""
    from sft.core.distributed import launched_rank, process_group
    from sft.core.launch import launch
    from sft.runs.names import find_recipe

    found = find_recipe(recipe, overrides or ())
    named = [recipe, *(overrides or ())]
    if dry_run:
        if nproc > 1 or launched_rank().of > 1:
            raise UserError("--dry-run measures one process; leave --nproc and launchers out")
        _rehearse(found, console(to_stderr=json), json=json)
        return
    if nproc > 1:
        if launched_rank().of > 1:
            raise UserError(f"--nproc {nproc}: the processes are started already, by torchrun or srun; leave it out")
        if resume != "none":
            check_changes(found, Path(found.output_dir), allow_changed)
        _prepare_for(nproc, found, console(to_stderr=json))
        options = [f"--resume={resume}", *["--allow-changed"] * allow_changed, *["--json"] * json]
        options += ["--quiet"] * is_quiet()
        sys.exit(launch(nproc, ["train", *named, *options]))
    with redirect_stdout(sys.stderr) if json else nullcontext(), process_group() as rank:  # DeepSpeed prints
        out = notes(to_stderr=json)
        out.quiet |= not rank.is_main
        status = train(found, out, resume=resume, allow_changed=allow_changed, rank=rank, named=named)
    if not rank.is_main:
        return
    out = console(to_stderr=json)
    if json:
        print_json({"output_dir": found.output_dir} | vars(status))
    if status.status == "stopped":
        arguments = shlex.join([*named, *(["--nproc", str(rank.of)] if rank.of > 1 else [])])
        out.print(f"Go on with: idefics-sft train {arguments}", markup=False, soft_wrap=True)
        raise typer.Exit(STOPPED)
    if not json:
        command = "select" if _can_choose(found) else "chat"
        why = f" ({status.why})" if status.step < status.max_steps and status.why else ""
        out.print(
            f"{found.output_dir}: {status.status} at step {status.step}{why}. "
            f"Next: idefics-sft {command} {found.output_dir}"
        )


def _can_choose(recipe: Any) -> bool:
    """Whether there is something to select a checkpoint by: a benchmark, or a loss on what is held out."""
    return bool(recipe.evaluation.benchmark) or (Path(recipe.output_dir) / "before.json").is_file()


def _rehearse(recipe: Any, out: Console, *, json: bool) -> None:
    quiet_libraries()
    from sft.checks.before_training import check_writable
    from sft.core.precision import choose_precision, device
    from sft.data.prepare import prepare
    from sft.training.run import dry_run

    check_writable(Path(recipe.output_dir))
    with preparation(out) as update:
        sources = prepare(recipe, update)
    measured = dry_run(recipe, sources, notes(to_stderr=json).print)
    precision = choose_precision(recipe.training.precision, device())
    if json:
        batches = [asdict(one) for one in measured]
        print_json({"device": device().type, "precision": precision, "micro_batches": batches})
        return
    rows = [
        (
            one.what,
            f"{one.tokens:,}",
            f"{one.images:,}",
            f"{one.seconds:.2f}",
            f"{one.tokens_per_second:,.0f}",
            f"{one.peak_memory_bytes / 2**30:.2f}",
        )
        for one in measured
    ]
    header = ("micro-batch", "tokens", "images", "seconds", "tokens/s", "peak GiB")
    out.print(table(f"On {device().type} in {precision}", header, rows))
    out.print(f"nothing was written to {recipe.output_dir}")


def train(
    recipe: Any,
    out: Console,
    *,
    resume: str = "auto",
    allow_changed: bool = False,
    rank: Rank = ALONE,
    named: Sequence[str] = (),
) -> Any:
    """Prepare and train with a progress bar; a finished run of the same recipe is left as it is.

    One of several processes, `rank` of them, prepares nothing: all would. `named` names the recipe on the command line.

    Raises:
        UserError: a run of another recipe is in the folder, or the checkpoint to go on from is not whole.
    """
    run_dir = Path(recipe.output_dir)
    finished, resume_from = from_main(lambda: what_is_there(recipe, run_dir, resume, allow_changed, out))
    if finished:
        return finished
    quiet_libraries()
    from sft.data.prepare import open_prepared, prepare
    from sft.training import run as runs

    _check_before_preparing(recipe)
    if rank.of > 1:
        sources, _ = open_prepared(recipe, named)
    else:
        with preparation(out) as on_progress:
            sources = prepare(recipe, on_progress)
    with progress("training", recipe.training.max_steps, out) as update:

        def on_step(step: int, line: dict[str, Any]) -> None:
            update(step, note(line, out.width - BAR_WIDTH if out.is_terminal else None))

        return runs.train(recipe, sources, on_step, out.print, resume_from, rank)


def note(line: dict[str, Any], width: int | None) -> str:
    """Loss, loss of each source as far as `width` has room for them, and speed: what the bar says beside a step."""
    parts = [f"{name} {own['loss']:.3f}" for name, own in line["sources"].items() if own["loss"] is not None]
    head = "loss not finite" if line["loss"] is None else f"loss {line['loss']:.3f}"
    speed = f"{line['tokens_per_second']:,.0f} tokens/s"
    for number in range(len(parts), 0, -1):
        sources = ", ".join(parts[:number]) + ", …" * (number < len(parts))
        text = f"{head} ({sources})  {speed}"
        if len(parts) > 1 and (width is None or len(text) <= width):
            return text
    return f"{head}  {speed}"


def _check_before_preparing(recipe: Any) -> None:
    """What training would refuse after hours of preparation.

    Raises:
        UserError: the folder cannot be written to or holds other things, a tracker is missing, or the precision.
    """
    from sft.checks.before_training import check_writable
    from sft.core.precision import choose_precision, device
    from sft.training.run_folder import check_ours
    from sft.training.trackers import check_trackers

    check_writable(Path(recipe.output_dir))
    check_ours(Path(recipe.output_dir))
    check_trackers(recipe.training.report_to)
    choose_precision(recipe.training.precision, device())


def _prepare_for(nproc: int, recipe: Any, out: Console) -> None:
    """Prepare what several processes are to train on; what they would refuse is refused before.

    Raises:
        UserError: see `train`, or there are fewer GPUs than processes.
    """
    import torch

    from sft.data.prepare import prepare
    from sft.training.engines import choose_engine

    if torch.cuda.is_available() and nproc > torch.cuda.device_count():
        raise UserError(f"--nproc {nproc}: this machine has {torch.cuda.device_count()} GPUs; each process needs one")
    choose_engine(recipe.distributed.engine, recipe.model.mode, Rank(0, nproc), recipe.training.optimizer)
    quiet_libraries()
    _check_before_preparing(recipe)
    with preparation(out) as update:
        prepare(recipe, update)
