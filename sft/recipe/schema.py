"""The JSON schema of a recipe, by which editors complete keys, show their meaning and mark mistakes.

It stands beside the shipped recipes, and `idefics-sft recipes copy` lays it beside a copy, so that the line

    # yaml-language-server: $schema=recipe.schema.json

at the head of a recipe leads to it wherever the two are. VS Code (with the extension YAML), JetBrains, Neovim and Helix
read that line, by yaml-language-server.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from sft.recipe.fields import Recipe

SCHEMA_FILE = "recipe.schema.json"
MODELINE = f"# yaml-language-server: $schema={SCHEMA_FILE}"


def recipe_schema() -> dict[str, Any]:
    """The schema, with each field's meaning as its description."""
    schema = Recipe.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe of idefics-sft",
        **{key: _on_one_line(value) for key, value in schema.items() if key != "title"},
    }


def schema_text() -> str:
    """The schema as the file holds it."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"


def dotted_keys() -> list[str]:
    """What an override can set, as far as it has no number or name of its own in it: `training.max_steps`."""
    found = []
    for name, field in Recipe.model_fields.items():
        part = field.annotation
        inside = part.model_fields if isinstance(part, type) and issubclass(part, BaseModel) else {}
        found += [f"{name}.{key}" for key in inside] or [name]
    return found


def _on_one_line(value: Any) -> Any:
    """The same without the line breaks of docstrings, and without titles that only repeat the key."""
    if isinstance(value, dict):
        kept = {key: part for key, part in value.items() if not (key == "title" and isinstance(part, str))}
        return {
            key: " ".join(part.split()) if key == "description" and isinstance(part, str) else _on_one_line(part)
            for key, part in kept.items()
        }
    return [_on_one_line(part) for part in value] if isinstance(value, list) else value
