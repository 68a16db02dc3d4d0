"""`idefics-sft train RECIPE`: fine-tune, writing checkpoints."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sft.cli.terminal import Json, Overrides, RecipeName, console, preparation, print_json, progress, quiet_libraries

BAR_WIDTH = 70
"""Columns of a terminal that the bar, the steps and the times take."""


def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start an unfinished run anew.")] = False,
    json: Json = False,
) -> None:
    """Fine-tune as a recipe says; prepares what is missing."""
    from sft.naming import find_recipe

    found = find_recipe(recipe, overrides or ())
    out = console(to_stderr=json)
    status = train(found, out, fresh=fresh)
    if json:
        print_json({"output_dir": found.output_dir} | vars(status))
        return
    command = "select" if found.evaluation.benchmark or found.data.validation else "chat"
    out.print(
        f"{found.output_dir}: {status.status} at step {status.step}. Next: idefics-sft {command} {found.output_dir}"
    )


def train(recipe: Any, out: Console, *, fresh: bool = False) -> Any:
    """Prepare and train with a progress bar; a finished run of the same recipe is left as it is.

    Raises:
        UserError: a run of another recipe is in the folder, or an unfinished one and not `fresh`.
    """
    from sft.errors import UserError
    from sft.run_status import RunStatus

    run_dir = Path(recipe.output_dir)
    status = None if fresh else RunStatus.read(run_dir)
    if status:
        _refuse_other_recipe(recipe, run_dir)
        if status.status != "finished":
            raise UserError(
                f"{run_dir}: holds an unfinished run ({status.status} at step {status.step} of {status.max_steps}); "
                "runs cannot be resumed yet, --fresh starts it anew"
            )
        out.print(f"{run_dir}: a finished run is here already; nothing is trained")
        return status
    quiet_libraries()
    from sft import run as runs
    from sft.monitoring import check_trackers

    check_trackers(recipe.training.report_to)  # before hours of preparation
    with preparation(out) as update:
        sources = runs.prepare(recipe, update)
    with progress("training", recipe.training.max_steps, out) as update:

        def on_step(step: int, line: dict[str, Any]) -> None:
            update(step, note(line, out.width - BAR_WIDTH if out.is_terminal else None))

        return runs.train(recipe, sources, on_step, out.print)


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


def _refuse_other_recipe(recipe: Any, run_dir: Path) -> None:
    from sft.errors import UserError
    from sft.recipe import load_recipe

    file = run_dir / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"{run_dir}: has a run.json but no recipe.yaml; --fresh starts anew")
    before, now = (
        r.model_dump(include={"model", "data", "training", "checkpoints", "seed"}) for r in (load_recipe(file), recipe)
    )
    now["data"]["store"] = before["data"]["store"]  # where prepared data stands changes nothing
    changed = [part for part in before if before[part] != now[part]]
    if changed:
        raise UserError(
            f"{run_dir}: holds a run of another recipe ({', '.join(changed)} differ); choose another output_dir"
        )
