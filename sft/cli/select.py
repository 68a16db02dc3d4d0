"""`idefics-sft select RUN`: evaluate every checkpoint and choose one, saying how sure one can be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from sft.cli.several import Nproc, start
from sft.cli.terminal import Json, console, notes, print_json, progress, quiet_libraries, table
from sft.core.errors import UserError

if TYPE_CHECKING:
    from sft.recipe import Recipe
    from sft.selection.record import Selection
    from sft.selection.session import Session
EXAMPLES = (
    "select runs/my-data",
    "select runs/my-data --benchmark questions.jsonl",
    "select runs/my-data --rule earliest_not_worse",
)


def run(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run, or its recipe.")],
    by: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK[=PATH]", help="One of `tasks list`; follows from the benchmark. Several choose together."
        ),
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option("--benchmark", "--data", metavar="PATH", help="A TSV, a .jsonl, or the data of the task."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="The part of the benchmark; `tasks list` has them.")] = None,
    rule: Annotated[
        Literal["best", "earliest_not_worse"] | None, typer.Option(help="Which one is chosen: best by default.")
    ] = None,
    use: Annotated[bool, typer.Option("--use", help="Make it the checkpoint of chat, evaluate and merge.")] = False,
    average: Annotated[
        bool, typer.Option("--average", help="Try the mean of the weights of those that cannot be told apart.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Choose as checkpoints come, until training has ended.")
    ] = False,
    nproc: Nproc = 1,
    json: Json = False,
) -> None:
    """Evaluate every checkpoint of a run that is not evaluated yet, and choose one; writes selection.json and a plot.

    What is left out comes from the recipe. Without a benchmark, the loss on what data.validation holds out chooses. A
    choice by another benchmark is kept beside the first one, and replaces it with --use only.
    """
    from sft.core.distributed import process_group
    from sft.runs.names import find_recipe, run_checkpoints

    if watch and average:
        raise UserError("--average goes with checkpoints that are all there; leave out --watch")
    recipe = _with_options(find_recipe(run), by=by, benchmark=benchmark, split=split, rule=rule)
    if nproc > 1:
        start(context)
    selection = session = None
    with process_group() as process:
        out = console(to_stderr=json)
        out.quiet = not process.is_main
        if watch:
            for selection in open_session(recipe, out, use=use).watch():
                show(selection, out)
        if selection is None:  # not watched, or a run that has ended without a checkpoint: says so
            run_checkpoints(Path(recipe.output_dir))  # before torch is loaded: there are some, or what to do is said
            session = open_session(recipe, out, use=use, average=average)
            selection = session.select()
            show(selection, out)
    if process.is_main:
        _end(run, Path(recipe.output_dir), selection, out, json=json)
    if session:
        session.check_all_evaluated()


def _end(run: str, run_dir: Path, selection: Selection, out: Console, *, json: bool) -> None:
    """Print which selection is the current one, and what comes next."""
    from sft.selection.record import as_json, chooser, current_selection, is_current, plot_of

    current = current_selection(run_dir)
    if current and not is_current(selection, run_dir):
        out.print(
            f"chat, evaluate and merge still take {current['selected']}, by {chooser(current)}; the same command with "
            f"--use makes them take {selection.selected}"
        )
    if json:
        print_json(as_json(selection))
    else:
        out.print(f"Plot: {run_dir / plot_of(selection, run_dir)}. Next: idefics-sft chat {run}")


def _with_options(
    recipe: Recipe, *, by: list[str] | None, benchmark: str | None, split: str | None, rule: str | None
) -> Recipe:
    """Return the recipe with what the command line says about its evaluation; raise UserError for two options that do
    not go together."""
    from sft.evaluation.tasks import named_tasks

    if by == ["loss"] and benchmark:
        raise UserError("--by loss takes no --benchmark: it is the loss on what data.validation holds out")
    given: dict[str, Any] = {name: value for name, value in (("rule", rule), ("split", split)) if value}
    if by or benchmark:
        given["by"] = tuple(by) if by else None
    if benchmark or by == ["loss"]:
        given["benchmark"] = benchmark
    evaluation = recipe.evaluation.model_copy(update=given)
    named_tasks(evaluation)
    return recipe.model_copy(update={"evaluation": evaluation})


def open_session(recipe: Recipe, out: Console, **options: bool) -> Session:
    """Return what evaluates and chooses, and reports on `out`."""
    quiet_libraries()
    from sft.evaluation.held_out_loss import open_held_out
    from sft.selection.session import Session

    return Session(
        recipe,
        held_out=lambda: open_held_out(recipe),
        log=notes(out.stderr).print,
        progress=lambda name: progress(name, None, out),
        **options,
    )


def show(selection: Selection, out: Console) -> None:
    """Print the choice as tables, and what to know before believing it."""
    from sft.report.selection_text import benchmark_rows, scores, selection_words
    from sft.selection.clusters import INDEX
    from sft.selection.record import as_json

    chosen = as_json(selection)
    has_ties = bool(set(selection.tied) - {selection.best})  # there is more in the set than the best one itself
    is_loss = selection.by == "loss"
    rows = [("checkpoint", "loss" if is_loss else "score", "95 % interval", "P(best)", "")]
    for score in scores(chosen):
        marks = ("*" if score["is_selected"] else " ") + ("=" if has_ties and score["is_tied"] else " ")
        rows.append((f"{marks} {score['name']}", score["score"], score["interval"], score["p_best"], score["note"]))
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]  # some losses come without how sure
    title = "index of " * (selection.metric == INDEX) + selection.benchmark
    header, *rows = zip(*columns, strict=True)
    out.print(table("held-out loss" if is_loss else title, header, rows))
    if benchmarks := [tuple(row.values()) for row in benchmark_rows(chosen)]:
        out.print(table("by benchmark", ("", "weight", selection.selected, "95 % interval", ""), benchmarks))
    selected, *others = selection_words(chosen)
    out.print(f"* {selected}")
    if has_ties:
        out.print(f"= cannot be told apart from the best: {', '.join(selection.tied)}")
    for sentence in others:
        out.print(sentence)
    for warning in selection.warnings:
        out.print(f"warning: {warning}")
