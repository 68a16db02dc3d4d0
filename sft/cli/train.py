"""`idefics-sft train RECIPE`: fine-tune, writing checkpoints."""

from pathlib import Path
from typing import Any

from rich.console import Console

from sft.cli.terminal import Json, Overrides, RecipeName, console, print_json, progress, quiet_libraries


def run(recipe: RecipeName, overrides: Overrides = None, json: Json = False) -> None:
    """Fine-tune as a recipe says; prepares what is missing."""
    from sft.naming import find_recipe

    found = find_recipe(recipe, overrides or ())
    status = train(found, console(to_stderr=json))
    if json:
        print_json({"output_dir": found.output_dir} | vars(status))
    else:
        print(f"{found.output_dir}: {status.status} at step {status.step}. Next: idefics-sft select {recipe}")


def train(recipe: Any, out: Console) -> Any:
    """Prepare and train with a progress bar; a finished run of the same recipe is left as it is.

    Raises:
        UserError: a run of another recipe is in the folder.
    """
    from sft.run_status import RunStatus

    run_dir = Path(recipe.output_dir)
    status = RunStatus.read(run_dir)
    if status:
        _refuse_other_recipe(recipe, run_dir)
    if status and status.status == "finished":
        out.print(f"{run_dir}: a finished run is here already; nothing is trained")
        return status
    if status:
        out.print(f"{run_dir}: an unfinished run was here, at step {status.step}; it starts again from the beginning")
    quiet_libraries()
    from sft import run as runs

    with progress("preparing", None, out) as update:
        sources = runs.prepare(recipe, lambda name, records: update(records, name))
    with progress("training", recipe.training.max_steps, out) as update:

        def on_step(step: int, line: dict[str, Any]) -> None:
            update(step, f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s")

        return runs.train(recipe, sources, on_step, out.print)


def _refuse_other_recipe(recipe: Any, run_dir: Path) -> None:
    from sft.errors import UserError
    from sft.recipe import load_recipe

    before = load_recipe(run_dir / "recipe.yaml")
    changed = [part for part in ("model", "data", "training", "seed") if getattr(before, part) != getattr(recipe, part)]
    if changed:
        raise UserError(
            f"{run_dir}: holds a run of another recipe ({', '.join(changed)} differ); choose another output_dir"
        )
