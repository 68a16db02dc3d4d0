"""`idefics-sft select RUN`: score every checkpoint and choose one."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sft.cli.terminal import Json, console, percent, print_json, progress, quiet_libraries, table


def run(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run, or its recipe.")], json: Json = False
) -> None:
    """Score every checkpoint of a run on its benchmark and choose one; writes selection.json."""
    from sft.naming import find_recipe

    recipe = find_recipe(run)
    out = console(to_stderr=json)
    selection = select(recipe, out)
    if json:
        from dataclasses import asdict

        print_json(asdict(selection))
        return
    show(selection, out)
    out.print(f"Next: idefics-sft chat {run}")


def select(recipe: Any, out: Console) -> Any:
    """Evaluate what is not evaluated yet, and choose."""
    from sft.errors import UserError
    from sft.naming import run_checkpoints

    checkpoints = run_checkpoints(Path(recipe.output_dir))
    quiet_libraries()
    from sft import selection
    from sft.scoring import recipe_benchmark, score_model

    benchmark = recipe_benchmark(recipe)
    if benchmark is None:
        raise UserError(f"{recipe.output_dir}: the recipe names no evaluation.benchmark to choose by")
    hashes: set[str] = set()
    for path in checkpoints:
        with progress(f"asking {path.name}", None, out) as update:
            results = score_model(
                path,
                benchmark,
                run_dir=Path(recipe.output_dir),
                name=path.name,
                ranks=recipe.evaluation.ranks,
                on_progress=lambda done, total, update=update: update(done, f"of {total} tokens"),  # type: ignore[misc]
            )
        hashes |= {result.protocol_hash for result in results.values()}
    return selection.select(
        Path(recipe.output_dir),
        benchmark=benchmark.name,
        seed=recipe.evaluation.seed,
        protocol_hashes=hashes,
    )


def show(selection: Any, out: Console) -> None:
    """The choice as a table."""
    rows = [
        (
            ("* " if score.checkpoint == selection.selected else "  ") + score.checkpoint,
            f"{percent(score.score)} ± {score.standard_error * 100:.1f}",
            percent(score.p_best),
            "yes" if score.checkpoint in selection.tied else "no",
        )
        for score in selection.scores
    ]
    ranks = " and ".join(selection.ranks)
    title = (
        f"{selection.benchmark} by {ranks}: chosen on {selection.questions[0]} questions, "
        f"figures from {selection.questions[1]} others"
    )
    out.print(table(title, ("checkpoint", "score", "P(best)", "tied"), rows))
    out.print(f"selected: {selection.selected}; cross-fitted figure {percent(selection.cross_fitted)}")
