"""Reads a recipe strictly, and applies overrides from the command line.

An override is dotted, `training.max_steps=100`, and its value is read as YAML.
"""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sft.core.errors import UserError
from sft.recipe.config import Recipe, as_section
from sft.recipe.explain import explain_overrides, explain_problems, in_words

MAX_RECIPE_BYTES = 1024 * 1024


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply dotted overrides. Where one of them is wrong raise a UserError with the line or the
    override, what was found and what would be right."""
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise UserError(f"{path}: larger than {MAX_RECIPE_BYTES} bytes; is this a recipe?")
    try:
        content = path.read_text(encoding="utf-8")
        node = yaml.compose(content, Loader=_Loader)
        values = yaml.load(content, Loader=_Loader)
    except _NOT_YAML as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: {_not_yaml(error)}") from error
    if not isinstance(values, dict):
        found = "an empty file" if values is None else in_words(values)
        raise UserError(f"{path}: a recipe is a mapping of keys, found {found}")
    changed = deepcopy(values)
    for override in overrides:
        _apply(changed, override, overrides)
    try:
        return Recipe.model_validate(changed)
    except ValidationError as error:
        raise UserError(*explain_problems(path, node, values, changed, overrides)) from error


def with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Apply dotted overrides to a recipe, whose omitted keys get their defaults anew; or raise UserError."""
    values = recipe.model_dump(mode="json", exclude_unset=True)
    for override in overrides:
        _apply(values, override, overrides)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(*explain_overrides(values, overrides)) from error


_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""ValueError: not UTF-8, or a date like 2026-13-41. RecursionError: brackets thousands deep."""


def _not_yaml(error: Exception) -> str:
    problem = str(getattr(error, "problem", None) or error)
    return f"not readable as YAML: {' '.join(problem.split())}"


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses aliases (they can expand without bound) and duplicate keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed in recipes", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"key {key.value!r} stands here twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_ALTERNATIVES = {"training.epochs": "max_steps", "training.max_steps": "epochs"}
"""Overrides that take the place of another key of the same part."""


def _apply(values: dict[str, Any], override: str, overrides: Sequence[str]) -> None:
    """Set `a.b.0.c=value`, one of several overrides, in nested mappings and lists."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: expected key=value, as in training.max_steps=100")
    place: Any = values
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(place, list) and part.isdigit() and int(part) < len(place):
            place = place[int(part)]
        elif isinstance(place, dict):
            if place.get(part) is None:
                place[part] = {}
            if part == "images":
                place[part] = as_section(place[part])
            place = place[part]
        else:
            raise UserError(f"override {override!r}: there is no {part!r} to go into")
    try:
        value = yaml.safe_load(text)
    except _NOT_YAML as error:
        raise UserError(f"override {override!r}: {_not_yaml(error)}") from error
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
        other = _ALTERNATIVES.get(key)
        if value is not None and other and not any(one.startswith(f"training.{other}=") for one in overrides):
            place.pop(other, None)  # the recipe's
    else:
        raise UserError(f"override {override!r}: there is no {last!r} to set")
