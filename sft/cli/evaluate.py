"""`idefics-sft evaluate MODEL`: ask a model a benchmark of MMBench layout."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sft.cli.terminal import Json, console, percent, print_json, progress, quiet_libraries, table


def run(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a hub id, a recipe, RUN, RUN@STEP, or RUN@base.")
    ],
    benchmark: Annotated[str | None, typer.Option(help="A TSV of MMBench layout, or easy_vqa.")] = None,
    protocol: Annotated[str | None, typer.Option(help="circular (default) or vanilla.")] = None,
    rank: Annotated[str | None, typer.Option(help="What is ranked: text or letter; both, if left out.")] = None,
    blind: Annotated[bool, typer.Option(help="Ask without the images.")] = False,
    max_questions: Annotated[int | None, typer.Option(min=1, help="A seeded part, by whole images.")] = None,
    json: Json = False,
) -> None:
    """Score a model on multiple-choice questions by the likelihood of the options.

    What is left out comes from the recipe of the model's run. Where its checkpoint was chosen on one half of the
    images, figures come from the other.
    """
    from sft.errors import UserError
    from sft.naming import find_model, recipe_of_model
    from sft.recipe import EvaluationConfig

    for option, value, allowed in (("protocol", protocol, ("circular", "vanilla")), ("rank", rank, ("text", "letter"))):
        if value not in (None, *allowed):
            raise UserError(f"--{option} {value}: expected {' or '.join(allowed)}")
    path = _base_of(model) or find_model(model)
    recipe = recipe_of_model(model)
    settings = recipe.evaluation if recipe else EvaluationConfig()
    given: dict[str, Any] = {"benchmark": benchmark, "protocol": protocol, "max_questions": max_questions}
    given["ranks"] = (rank,) if rank else None
    settings = settings.model_copy(update={name: value for name, value in given.items() if value is not None})
    if settings.benchmark is None:
        raise UserError("--benchmark is needed: a TSV of MMBench layout (the model's run names none)")
    quiet_libraries()
    from sft.scoring import load_settings, score_model
    from sft.selection.choice import is_chosen_on_half

    out = console(to_stderr=json)
    out.print(f"model: {path}")
    questions = load_settings(settings, Path(recipe.data.store) if recipe else Path("stores"))
    with progress("asking", None, out) as update:
        results = score_model(
            Path(path),
            questions,
            run_dir=Path(recipe.output_dir) if recipe else None,
            name="base" if model.endswith("@base") else Path(path).name,
            ranks=settings.ranks,
            blind=blind,
            on_progress=lambda done, total: update(done, f"of {total} tokens"),
        )
    is_half = recipe is not None and is_chosen_on_half(Path(recipe.output_dir))
    if is_half:
        results = {name: result.on_half(1, settings.seed) for name, result in results.items()}
    summaries = {name: result.summary() for name, result in results.items()}
    if json:
        print_json(next(iter(summaries.values())) if len(summaries) == 1 else {str(n): s for n, s in summaries.items()})
        return
    for name, summary in summaries.items():
        _show(f"{questions.name}, {summary['protocol']}, by {name}{', without images' if blind else ''}", summary, out)
    if is_half:
        out.print("figures come from the half of the images that does not choose the checkpoint")


def _base_of(model: str) -> Path | None:
    """The prepared base of a run, for RUN@base."""
    if not model.endswith("@base"):
        return None
    from sft.naming import find_recipe
    from sft.run import prepare_base

    return prepare_base(find_recipe(model.removesuffix("@base")))


def _show(title: str, summary: dict[str, Any], out: Console) -> None:
    rows = [(name, str(part["questions"]), percent(part["accuracy"])) for name, part in summary["categories"].items()]
    error = f"± {summary['standard_error'] * 100:.1f}"
    rows.append(("all", str(summary["questions"]), f"{percent(summary['accuracy'])} {error}"))
    out.print(table(title, ("category", "questions", "accuracy"), rows))
    letters = ", ".join(f"{letter} {percent(share)}" for letter, share in summary["letters"].items())
    out.print(f"chance {percent(summary['chance'])}; letters predicted: {letters}\n")
