"""`idefics-sft evaluate MODEL`: score a model on benchmarks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from sft.cli.evaluation_tables import Found, card_figure, report
from sft.cli.several import Nproc, start
from sft.cli.terminal import Json, console, progress, quiet_libraries
from sft.core.errors import UserError

if TYPE_CHECKING:
    from sft.evaluation.results import Result
    from sft.evaluation.task import Task
    from sft.models.loaded_model import Load
    from sft.recipe import EvaluationConfig, Recipe

EXAMPLES = (
    "evaluate runs/my-data --benchmark mmbench_dev_en.tsv",
    "evaluate runs/my-data@100 --benchmark mmbench.tsv --protocol card",
    "evaluate runs/my-data --task vqav2=coco --task mmbench=dev_en.tsv",
)


def run(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a hub id, a recipe, RUN, RUN@STEP, or RUN@base.")
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK[=PATH]", help="One of `tasks list`; as often as there are several."),
    ] = None,
    harness: Annotated[
        Literal["lmms-eval"] | None, typer.Option("--with", help="Ask the --tasks of this harness, if it is installed.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(metavar="A,B", help="Tasks of the harness.")] = None,
    benchmark: Annotated[
        str | None,
        typer.Option("--benchmark", "--data", help="A TSV of MMBench layout, easy_vqa, or the data of the task."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="The part of the benchmark; `tasks list` has them.")] = None,
    protocol: Annotated[
        Literal["card", "vanilla", "circular"] | None,
        typer.Option(help="How a question is asked: circular by default."),
    ] = None,
    rank: Annotated[
        Literal["letter", "text", "generate"] | None,
        typer.Option(help="Choose by the likelihood of the letter (default) or of the text."),
    ] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Choose by the answer that is generated.")] = False,
    shots: Annotated[str | None, typer.Option(metavar="K[,K]", help="Answered questions before each: 0,4,8.")] = None,
    select: Annotated[
        Literal["random", "rices", "groups"] | None,
        typer.Option(help="How shots are chosen: random by default; rices takes the most alike images."),
    ] = None,
    support: Annotated[str | None, typer.Option(help="Where they come from: a split, a folder or a TSV.")] = None,
    features: Annotated[str | None, typer.Option(help="The CLIP of rices; the model's own tower if left out.")] = None,
    prompt: Annotated[
        Literal["chat", "base", "instruct"] | None,
        typer.Option(help="The words around a question; base and instruct are the card's."),
    ] = None,
    num_beams: Annotated[int | None, typer.Option(min=1, help="Beams of generated answers; the card used 3.")] = None,
    blind: Annotated[bool, typer.Option("--blind", help="Ask without the images.")] = False,
    baseline: Annotated[bool, typer.Option(help="Ask without the images too, to compare.")] = True,
    max_questions: Annotated[int | None, typer.Option(min=1, help="A seeded part, by whole images.")] = None,
    details: Annotated[Path | None, typer.Option(help="Write a line of JSON for each question.")] = None,
    submission: Annotated[Path | None, typer.Option(help="Write the .xlsx that MMBench's server scores.")] = None,
    nproc: Nproc = 1,
    json: Json = False,
) -> None:
    """Score a model on benchmarks: overall, by category, and beside what it scores without images.

    What is left out comes from the recipe of the model's run.
    """
    from sft.core.distributed import process_group
    from sft.runs.names import chosen_by

    scorings = _scorings(protocol, rank, generate)
    if (harness is None) != (tasks is None):
        raise UserError("--with lmms-eval and --tasks A,B go together")
    task = [*(task or ()), *(f"lmms_eval={name.strip()}" for name in (tasks or "").split(",") if name)]
    for option, file in (("details", details), ("submission", submission)):
        _check_place(option, file)
    if nproc > 1:
        start(context)
    with process_group() as process:
        out = console(to_stderr=json)
        out.quiet = not process.is_main
        names = (
            "benchmark",
            "split",
            "protocol",
            "select",
            "support",
            "features",
            "prompt",
            "num_beams",
            "max_questions",
        )
        changes = {name: context.params[name] for name in names}
        numbers = _shots(shots)
        changes |= {"by": tuple(task) if task else None, "ranks": scorings, "shots": max(numbers) if numbers else None}
        evaluation = Evaluation(model, changes, submission, numbers)
        out.print(f"model: {evaluation.path}{chosen_by(evaluation.path)}")
        found = evaluation.evaluate(blind, baseline, out)
    if process.is_main:
        report(found, details, submission, json, out, evaluation.card)


def _scorings(protocol: str | None, rank: str | None, generate: bool) -> tuple[str, ...] | None:
    """Return the ways of scoring options that are asked for; None leaves it to the recipe."""
    if generate and rank not in (None, "generate"):
        raise UserError(f"--generate and --rank {rank} exclude each other")
    return ("generate",) if generate else (rank,) if rank else ("letter",) if protocol == "card" else None


def _shots(text: str | None) -> list[int]:
    """Return the numbers of shots that are asked for, rising."""
    if not all(one.strip().isdecimal() for one in (text or "0").split(",")):
        raise UserError(f"--shots {text}: expected a number, or several as 0,4,8")
    return sorted({int(one) for one in text.split(",")}) if text else []


class Evaluation:
    """A model, and the tasks that it is asked."""

    def __init__(
        self, model: str, changes: dict[str, Any], submission: Path | None, numbers: Sequence[int] = ()
    ) -> None:
        from sft.core.distributed import all_or_none
        from sft.recipe import EvaluationConfig

        recipe = self.take(model)
        settings = _settings(recipe.evaluation if recipe else EvaluationConfig(), changes)
        quiet_libraries()
        with all_or_none():
            drawn = settings.asked_shots
            each = [drawn.model_copy(update={"number": number}) for number in numbers or (drawn.number,)]
            all_settings = [settings.model_copy(update={"shots": own}) for own in each]
            self.tasks = [task for own in all_settings for task in _open_tasks(own, recipe, submission)]
        self.card = partial(card_figure, model, drawn.select)

    def take(self, model: str) -> Recipe | None:
        """Ask this model from here on; return the recipe of its run. Raise UserError where there is no such model."""
        from sft.core.distributed import from_main
        from sft.runs.names import find_model, recipe_of_model

        self.path = from_main(lambda: _base_of(model) or find_model(model))
        recipe = recipe_of_model(model)
        self._run_dir = Path(recipe.output_dir) if recipe else None
        self._name = "base" if model.endswith("@base") else Path(self.path).name
        self._load: Load | None = None
        return recipe

    def evaluate(self, blind: bool, baseline: bool, out: Console) -> list[Found]:
        """Return the results on each task; without images too where that is wanted and the task has any."""
        from sft.evaluation.task import PromptedTask

        prompted = [task for task in self.tasks if isinstance(task, PromptedTask)]
        if blind and len(prompted) < len(self.tasks):
            raise UserError("--blind: the loss of held-out samples is not measured without their images")
        tasks: Sequence[Task] = [task.without_images() for task in prompted] if blind else self.tasks
        results = self._score(tasks, " without images" * blind, out)
        compared: list[Task] = [task for task in prompted if task.has_answers] if baseline and not blind else []
        twins = self._score([task.without_images() for task in compared], " without images", out)
        blinds = dict(zip(compared, twins, strict=True))
        return [Found(task, result, blinds.get(task)) for task, result in zip(tasks, results, strict=True)]

    def _score(self, tasks: Sequence[Task], how: str, out: Console) -> list[Result]:
        from sft.evaluation.run_tasks import score_model
        from sft.models.loaded_model import load_for_inference

        if not tasks:
            return []
        self._load = self._load or cache(load_for_inference)  # once, for what is asked with images and without
        with progress(f"evaluating{how}", None, out) as update:
            return score_model(
                self.path,
                tasks,
                run_dir=self._run_dir,
                name=self._name,
                load=self._load,
                on_progress=lambda done, total: update(done, f"of {total}"),
            )


def _base_of(model: str) -> Path | None:
    """Return the prepared base of a run, for RUN@base."""
    if not model.endswith("@base"):
        return None
    from sft.models.base_model import find_prepared_base
    from sft.runs.names import find_recipe

    return find_prepared_base(find_recipe(model.removesuffix("@base")))


def _settings(settings: EvaluationConfig, changes: dict[str, Any]) -> EvaluationConfig:
    """Return the settings of the recipe with the given ones in their place. How much of its benchmark a recipe asks
    says nothing about another one. Raise UserError where nothing says what to ask, or options do not go together."""
    from sft.evaluation.tasks import named_tasks
    from sft.evaluation.tasks.mmbench.protocols import check_protocol

    asked = {name: changes[name] for name in ("select", "support", "features") if changes[name] is not None}
    changed = {name: value for name, value in changes.items() if value is not None and name not in asked}
    shots = settings.asked_shots.model_copy(
        update=asked | {"number": changed.pop("shots")} if "shots" in changed else asked
    )
    changed["shots"] = shots
    if changes["benchmark"] and not changes["by"] and changes["benchmark"] != settings.benchmark:
        changed["by"] = None
    found = settings.model_copy(update=changed)
    if found.benchmark is None and found.by is None:
        raise UserError("--benchmark is needed: a TSV of MMBench layout (the model's run names none), or --task")
    if named_tasks(found)[0] != named_tasks(settings)[0]:
        found = found.model_copy(update={"max_questions": changes["max_questions"]})
    if asked and not shots.number:
        raise UserError(f"--{next(iter(asked))} says which shots are shown; give --shots K too")
    if shots.features and shots.select != "rices":
        raise UserError("--features says which images are alike; give --select rices too")
    names = [task.name for task in named_tasks(found)]
    given = [f"--{name.replace('_', '-')}" for name in ("shots", "max_questions", "prompt") if changes[name]]
    if given and "exact_match" in names:
        raise UserError(f"{given[0]}: exact_match takes every question of its file, in a chat without shots")
    given = [f"--{name.rstrip('s')}" for name in ("protocol", "ranks") if changes[name] is not None]
    if given and "mmbench" not in names:
        raise UserError(f"{given[0]} goes with multiple-choice questions of MMBench's layout")
    check_protocol(found.protocol, found.ranks)
    return found


def _check_place(option: str, file: Path | None) -> None:
    """Check that a file can be written there, before hours of work."""
    if file is None:
        return
    place = next(folder for folder in file.absolute().parents if folder.exists())
    if file.is_dir() or not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"--{option} {file}: no file can be written there")


def _open_tasks(settings: EvaluationConfig, recipe: Recipe | None, submission: Path | None) -> list[Task]:
    """Read the benchmarks, and check that there will be something to say at the end."""
    from sft.evaluation.held_out_loss import open_held_out
    from sft.evaluation.tasks import named_tasks, open_tasks
    from sft.evaluation.tasks.mmbench.multiple_choice import MMBench
    from sft.evaluation.tasks.mmbench.submission import check_submission

    store = Path(recipe.data.store if recipe else "stores")
    held_out = (lambda: open_held_out(recipe)) if recipe and recipe.data.validation else None
    tasks = open_tasks(named_tasks(settings), settings, store, held_out=held_out)
    if submission:
        if not isinstance(tasks[0], MMBench):
            raise UserError(f"--submission {submission}: goes with a benchmark of MMBench layout")
        check_submission(submission, tasks[0].chosen, settings.ranks)
    for task in tasks if not submission else ():
        if not task.has_answers:
            what = settings.benchmark or task.benchmark
            raise UserError(f"{what}: a test split, without answers to score by; give --submission FILE.xlsx")
    return tasks
