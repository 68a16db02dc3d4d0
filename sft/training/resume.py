"""The decision whether to resume the run of a folder, and from which checkpoint; settings that have changed since."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.core.errors import UserError
from sft.recipe import Recipe, load_recipe
from sft.runs.checkpoint import check_state, newest_state
from sft.runs.status import RunStatus

if TYPE_CHECKING:
    from sft.training.metrics import Log

FREE = {"data.store", "data.num_workers", "data.worker_timeout", "data.max_dirty_samples", "training.report_to"}
"""Settings that do not change what is trained."""


def find_run(recipe: Recipe, resume: str, allow_changed: bool, log: Log) -> RunStatus | Path | None:
    """Look for a run in the recipe's output_dir: return the status of a finished one, or the checkpoint to resume from.
    `resume` is auto, none or a checkpoint, as on the command line. Raise UserError where the folder holds a run of
    another recipe, or nothing to resume as `resume` asks."""
    run_dir = Path(recipe.output_dir)
    status = None if resume == "none" else RunStatus.read(run_dir)
    if status is None:
        if resume not in ("auto", "none"):
            raise UserError(f"--resume {resume}: {run_dir} holds no run to go on with")
        return None
    changed = check_changes(recipe, allow_changed)
    if changed:
        log(f"changed, so not as it would have been without a break: {', '.join(changed)}")
    if status.status == "finished" and resume == "auto" and not changed:
        log(f"{run_dir}: a finished run is here already; nothing is trained")
        return status
    return _find_checkpoint(resume, run_dir, log)


def check_changes(recipe: Recipe, allow_changed: bool) -> list[str]:
    """Return the settings that differ from those of the run in the recipe's output_dir, if there is one; raise
    UserError where some do and `allow_changed` is false."""
    run_dir = Path(recipe.output_dir)
    changed = changed_settings(recipe, run_dir) if RunStatus.read(run_dir) else []
    if changed and not allow_changed:
        raise UserError(
            f"{run_dir}: holds a run of another recipe (other: {', '.join(changed)}); choose another output_dir, "
            "or --allow-changed goes on with these, not as it would have without a break"
        )
    return changed


def changed_settings(recipe: Recipe, run_dir: Path) -> list[str]:
    """Return the dotted names of settings that change what is trained and differ from those of the run in a folder;
    raise UserError where the run has no recipe."""
    file = run_dir / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"{run_dir}: has a run.json but no recipe.yaml; --resume none starts anew")
    before, now = _by_name(load_recipe(file)), _by_name(recipe)
    return [name for name in sorted(now.keys() - FREE) if before[name] != now[name]]


def _by_name(recipe: Recipe) -> dict[str, Any]:
    parts = recipe.model_dump(include={"model", "data", "training"})
    return {"seed": recipe.seed} | {f"{part}.{name}": own[name] for part, own in parts.items() for name in own}


def _find_checkpoint(resume: str, run_dir: Path, log: Log) -> Path | None:
    """Return the checkpoint to resume from; None where the run has no checkpoint yet. Raise UserError where the one
    asked for is not of this run, or not complete, or where there are checkpoints, but none to resume from: starting
    anew would delete them."""
    folder = run_dir / "checkpoints"
    if resume != "auto":
        asked = Path(resume)
        if asked.resolve().parent != folder.resolve():
            raise UserError(f"--resume {resume}: not a checkpoint of this run; they are in {folder}")
        check_state(asked)
        log(f"going on from {asked}")
        return asked
    found = newest_state(folder, log)
    if found is None and any(folder.glob("checkpoint-*")):
        raise UserError(
            f"{run_dir}: holds checkpoints, but none with a state to go on from; "
            "--resume none deletes them and starts anew, another output_dir leaves them"
        )
    log(f"going on from {found}" if found else f"{run_dir}: no checkpoint yet; starting anew")
    return found
