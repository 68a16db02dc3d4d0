"""`idefics-sft evaluate MODEL`: ask a model a benchmark of MMBench layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sft.cli.several import Nproc, start
from sft.cli.terminal import Json, console, percent, print_json, progress, quiet_libraries, table

if TYPE_CHECKING:
    from sft.core.distributed import Rank
    from sft.evaluation.mmbench.score import Benchmark
    from sft.evaluation.results import Result
    from sft.recipe import EvaluationConfig

PROTOCOLS = ("card", "vanilla", "circular")
RANKS = ("letter", "text", "generate")
EXAMPLES = (
    "evaluate runs/my-data --benchmark mmbench_dev_en.tsv",
    "evaluate runs/my-data@100 --benchmark mmbench.tsv --protocol card",
)


def run(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a hub id, a recipe, RUN, RUN@STEP, or RUN@base.")
    ],
    benchmark: Annotated[str | None, typer.Option(help="A TSV of MMBench layout, or easy_vqa.")] = None,
    protocol: Annotated[str | None, typer.Option(help="card, vanilla or circular (default).")] = None,
    rank: Annotated[
        str | None, typer.Option(help="Choose by the likelihood of the letter (default) or of the text.")
    ] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Choose by the answer that is written.")] = False,
    shots: Annotated[int | None, typer.Option(min=0, help="Answered questions shown before each.")] = None,
    support: Annotated[str | None, typer.Option(help="The TSV they come from; else a tenth of the images.")] = None,
    blind: Annotated[bool, typer.Option("--blind", help="Ask without the images.")] = False,
    baseline: Annotated[bool, typer.Option(help="Ask without the images too, to compare.")] = True,
    max_questions: Annotated[int | None, typer.Option(min=1, help="A seeded part, by whole images.")] = None,
    details: Annotated[Path | None, typer.Option(help="Write a line of JSON for each question.")] = None,
    submission: Annotated[Path | None, typer.Option(help="Write the .xlsx that MMBench's server scores.")] = None,
    nproc: Nproc = 1,
    json: Json = False,
) -> None:
    """Score a model on multiple-choice questions: overall, by category, and beside what it scores without images.

    What is left out comes from the recipe of the model's run. Where its checkpoint was chosen on one half of the
    images of that recipe's benchmark, figures come from the other.
    """
    from sft.core.distributed import process_group
    from sft.core.errors import UserError

    for option, value, allowed in (("protocol", protocol, PROTOCOLS), ("rank", rank, RANKS)):
        if value not in (None, *allowed):
            raise UserError(f"--{option} {value}: expected {', '.join(allowed[:-1])} or {allowed[-1]}")
    if generate and rank not in (None, "generate"):
        raise UserError(f"--generate and --rank {rank} exclude each other")
    ranks = ("generate",) if generate else (rank,) if rank else ("letter",) if protocol == "card" else None
    for option, file in (("details", details), ("submission", submission)):
        _check_place(option, file)
    asked = {"benchmark": benchmark, "protocol": protocol, "shots": shots, "support": support}
    asked["max_questions"] = max_questions
    if nproc > 1:
        options = {"rank": rank, "generate": generate, "blind": blind, "no_baseline": not baseline}
        start(
            nproc, ["evaluate", model], asked | options | {"details": details, "submission": submission, "json": json}
        )
    with process_group() as process:
        out = console(to_stderr=json)
        out.quiet = not process.is_main
        evaluation = _Evaluation(model, process, asked | {"ranks": ranks}, submission)
        out.print(f"model: {evaluation.path}")
        results = evaluation.ask(blind, out)
        without = evaluation.ask(True, out) if baseline and not blind and evaluation.benchmark.has_answers else {}
    if not process.is_main:
        return
    summaries = [
        result.summary(blind_accuracy=without[rank].on_questions_of(result).accuracy if without else None)
        for rank, result in results.items()
    ]
    if details:
        _write_details(details, results)
    if submission:
        from sft.evaluation.mmbench.submission import write_submission

        write_submission(submission, evaluation.benchmark.rows, results[evaluation.settings.ranks[0]])
        summaries[0]["submission"] = str(submission)
    if json:
        by_rank = {summary["rank"]: summary for summary in summaries}
        print_json(summaries[0] | ({"by_rank": by_rank} if len(by_rank) > 1 else {}))
        return
    for summary in summaries:
        _show(summary, out)
    if evaluation.is_half:
        out.print("figures come from the half of the images that does not choose the checkpoint")


class _Evaluation:
    """A model, and what it is asked."""

    def __init__(self, model: str, process: Rank, asked: dict[str, Any], submission: Path | None) -> None:
        """
        Raises:
            UserError: there is no such model, or what is asked for does not go together.
        """
        from sft.core.distributed import from_main
        from sft.recipe import EvaluationConfig
        from sft.runs.names import find_model, recipe_of_model

        self.path = from_main(lambda: _base_of(model) or find_model(model))
        recipe = recipe_of_model(model)
        chooses = recipe is not None and asked["benchmark"] in (None, recipe.evaluation.benchmark)
        self.settings = _settings(recipe.evaluation if recipe else EvaluationConfig(), chooses, asked)
        quiet_libraries()
        from sft.core.distributed import all_or_none
        from sft.evaluation.run_benchmark import ScoredModel, load_settings
        from sft.selection.rules import is_chosen_on_half

        with all_or_none():
            self.benchmark = load_settings(self.settings, Path(recipe.data.store) if recipe else Path("stores"))
        _check(self.benchmark, self.settings, submission)
        run_dir = Path(recipe.output_dir) if recipe else None
        self.is_half = chooses and not submission and run_dir is not None and is_chosen_on_half(run_dir)
        """Whether its checkpoint was chosen by the other half of the images."""
        name = "base" if model.endswith("@base") else Path(self.path).name
        self._scored = ScoredModel(self.path, run_dir=run_dir, name=name)

    def ask(self, blind: bool, out: Console) -> dict[Any, Result]:
        """The result by each ranking, of those questions that figures come from."""
        with progress(f"asking{' without images' if blind else ''}", None, out) as update:
            results = self._scored.score(
                self.benchmark,
                self.settings.ranks,
                blind=blind,
                on_progress=lambda done, total: update(done, f"of {total}"),
            )
        return {
            rank: result.on_half(1, self.settings.seed) if self.is_half else result for rank, result in results.items()
        }


def _base_of(model: str) -> Path | None:
    """The prepared base of a run, for RUN@base."""
    if not model.endswith("@base"):
        return None
    from sft.models.base_model import prepare_base
    from sft.runs.names import find_recipe

    return prepare_base(find_recipe(model.removesuffix("@base")))


def _settings(settings: EvaluationConfig, of_this_benchmark: bool, given: dict[str, Any]) -> EvaluationConfig:
    """What the recipe says, and what is given in its place. How much of its benchmark a recipe asks says nothing about
    another one."""
    from sft.core.errors import UserError
    from sft.evaluation.mmbench.protocols import check_protocol

    if not of_this_benchmark:
        settings = settings.model_copy(update={"max_questions": None})
    settings = settings.model_copy(update={name: value for name, value in given.items() if value is not None})
    if settings.benchmark is None:
        raise UserError("--benchmark is needed: a TSV of MMBench layout (the model's run names none)")
    if settings.benchmark.endswith(".jsonl"):
        raise UserError(
            f"{settings.benchmark}: evaluate asks multiple-choice questions, of a TSV of MMBench layout; short answers "
            f"choose among the checkpoints of a run: idefics-sft select RUN --benchmark {settings.benchmark}"
        )
    if given["support"] and not settings.shots:
        raise UserError("--support is where shots come from; give --shots K too")
    check_protocol(settings.protocol, settings.ranks)
    return settings


def _check_place(option: str, file: Path | None) -> None:
    """Whether a file can be written there, before hours of work."""
    from sft.core.errors import UserError

    if file is None:
        return
    place = next(folder for folder in file.absolute().parents if folder.exists())
    if file.is_dir() or not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"--{option} {file}: no file can be written there")


def _check(questions: Benchmark, settings: EvaluationConfig, submission: Path | None) -> None:
    """Whether there will be something to say at the end."""
    from sft.core.errors import UserError
    from sft.evaluation.mmbench.submission import check_submission

    if submission:
        check_submission(submission, questions, settings.ranks)
    elif not questions.has_answers:
        raise UserError(f"{settings.benchmark}: a test split, without answers to score by; give --submission FILE.xlsx")


def _write_details(file: Path, results: dict[Any, Result]) -> None:
    """One file, or one for each ranking with its name before the suffix."""
    from sft.evaluation.results import write_questions

    for rank, result in results.items():
        write_questions(result, file if len(results) == 1 else file.with_suffix(f".{rank}{file.suffix}"))


def _show(summary: dict[str, Any], out: Console) -> None:
    """One ranking: by category, over all, and what to compare it with."""
    shots = f", {summary['shots']} shot{'s' * (summary['shots'] > 1)}" if summary["shots"] else ""
    blind = "" if summary["with_images"] else ", without images"
    title = f"{summary['benchmark']}, {summary['protocol']}, by {summary['rank']}{shots}{blind}, {summary['rows']} rows"
    if summary["accuracy"] is None:
        out.print(f"{title}: answers not scored here, in {summary['submission']}")
    else:
        parts = [(*part, "") for part in summary["categories"].items()]
        if summary["l2_categories"] != summary["categories"]:
            parts += [(*part, " (l2)") for part in summary["l2_categories"].items()]
        rows = [(f"{name}{kind}", str(part["questions"]), percent(part["accuracy"])) for name, part, kind in parts]
        low, high = summary["interval"]
        figure = f"{percent(summary['accuracy'])} ± {summary['standard_error'] * 100:.1f}"
        rows.append(("all", str(summary["questions"]), figure))
        out.print(table(title, ("category", "questions", "accuracy"), rows))
        out.print(f"95 % interval {percent(low)} to {percent(high)}, over images as clusters")
        if summary["blind"] is not None and summary["with_images"]:
            out.print(f"without images {percent(summary['blind'])}")
        again = f" ({percent(summary['independent_chance'])} guessing anew in each rotation)"
        anew = again if summary["protocol"] == "circular" else ""
        out.print(f"chance {percent(summary['chance'])}{anew}")
    for reason, number in summary["filtered"].items():
        out.print(f"{number} questions were not asked: {reason}")
    if summary["not_finite"]:
        out.print(f"{summary['not_finite']} rows count as wrong: the model's outputs are not finite there")
    for deviation in summary["deviations"]:
        out.print(f"differs from its source: {deviation}")
    letters = ", ".join(f"{letter} {percent(share)}" for letter, share in summary["letters"].items())
    out.print(f"letters predicted: {letters}; protocol {summary['protocol_hash']}\n")
