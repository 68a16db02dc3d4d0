"""Whether the folder of a recipe holds a run to go on with, and from which checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from sft.core.errors import UserError


def what_is_there(
    recipe: Any, run_dir: Path, resume: str, allow_changed: bool, out: Console
) -> tuple[Any, Path | None]:
    """The status of a run that is finished; or the checkpoint to go on from, None to start anew.

    Raises:
        UserError: see `train`.
    """
    from sft.runs.status import RunStatus

    status = None if resume == "none" else RunStatus.read(run_dir)
    if status is None:
        if resume not in ("auto", "none"):
            raise UserError(f"--resume {resume}: {run_dir} holds no run to go on with")
        return None, None
    changed = check_changes(recipe, run_dir, allow_changed)
    if changed:
        out.print(f"changed, so not as it would have been without a break: {', '.join(changed)}", markup=False)
    if status.status == "finished" and resume == "auto" and not changed:
        out.print(f"{run_dir}: a finished run is here already; nothing is trained", markup=False)
        return status, None
    return None, _checkpoint(resume, run_dir, out)


def check_changes(recipe: Any, run_dir: Path, allow_changed: bool) -> list[str]:
    """Settings that differ from those of the run in a folder, if there is one.

    Raises:
        UserError: there are some, and they are not allowed.
    """
    from sft.runs.status import RunStatus

    if RunStatus.read(run_dir) is None:
        return []
    changed = changed_settings(recipe, run_dir)
    if changed and not allow_changed:
        raise UserError(
            f"{run_dir}: holds a run of another recipe (other: {', '.join(changed)}); choose another output_dir, "
            "or --allow-changed goes on with these, not as it would have without a break"
        )
    return changed


def _checkpoint(resume: str, run_dir: Path, out: Console) -> Path | None:
    """Where to go on; None where the run has no checkpoint yet.

    Raises:
        UserError: the one that is asked for is none of this run, or not whole; or there are checkpoints, but none to go
            on from, and starting anew would delete them.
    """
    from sft.runs.checkpoint import check_state, newest_state

    folder = run_dir / "checkpoints"
    if resume != "auto":
        asked = Path(resume)
        if asked.resolve().parent != folder.resolve():
            raise UserError(f"--resume {resume}: not a checkpoint of this run; they are in {folder}")
        check_state(asked)
        out.print(f"going on from {asked}", markup=False)
        return asked
    found = newest_state(folder, lambda line: out.print(line, markup=False))
    if found is None and any(folder.glob("checkpoint-*")):
        raise UserError(
            f"{run_dir}: holds checkpoints, but none with a state to go on from; "
            "--resume none deletes them and starts anew, another output_dir leaves them"
        )
    out.print(f"going on from {found}" if found else f"{run_dir}: no checkpoint yet; starting anew", markup=False)
    return found


FREE = {
    "data": {"store", "num_workers", "worker_timeout", "max_dirty_samples"},
    "training": {"report_to", "max_nonfinite_steps"},
}
"""Settings that change nothing of what is trained."""


def changed_settings(recipe: Any, run_dir: Path) -> list[str]:
    """Dotted names of settings that differ from those of the run in a folder, and change what it trains.

    Raises:
        UserError: the run has no recipe.
    """
    from sft.recipe import load_recipe

    file = run_dir / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"{run_dir}: has a run.json but no recipe.yaml; --resume none starts anew")
    parts = {"model", "data", "training", "seed"}
    before, now = (r.model_dump(include=parts) for r in (load_recipe(file), recipe))
    changed = []
    for part in sorted(parts):
        if not isinstance(now[part], dict):
            changed += [part] if before[part] != now[part] else []
            continue
        names = sorted(now[part].keys() - FREE.get(part, set()))
        changed += [f"{part}.{name}" for name in names if before[part][name] != now[part][name]]
    return changed
