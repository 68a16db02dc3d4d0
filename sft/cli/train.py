"""`idefics-sft train RECIPE`: fine-tune, writing checkpoints."""

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
    preparation,
    print_json,
    progress,
    quiet_libraries,
    table,
)


def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start an unfinished run anew.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, measure memory and time of a step, write nothing to output_dir.")
    ] = False,
    json: Json = False,
) -> None:
    """Fine-tune as a recipe says; prepares what is missing."""
    from sft.naming import find_recipe

    found = find_recipe(recipe, overrides or ())
    out = console(to_stderr=json)
    if dry_run:
        _rehearse(found, out, json=json)
        return
    status = train(found, out, fresh=fresh)
    if json:
        print_json({"output_dir": found.output_dir} | vars(status))
        return
    command = "select" if found.evaluation.benchmark or found.data.validation else "chat"
    out.print(
        f"{found.output_dir}: {status.status} at step {status.step}. Next: idefics-sft {command} {found.output_dir}"
    )


def _rehearse(recipe: Any, out: Console, *, json: bool) -> None:
    from sft import run as runs
    from sft.checks.before_training import check_writable
    from sft.precision import choose_precision, device

    check_writable(Path(recipe.output_dir))
    quiet_libraries()
    with preparation(out) as update:
        sources = runs.prepare(recipe, update)
    measured = runs.dry_run(recipe, sources, out.print)
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
    from sft.checks.before_training import check_writable

    check_writable(run_dir)
    with preparation(out) as update:
        sources = runs.prepare(recipe, update)
    with progress("training", recipe.training.max_steps, out) as update:

        def on_step(step: int, line: dict[str, Any]) -> None:
            update(step, f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s")

        return runs.train(recipe, sources, on_step, out.print)


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
