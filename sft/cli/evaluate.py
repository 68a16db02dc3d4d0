"""`idefics-sft evaluate MODEL`: ask a model a benchmark of MMBench layout."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sft.cli.terminal import Json, console, percent, print_json, progress, quiet_libraries, table


def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a hub id, a recipe, RUN or RUN@STEP.")],
    benchmark: Annotated[str | None, typer.Option(help="A TSV of MMBench layout, or easy_vqa.")] = None,
    protocol: Annotated[str, typer.Option(help="circular or vanilla.")] = "circular",
    rank: Annotated[str, typer.Option(help="What is ranked: text or letter.")] = "text",
    blind: Annotated[bool, typer.Option(help="Ask without the images.")] = False,
    max_questions: Annotated[int | None, typer.Option(min=1, help="A seeded part, by whole images.")] = None,
    json: Json = False,
) -> None:
    """Score a model on multiple-choice questions by the likelihood of the options."""
    from sft.errors import UserError
    from sft.naming import find_model, recipe_of_model

    for option, value, allowed in (
        ("--protocol", protocol, ("circular", "vanilla")),
        ("--rank", rank, ("text", "letter")),
    ):
        if value not in allowed:
            raise UserError(f"{option} {value}: expected {' or '.join(allowed)}")
    recipe = recipe_of_model(model)
    if benchmark is None:
        benchmark = recipe.evaluation.benchmark if recipe else None
        max_questions = max_questions or (recipe.evaluation.max_questions if recipe else None)
    if benchmark is None:
        raise UserError("--benchmark is needed: a TSV of MMBench layout (the model's run names none)")
    path = find_model(model)
    quiet_libraries()
    from sft.evaluation.score import evaluate, load_benchmark
    from sft.inference import load_for_inference
    from sft.scoring import benchmark_file

    out = console(to_stderr=json)
    out.print(f"model: {path}")
    store, seed = (Path(recipe.data.store), recipe.evaluation.seed) if recipe else (Path("stores"), 0)
    questions = load_benchmark(
        benchmark_file(benchmark, store, seed=seed),
        protocol=protocol,  # type: ignore[arg-type]
        max_questions=max_questions,
        seed=seed,
    )
    loaded = load_for_inference(path)
    with progress("asking", None, out) as update:
        results = evaluate(
            loaded.model,
            loaded.template,
            questions,
            image_size=loaded.image_size,
            ranks=[rank],  # type: ignore[list-item]
            blind=blind,
            autocast=loaded.autocast,
            on_progress=lambda done, total: update(done, f"of {total}"),
        )
    summary: dict[str, Any] = next(iter(results.values())).summary()
    if json:
        print_json(summary)
        return
    rows = [(name, str(part["questions"]), percent(part["accuracy"])) for name, part in summary["categories"].items()]
    error = f"± {summary['standard_error'] * 100:.1f}"
    rows.append(("all", str(summary["questions"]), f"{percent(summary['accuracy'])} {error}"))
    title = f"{questions.name}, {protocol}, by {rank}{', without images' if blind else ''}"
    out.print(table(title, ("category", "questions", "accuracy"), rows))
    out.print(f"chance {percent(summary['chance'])}; letters predicted: {_letters(summary['letters'])}")


def _letters(shares: dict[str, float]) -> str:
    return ", ".join(f"{letter} {percent(share)}" for letter, share in shares.items())
