"""`idefics-sft quickstart`: every step on a laptop, from real pictures to a model to talk to."""

from __future__ import annotations

import json as jsonlib
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from sft.cli import mix, select
from sft.cli.terminal import (
    Json,
    Overrides,
    console,
    notes,
    percent,
    preparation,
    print_json,
    progress,
    quiet_libraries,
    table,
)
from sft.cli.train import train
from sft.core.errors import UserError
from sft.core.launch import STOPPED

if TYPE_CHECKING:
    from sft.recipe import Recipe
    from sft.selection.record import Selection

REPORT = "quickstart.json"
RECIPES = {"idefics": "quickstart", "smolvlm": "quickstart-smolvlm"}
"""The shipped recipe of each family of images: beside the text, and in it."""
EXAMPLES = (
    "quickstart",
    "quickstart --family smolvlm",
    "quickstart --output-dir runs/first --json",
    "quickstart --output-dir runs/short training.max_steps=200",
)


def run(
    overrides: Overrides = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Where everything is written.", show_default="runs/quickstart")
    ] = None,
    family: Annotated[Literal["idefics", "smolvlm"], typer.Option(help="Kind of model.")] = "idefics",
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what is there and start anew.")] = False,
    json: Json = False,
) -> None:
    """Fine-tune the shipped small base on real pictures, choose a checkpoint, and talk to it. Needs no GPU."""
    from sft.report import report as write_report

    out = console(to_stderr=json)
    overrides = overrides or []
    name = RECIPES[family]
    output_dir = output_dir or Path("runs") / name
    recipe = _recipe(name, output_dir, overrides)
    if fresh:
        _delete_run(output_dir)
    report_file = output_dir / REPORT
    if report_file.is_file():
        report = jsonlib.loads(report_file.read_text())
        if (family, overrides) != (report.get("family", "idefics"), report.get("overrides", [])):
            raise UserError(f"{output_dir}: holds a finished run with other settings; --fresh starts anew")
        out.print(f"{output_dir}: a finished run was found; --fresh starts anew")
    else:
        report = _quickstart(recipe, family, overrides, notes(to_stderr=json))
        report_file.write_text(jsonlib.dumps(report, indent=2) + "\n")
    _show(report, out)
    out.print("\nTo talk to it:")
    out.print(f"  idefics-sft chat {output_dir} --image {report['conversation'][0]['file']}", soft_wrap=True)
    out.print(f"To read about it: {write_report(output_dir)}")
    if json:
        print_json(
            {key: value for key, value in report.items() if key not in ("checkpoints", "conversation", "family")}
        )


def _recipe(name: str, output_dir: Path, overrides: list[str]) -> Recipe:
    """Return a shipped recipe with the overrides.

    Raises:
        UserError: an override is wrong, or of what the command itself says.
    """
    from sft.core.shipped import shipped_recipe
    from sft.recipe import load_recipe

    for override in overrides:
        if override.startswith(("output_dir=", "evaluation.")):
            raise UserError(
                f"override {override!r}: quickstart writes to --output-dir and asks questions of its own; "
                f"`idefics-sft train {name}` takes every key"
            )
    own = (f"output_dir={output_dir}", f"data.store={output_dir / 'stores'}")
    return load_recipe(shipped_recipe(name), (*own, *overrides))


def _delete_run(output_dir: Path) -> None:
    """Delete what a run wrote, and only that; prepared data is made anew when it has to be."""
    from sft.runs.status import FILE, RunStatus
    from sft.training.run_folder import delete_outputs

    if RunStatus.read(output_dir):
        delete_outputs(output_dir)
        for name in (REPORT, FILE):
            (output_dir / name).unlink(missing_ok=True)


def _quickstart(recipe: Recipe, family: str, overrides: list[str], out: Console) -> dict[str, Any]:
    """Run every stage in turn; return what is printed at the end."""
    started = time.perf_counter()
    quiet_libraries()
    import torch

    # Layers as small as the base's: a second thread costs 1.6 to 1.9 times the CPU time and saves 6 to 20 % of the
    # clock.
    torch.set_num_threads(1)
    from sft.batches.mixture_report import mix as mixture
    from sft.data.prepare import prepare

    output_dir = Path(recipe.output_dir)
    with preparation(out) as update:
        sources = prepare(recipe, update)
    mix.show(mixture(recipe, sources.sources), out)
    out.print()
    status = train(recipe, out)
    if status.status == "stopped":
        where = [] if output_dir == Path("runs") / RECIPES[family] else ["--output-dir", str(output_dir)]
        own = [] if family == "idefics" else ["--family", family]
        out.print(f"Resume with: idefics-sft {shlex.join(['quickstart', *own, *where, *overrides])}")
        raise typer.Exit(STOPPED)
    session = select.open_session(recipe, out)
    selection = session.select()
    session.check_all_evaluated()
    figures = _figures(recipe, selection, out)
    conversation = _ask(recipe, output_dir / "checkpoints" / selection.selected)
    return figures | {
        "selected_checkpoint": selection.selected,
        "cpu_seconds_training": round(status.cpu_seconds, 1),
        "seconds_total": round(time.perf_counter() - started, 1),
        "tokens_per_second": round(status.tokens_per_second),
        "precision": status.precision,
        "conversation": conversation,
        "family": family,
        "overrides": overrides,
    }


