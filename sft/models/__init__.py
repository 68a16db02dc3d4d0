"""Model families. A family is a folder of this one that offers what `ModelFamily` lists, found by its name."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from sft.core.errors import UserError, nearest
from sft.models.family import ModelFamily

if TYPE_CHECKING:
    from torch import nn


def _names() -> list[str]:
    return [module.name for module in iter_modules(__path__) if module.ispkg]


def get_family(name: str) -> ModelFamily:
    """The family called `name`.

    Raises:
        UserError: there is no such family.
    """
    known = _names()
    if name not in known:
        raise UserError(f"model.family: unknown family {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    return import_module(f"{__name__}.{name}")


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of a model folder or hub id.

    Raises:
        UserError: there is none, or it is damaged.
    """
    from transformers import PreTrainedConfig

    missing = f"{path}: no config.json found; expected a model folder or a hub id"
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        raise UserError(missing)  # transformers would return an empty config
    try:
        return dict(PreTrainedConfig.get_config_dict(path)[0])
    except (OSError, ValueError, AttributeError, TypeError) as error:
        damaged = f"{path}: config.json is damaged, not a JSON object"
        raise UserError(damaged if (Path(path) / "config.json").exists() else missing) from error


def family_at(path: str | Path) -> ModelFamily:
    """The family of a model folder or hub id: what its config.json says.

    Raises:
        UserError: there is no config.json, or no such family.
    """
    kind = str(read_config(path).get("model_type"))
    if kind not in _names():
        raise UserError(f"{path}: model_type is {kind!r}, which is no known family ({', '.join(_names())})")
    return get_family(kind)


def family_of(model: nn.Module) -> ModelFamily:
    """The family of a model that is loaded: its kind, as transformers calls it, is the family's name."""
    return get_family(str(model.config.model_type))  # type: ignore[union-attr]
