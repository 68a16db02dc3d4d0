"""`idefics-sft train RECIPE`: fine-tune, writing checkpoints."""

import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sft.cli.terminal import Json, Overrides, RecipeName, console, preparation, print_json, progress, quiet_libraries
from sft.distributed import ALONE, Rank, as_main
from sft.errors import UserError


def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine, one a GPU, that train together.")] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start an unfinished run anew.")] = False,
    json: Json = False,
) -> None:
    """Fine-tune as a recipe says; prepares what is missing."""
    from sft.distributed import joined, launch, launched_as
    from sft.naming import find_recipe

    found = find_recipe(recipe, overrides or ())
    if nproc > 1:
        if launched_as().of > 1:
            raise UserError(f"--nproc {nproc}: the processes are started already, by torchrun or srun; leave it out")
        _prepare_for(nproc, found, console(to_stderr=json))
        options = [*(["--fresh"] if fresh else []), *(["--json"] if json else [])]
        sys.exit(launch(nproc, ["train", recipe, *(overrides or ()), *options]))
    with redirect_stdout(sys.stderr) if json else nullcontext(), joined() as rank:  # DeepSpeed prints
        out = console(to_stderr=json)
        out.quiet = not rank.is_main
        status = train(found, out, fresh=fresh, rank=rank)
    if not rank.is_main:
        return
    if json:
        print_json({"output_dir": found.output_dir} | vars(status))
        return
    command = "select" if found.evaluation.benchmark or found.data.validation else "chat"
    out.print(
        f"{found.output_dir}: {status.status} at step {status.step}. Next: idefics-sft {command} {found.output_dir}"
    )


def train(recipe: Any, out: Console, *, fresh: bool = False, rank: Rank = ALONE) -> Any:
    """Prepare and train with a progress bar; a finished run of the same recipe is left as it is.

    One of several processes, `rank` of them, prepares nothing: all would.

    Raises:
        UserError: a run of another recipe is in the folder, or an unfinished one and not `fresh`; or several processes
            find something that is not prepared.
    """
    run_dir = Path(recipe.output_dir)
    status = None if fresh else as_main(rank, lambda: _finished(recipe, run_dir))
    if status:
        out.print(f"{run_dir}: a finished run is here already; nothing is trained")
        return status
    quiet_libraries()
    from sft import run as runs

    if rank.of > 1:
        sources, _ = runs.open_prepared(recipe)
    else:
        with preparation(out) as update:
            sources = runs.prepare(recipe, update)
    with progress("training", recipe.training.max_steps, out) as update:

        def on_step(step: int, line: dict[str, Any]) -> None:
            update(step, f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s")

        return runs.train(recipe, sources, on_step, out.print, rank)


def _prepare_for(nproc: int, recipe: Any, out: Console) -> None:
    """Prepare what several processes are to train on; what they would refuse is refused before.

    Raises:
        UserError: see `train`, or there are fewer GPUs than processes.
    """
    import torch

    from sft import run as runs
    from sft.distributed import choose_engine

    if torch.cuda.is_available() and nproc > torch.cuda.device_count():
        raise UserError(f"--nproc {nproc}: this machine has {torch.cuda.device_count()} GPUs; each process needs one")
    choose_engine(recipe.distributed.engine, recipe.model.mode, Rank(0, nproc))
    quiet_libraries()
    with preparation(out) as update:
        runs.prepare(recipe, update)


def _finished(recipe: Any, run_dir: Path) -> Any:
    """The status of a finished run of the recipe, or None where there is no run."""
    from sft.run_status import RunStatus

    status = RunStatus.read(run_dir)
    if status is None:
        return None
    _refuse_other_recipe(recipe, run_dir)
    if status.status != "finished":
        raise UserError(
            f"{run_dir}: holds an unfinished run ({status.status} at step {status.step} of {status.max_steps}); "
            "runs cannot be resumed yet, --fresh starts it anew"
        )
    return status


def _refuse_other_recipe(recipe: Any, run_dir: Path) -> None:
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