def _figures(recipe: Recipe, selection: Selection, out: Console) -> dict[str, Any]:
    """Return the accuracy of the base, of every checkpoint and of the selected one without images, and what choosing
    is worth."""
    from sft.evaluation.run_tasks import score_model
    from sft.evaluation.tasks import named_tasks, open_tasks
    from sft.evaluation.tasks.mmbench.multiple_choice import chance
    from sft.models.base_model import base_path
    from sft.runs.names import run_checkpoints

    run_dir = Path(recipe.output_dir)
    settings = recipe.evaluation.model_copy(update={"ranks": ("text", "letter")})
    tasks = open_tasks(named_tasks(settings), settings, Path(recipe.data.store))

    def score(path: Path, name: str, blind: bool = False) -> dict[str, Any]:
        with progress(f"evaluating {name}{' without images' if blind else ''}", None, out) as update:
            results = score_model(
                path,
                [task.without_images() for task in tasks] if blind else tasks,
                run_dir=run_dir,
                name=name,
                on_progress=lambda done, total: update(done, f"of {total} tokens"),
            )
        return {task.label: result for task, result in zip(tasks, results, strict=True)}

    def accuracies(results: dict[str, Any]) -> dict[str, float]:
        return {f"{rank}_accuracy": result.score for rank, result in results.items()}

    base = score(base_path(recipe), "base")
    every = {path.name: score(path, path.name) for path in run_checkpoints(run_dir)}
    selected = run_dir / "checkpoints" / selection.selected
    return {
        "base": accuracies(base),
        "blind": accuracies(score(selected, selection.selected, blind=True)),
        "selected": accuracies(every[selection.selected]),
        "chance": {rank: chance(result) for rank, result in base.items()},
        "questions": selection.questions,
        "cross_fitted": selection.cross_fitted,
        "checkpoints": {name: accuracies(results) for name, results in every.items()},
    }


def _ask(recipe: Recipe, path: Path) -> list[dict[str, str]]:
    """Return three questions about test images, answered by the selected model in one conversation each."""
    from sft.data.datasets import Adapter
    from sft.inference.chat import Conversation, responder
    from sft.models.loaded_model import load_for_inference

    test = Adapter("easy_vqa", None, "test", {"form": "questions"})
    rows = [row for file in test.files() for row in test.rows(file) if isinstance(row, dict)]
    questions = [
        next(row for row in rows if row["image"] == 3 and row["question"].startswith("what color")),
        next(row for row in rows if row["image"] == 4 and row["question"].startswith("what shape")),
        next(row for row in rows if row["image"] == 7 and row["answer"] in ("yes", "no")),
    ]
    loaded = load_for_inference(path)
    respond = responder(loaded.model, loaded.template, autocast=loaded.autocast)
    lines = []
    for row in questions:
        image, question = test.to_sample(row).messages[0].content
        assert not isinstance(image, str)
        answer = Conversation(respond).say(str(question), image)
        file = f"test/images/{row['image']}.png"
        where = str(image.source)
        lines.append(
            {"image": file, "file": where, "question": row["question"], "answer": answer, "right": row["answer"]}
        )
    return lines


def _show(report: dict[str, Any], out: Console) -> None:
    """Print the table of accuracies and the conversation."""
    lines = [("base, before fine-tuning", report["base"])]
    lines += [
        (("* " if name == report["selected_checkpoint"] else "  ") + name, figures)
        for name, figures in report["checkpoints"].items()
    ]
    lines.append((f"{report['selected_checkpoint']} without images", report["blind"]))
    rows = [(name, percent(f["text_accuracy"]), percent(f["letter_accuracy"])) for name, f in lines]
    rows.append(("chance", percent(report["chance"]["text"]), percent(report["chance"]["letter"])))
    asked = report["questions"] if isinstance(report["questions"], int) else report["questions"]["reported"]  # once so
    title = (
        f"\nAccuracy on {asked} questions about test images:\n"
        "a question counts when all rotations of its options are answered right"
    )
    out.print(table(title, ("model", "by option text", "by letter"), rows))
    if (worth := report.get("cross_fitted")) is not None:
        out.print(f"Chosen on one half and scored on the other, both columns have a mean of {percent(worth)}.")
    out.print(
        f"* selected. Training took {report['cpu_seconds_training']:.0f} CPU seconds at "
        f"{report['tokens_per_second']:,} tokens/s in {report['precision']}, all {report['seconds_total']:.0f} s\n"
    )
    for line in report["conversation"]:
        out.print(f"User: [{line['image']}] {line['question']}", markup=False)
        out.print(f"Assistant: {line['answer']}", markup=False)
        out.print(f"      (the dataset says: {line['right']})", markup=False)
