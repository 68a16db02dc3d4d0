"""What RECIPE, RUN and MODEL on the command line stand for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sft.checkpoint import checkpoint_name, checkpoints, is_complete
from sft.errors import UserError
from sft.recipe import Recipe, load_recipe
from sft.shipped import recipe_path


def find_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe called `name`: a path, a shipped name, or a RUN folder."""
    return load_recipe(_recipe_file(name), overrides)


def _recipe_file(name: str) -> Path:
    run = Path(name) / "recipe.yaml"
    return run if run.is_file() else recipe_path(name)


def _recipe_if_any(name: str) -> Recipe | None:
    """The recipe called `name`, or None where nothing is called so. One with a mistake in it says so."""
    try:
        file = _recipe_file(name)
    except UserError:
        return None
    return load_recipe(file)


def run_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, by step.

    Raises:
        UserError: there are none.
    """
    found = checkpoints(run_dir / "checkpoints")
    if not found:
        raise UserError(f"{run_dir}: no complete checkpoint here; run `idefics-sft train` first")
    return found


def find_model(name: str) -> Path | str:
    """MODEL as the command line takes it -> a folder or a hub id.

    A RUN (its folder, or its recipe) means its selected checkpoint, else its newest complete one; RUN@STEP means that
    step's.

    Raises:
        UserError: nothing of that name, or the step has no complete checkpoint.
    """
    text, _, step = name.partition("@")
    path = Path(text)
    if (path / "config.json").is_file():
        return path
    run_dir: Path | None = path
    if not (path / "checkpoints").is_dir():
        recipe = _recipe_if_any(text)
        run_dir = Path(recipe.output_dir) if recipe else None
    if run_dir is None:
        if path.exists() or text.count("/") != 1:
            raise UserError(f"{name}: neither a model folder (no config.json), nor a run, a recipe or a hub id")
        return text
    if step:
        checkpoint = run_dir / "checkpoints" / checkpoint_name(int(step)) if step.isdigit() else run_dir / step
        if not is_complete(checkpoint):
            raise UserError(f"{name}: no complete checkpoint of step {step} in {run_dir}")
        return checkpoint
    selection = run_dir / "selection.json"
    if selection.is_file():
        return run_dir / "checkpoints" / str(json.loads(selection.read_text())["selected"])
    return run_checkpoints(run_dir)[-1]


def recipe_of_model(name: str) -> Recipe | None:
    """The recipe of the run that MODEL belongs to, if it names a run, a recipe or a checkpoint of one."""
    text = name.partition("@")[0]
    for folder in (Path(text), Path(text).parent.parent):
        if (folder / "recipe.yaml").is_file():
            return load_recipe(folder / "recipe.yaml")
    return _recipe_if_any(text)
