"""What RECIPE, RUN and MODEL on the command line stand for."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from sft.core.errors import UserError
from sft.core.shipped import PREFIX, is_local, recipe_path, resolve
from sft.recipe import DataConfig, Recipe, load_recipe
from sft.runs.checkpoint import checkpoint_name, checkpoints, incomplete_checkpoints, problem_of_weights


def find_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load the recipe called `name`: a path, a shipped name, or a RUN folder, whose output_dir is that folder then."""
    file = _recipe_file(name)
    _refuse_ambiguity(name, file)
    recipe = load_recipe(file, overrides)
    if not (Path(name) / "recipe.yaml").is_file():
        return recipe
    given = {override.partition("=")[0] for override in overrides}
    if "data.store" not in given:
        recipe = recipe.model_copy(update={"data": _with_moved_store(recipe, Path(name))})
    return recipe if "output_dir" in given else recipe.model_copy(update={"output_dir": name})


def _with_moved_store(recipe: Recipe, run_dir: Path) -> DataConfig:
    """Return the data settings of a run that may have been copied or moved to `run_dir`: a store inside the run is the
    one there; another is looked for at the same place relative to the run, where the old one is gone."""
    old_run, store = Path(recipe.output_dir), Path(recipe.data.store)
    moved = Path(os.path.normpath(run_dir / os.path.relpath(store, old_run)))
    if store.is_relative_to(old_run) or (old_run.is_absolute() and not store.exists() and moved.exists()):
        return recipe.data.model_copy(update={"store": str(moved)})
    return recipe.data


def _recipe_file(name: str) -> Path:
    run = Path(name) / "recipe.yaml"
    return run if run.is_file() else recipe_path(name)


def _refuse_ambiguity(name: str, file: Path) -> None:
    """Raise UserError for the name of a shipped recipe when a changed copy of it is in the current directory."""
    copy = Path(f"{name}.yaml")
    if file.name == copy.name and copy.is_file() and copy.read_bytes() != file.read_bytes():
        raise UserError(
            f"{name}: a shipped recipe, and {copy} here differs from it; write {copy} for yours, or move it"
        )


def _recipe_if_any(name: str) -> Recipe | None:
    """Load the recipe called `name`; None where there is none. A recipe with a mistake in it raises UserError."""
    try:
        _recipe_file(name)
    except UserError:
        return None
    return find_recipe(name)


def run_checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, by step; raise UserError where there are none."""
    found = checkpoints(run_dir / "checkpoints")
    damaged = incomplete_checkpoints(run_dir / "checkpoints")
    if damaged and not found:
        names = ", ".join(path.name for path in damaged)
        raise UserError(
            f"{run_dir}: no complete checkpoint here; of {names}, files of the weights are missing or cut off; "
            f"put them back, or train anew: idefics-sft train {run_dir} --resume none"
        )
    if not found:
        raise UserError(f"{run_dir}: no complete checkpoint here; run `idefics-sft train` first")
    return found


def find_model(name: str) -> Path | str:
    """Return the folder or hub id that MODEL on the command line stands for. `shipped:tiny_base` is the small base. A
    RUN (its folder, or its recipe) means its selected checkpoint, else its newest complete one; RUN@STEP means the
    checkpoint of that step. Raise UserError where there is nothing of that name, or no complete checkpoint of the
    step."""
    if name.startswith(PREFIX):
        return resolve(name)
    text, _, step = name.partition("@")
    path = Path(text)
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return path
    run_dir: Path | None = path
    if not (path / "checkpoints").is_dir():
        recipe = _recipe_if_any(text)
        run_dir = Path(recipe.output_dir) if recipe else None
    if run_dir is None:
        if is_local(text):
            raise UserError(f"{name}: neither a model folder (no config.json), nor a run, a recipe or a hub id")
        return text
    if step:
        if not (step.isascii() and step.isdecimal()):
            raise UserError(f"{name}: {step!r} is not a step; expected a number, as in {text}@100")
        return _sound(run_dir / "checkpoints" / checkpoint_name(int(step)), name)
    selection = run_dir / "selection.json"
    if not selection.is_file():
        return _sound(run_checkpoints(run_dir)[-1], name)
    try:
        selected = str(json.loads(selection.read_text())["selected"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{selection}: damaged; delete it and run `idefics-sft select {text}` again") from error
    return _sound(run_dir / "checkpoints" / selected, name)


def chosen_by(path: Path | str) -> str:
    """Return how a checkpoint was chosen, to be printed after its name; empty where it was not."""
    file = Path(path).parent.parent / "selection.json"
    selection = json.loads(file.read_text()) if file.is_file() else {}
    return f", selected by {selection.get('benchmark')}" if selection.get("selected") == Path(path).name else ""


def _sound(checkpoint: Path, name: str) -> Path:
    """Return the checkpoint; raise UserError where it is not there, or a file of it is not as it was written."""
    if not checkpoint.is_dir():
        raise UserError(f"{name}: no complete checkpoint {checkpoint}")
    if problem := problem_of_weights(checkpoint):
        raise UserError(f"{checkpoint}: {problem}; choose another checkpoint")
    return checkpoint


def recipe_of_model(name: str) -> Recipe | None:
    """Return the recipe of the run that MODEL belongs to; None where it names no run, recipe or checkpoint of a run."""
    text = name.partition("@")[0]
    path = Path(text)
    if path.name.startswith(("checkpoint-", "average-")) and (path.parent.parent / "recipe.yaml").is_file():
        return find_recipe(str(path.parent.parent))
    return _recipe_if_any(text)
