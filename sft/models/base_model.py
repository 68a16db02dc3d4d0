"""The base of a recipe or of adapters: its name, and its prepared copy, which has every special token of the template.

`prepare` and `train` make the copy in `data.store`. All other commands read it there, and make it in the user's cache:
the recipe may have come with somebody's adapters, and nothing is written where it points.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft.core.errors import UserError
from sft.core.file_lock import locked
from sft.core.shipped import PREFIX, is_local, resolve, user_cache
from sft.models import adapter_settings, base_of, get_family
from sft.models.family import Family
from sft.recipe import Recipe, load_recipe


def base_name(recipe: Recipe) -> str:
    """Return the name of a recipe's base for other programs: a hub id, or the absolute path of a folder."""
    name = base_of(recipe)
    return str(resolve(name).absolute()) if is_local(name) else name


def base_of_adapters(adapters: Path) -> str:
    """Return the name of the base of adapters: by their config or, where that is not here, by the recipe beside it.

    Raises:
        UserError: neither names a folder of this machine or a hub id.
    """
    named, recipe = adapter_settings(adapters).get("base_model_name_or_path"), recipe_of_adapters(adapters)
    for name in (named, recipe and recipe.model.path):
        if name and (not is_local(name) or (resolve(name) / "config.json").is_file()):
            return str(name)
    raise UserError(
        f"{adapters}: its base model {named or '(not named)'} is not here; write its folder or hub id as "
        f"base_model_name_or_path into {adapters / 'adapter_config.json'}"
    )


def recipe_of_adapters(adapters: Path) -> Recipe | None:
    """Return the recipe beside adapters, if there is one."""
    file = adapters / "recipe.yaml"
    return load_recipe(file) if file.is_file() else None


def check_adapters(recipe: Recipe, adapters: Path) -> None:
    """Check that training can go on from adapters as a recipe says.

    Raises:
        UserError: it trains no adapters, or others, or their base is not here.
    """
    lora, found = recipe.model.lora, adapter_settings(adapters)
    if lora is None:
        raise UserError(
            f"model.path: {adapters} holds adapters, and model.mode is full; go on from them with lora or qlora, or "
            f"merge them first: idefics-sft merge {adapters} --output DIR"
        )
    for key, own, theirs in (("r", lora.r, found.get("r")), ("alpha", lora.alpha, found.get("lora_alpha"))):
        if own != theirs:
            raise UserError(f"model.lora.{key}: {own:g}, the adapters of {adapters} have {theirs}; set it to that")
    base_of_adapters(adapters)


def base_path(recipe: Recipe) -> Path:
    """Return where the prepared base of a recipe stands: another place when the files of a local base change."""
    return _place(Path(recipe.data.store), base_of(recipe), recipe.model.image_settings)


def _place(store: Path, name: str, images: Mapping[str, Any]) -> Path:
    files = sorted(resolve(name).glob("*")) if is_local(name) else []
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(f"{name} {stamps}{images or ''}".encode()).hexdigest()[:8]
    return store / "bases" / f"{name.rsplit('/', 1)[-1].removeprefix(PREFIX)}-{digest}"


def prepare_base(recipe: Recipe) -> Path:
    """Make the base model with every special token in `data.store` if it is not there yet, and return its folder."""
    model = recipe.model
    return _prepared(base_path(recipe), base_of(recipe), get_family(model.family), model.image_settings)


def find_prepared_base(recipe: Recipe) -> Path:
    """Return the prepared base in a recipe's `data.store` or, if it is not there, in the user's cache."""
    path = base_path(recipe)
    is_there = (path / "config.json").is_file()
    model = recipe.model
    return path if is_there else prepare_in_cache(base_of(recipe), get_family(model.family), model.image_settings)


def prepare_in_cache(name: str, family: Family, images: Mapping[str, Any]) -> Path:
    """Make a base with every special token in the user's cache if it is not there yet, and return its folder. `images`
    are the settings of a recipe that say how images are cut."""
    try:
        return _prepared(_place(user_cache(), name, images), name, family, images)
    except OSError as error:
        raise UserError(f"{user_cache()}: {error.strerror}; name a folder of yours in IDEFICS_SFT_CACHE") from error


def _prepared(path: Path, name: str, family: Family, images: Mapping[str, Any]) -> Path:
    if not (path / "config.json").is_file():
        with locked(path, beside=True):
            family.weights.prepare_base(resolve(name) if is_local(name) else name, path, images)
    return path
