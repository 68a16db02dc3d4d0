"""The prepared base of a recipe: a model folder with every special token of the chat template, made on first use."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sft.core.shipped import is_local, resolve
from sft.models import get_family
from sft.recipe import Recipe


def base_path(recipe: Recipe) -> Path:
    """Return where the prepared base of a recipe stands: another place when the files of a local base change."""
    files = sorted(resolve(recipe.model.path).glob("*")) if is_local(recipe.model.path) else []
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    images = recipe.model.image_settings
    digest = hashlib.sha256(f"{recipe.model.path} {stamps}{images or ''}".encode()).hexdigest()[:8]
    name = recipe.model.path.rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    return Path(recipe.data.store) / "bases" / f"{name}-{digest}"


def prepare_base(recipe: Recipe) -> Path:
    """Make the base model with every special token if it is not there yet, and return its folder."""
    path = base_path(recipe)
    if not (path / "config.json").is_file():
        source = resolve(recipe.model.path) if is_local(recipe.model.path) else recipe.model.path
        path.parent.mkdir(parents=True, exist_ok=True)
        get_family(recipe.model.family).weights.prepare_base(source, path, recipe.model.image_settings)
    return path
