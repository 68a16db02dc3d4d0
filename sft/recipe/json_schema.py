"""The JSON schema of a recipe, by which editors complete keys, show their meaning and mark mistakes.

The schema file is in the folder of the shipped recipes, and `idefics-sft recipes copy` puts it next to a copy, so that
the line

    # yaml-language-server: $schema=recipe.schema.json

at the head of a recipe finds it wherever the two are. VS Code (with the extension YAML), JetBrains, Neovim and Helix
read that line, by yaml-language-server.
"""

import json
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from sft.recipe.config import Recipe

SCHEMA_FILE = "recipe.schema.json"
MODELINE = f"# yaml-language-server: $schema={SCHEMA_FILE}"


def recipe_schema() -> dict[str, Any]:
    """Return the schema, with each field's meaning as its description."""
    schema = Recipe.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe of idefics-sft",
        **{key: _on_one_line(value) for key, value in schema.items() if key != "title"},
    }


def schema_text() -> str:
    """Return the text of the schema file."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"


def dotted_keys() -> list[str]:
    """Return the keys that an override can set, without those that need a number or name: `training.max_steps`."""
    found = []
    for name, field in Recipe.model_fields.items():
        part = field.annotation
        inside = part.model_fields if isinstance(part, type) and issubclass(part, BaseModel) else {}
        found += [f"{name}.{key}" for key in inside] or [name]
    return found


def choices_of(key: str) -> list[str]:
    """Return the values that a dotted key can have, if they are few: those of `model.mode`, or true and false."""
    part: Any = Recipe
    for name in key.split("."):
        fields = part.model_fields if isinstance(part, type) and issubclass(part, BaseModel) else {}
        part = fields[name].annotation if name in fields else None
    kinds = get_args(part) if get_origin(part) in (Union, UnionType) else (part,)
    return [value for kind in kinds for value in _values(kind)]


def _values(kind: Any) -> list[str]:
    """Return the values of one type, as a recipe writes them."""
    if kind is bool:
        return ["true", "false"]
    return [str(value) for value in get_args(kind)] if get_origin(kind) is Literal else []


def _on_one_line(value: Any) -> Any:
    """Return a schema without the line breaks of docstrings, and without titles that only repeat the key."""
    if isinstance(value, dict):
        kept = {key: part for key, part in value.items() if not (key == "title" and isinstance(part, str))}
        return {
            key: " ".join(part.split()) if key == "description" and isinstance(part, str) else _on_one_line(part)
            for key, part in kept.items()
        }
    return [_on_one_line(part) for part in value] if isinstance(value, list) else value
