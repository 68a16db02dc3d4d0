#!/usr/bin/env python
"""Write docs/recipes.md and recipes/recipe.schema.json from the keys in sft/recipe/ and the shipped recipes.

scripts/build_reference.py            write them; a test says when they are out of date
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sft.core.shipped import recipe_title, shipped_recipes
from sft.recipe import Recipe
from sft.recipe.json_schema import SCHEMA_FILE, schema_text

REPOSITORY = Path(__file__).parent.parent

INTRODUCTION = """\
# Recipes

<!-- made by scripts/build_reference.py from sft/recipe/ and recipes/: change those, and run it -->

A recipe is one YAML file: which model is trained on what, how, and what chooses the checkpoint.

    idefics-sft recipes list                     # those that come with the toolkit
    idefics-sft recipes copy my-data             # my-data.yaml and recipe.schema.json, here, to change
    idefics-sft validate my-data.yaml            # keys, shares, paths: one problem a line
    idefics-sft train my-data.yaml training.max_steps=100 data.mixture.0.share=80

What follows the recipe overrides a key, lists by number, values as YAML has them. Paths are relative to the current
directory; `shipped:` leads to files of the toolkit. Aliases (`*name`) and keys that stand twice are refused. The whole
recipe, with every default filled in, is kept in the folder of the run, and that folder is a recipe too.

**In an editor** the first line of a recipe, `# yaml-language-server: $schema=recipe.schema.json`, completes keys, shows
what they mean and marks mistakes: in VS Code (extension YAML), JetBrains, Neovim, Helix and others with
yaml-language-server. The schema is next to the recipe; `idefics-sft schema > recipe.schema.json` makes it.
"""


def page() -> str:
    """docs/recipes.md."""
    lines = [
        INTRODUCTION,
        "## Shipped recipes",
        "",
        "| name | what for | memory and time, by `plan` |",
        "|---|---|---|",
    ]
    for name, file in shipped_recipes().items():
        planned = "<br>".join(f"`{options or 'a100-80'}`: {figures}" for options, figures in plans_of(file))
        lines.append(f"| [{name}](../recipes/{file.name}) | {recipe_title(file)} | {planned} |")
    lines += ["", "## Keys", "", "A dash is a key that has to be there.", ""]
    lines += sections(Recipe, "")
    return "\n".join(lines).rstrip() + "\n"


def plans_of(file: Path) -> list[tuple[str, str]]:
    """Options and result of each `plan` line at the head of a recipe."""
    lines = re.findall(
        rf"^#   idefics-sft plan {file.stem} ?(.*?)  +(.* GiB, .*)$", file.read_text(), flags=re.MULTILINE
    )
    return [(options.removeprefix("--gpu ").strip(), figures) for options, figures in lines]


def sections(part: type[BaseModel], name: str) -> Iterator[str]:
    """A table of the part's own keys, then its parts, each under its dotted name."""
    inner = [(key, found) for key, field in part.model_fields.items() if (found := part_inside(field.annotation))]
    yield f"### {name or 'The recipe'}"
    yield ""
    yield from ("| key | value | default | meaning |", "|---|---|---|---|")
    for key, field in part.model_fields.items():
        meaning = " ".join((field.description or "").split())
        yield f"| `{key}` | {kind(field)} | {default(field)} | {meaning} |".replace("||", "\\|\\|")
    yield ""
    for key, (found, form) in inner:
        yield from sections(found, f"{name}.{key}".removeprefix(".") + form)


def part_inside(annotation: Any) -> tuple[type[BaseModel], str] | None:
    """The keys that a value has itself, and how it is reached: directly, as a list's entry, by a name."""
    if isinstance(annotation, type):
        return (annotation, "") if issubclass(annotation, BaseModel) else None
    form = {tuple: ".N", dict: ".GROUP"}.get(get_origin(annotation), "")  # type: ignore[arg-type]
    found = next((found for inner in get_args(annotation) if (found := part_inside(inner))), None)
    return (found[0], form + found[1]) if found else None


def kind(field: FieldInfo) -> str:
    """What may stand there, in words."""
    return ", ".join([words(field.annotation), *limits(field.metadata)])


def limits(metadata: Iterable[Any]) -> Iterator[str]:
    """`> 0` and the like."""
    for limit in metadata:
        if isinstance(limit, FieldInfo):
            yield from limits(limit.metadata)
        for what, name, sign in ((Gt, "gt", ">"), (Ge, "ge", "≥"), (Lt, "lt", "<"), (Le, "le", "≤")):
            if isinstance(limit, what):
                yield f"{sign} {getattr(limit, name):g}"


def words(annotation: Any) -> str:
    """`int` -> whole number; choices one by one."""
    plain = {int: "whole number", float: "number", str: "text", bool: "true, false", type(None): "", Any: "any"}
    if annotation in plain:
        return plain[annotation]
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return ", ".join([words(inside[0]), *limits(annotation.__metadata__)])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inside)
    if part_inside(annotation):
        return {tuple: "list of keys", dict: "keys by group"}.get(origin, "keys")  # type: ignore[arg-type]
    if origin is dict:
        return "keys"
    if origin is tuple:
        return f"list of {words(inside[0])}" if Ellipsis in inside else f"{len(inside)} of {words(inside[0])}"
    return " or ".join(filter(None, map(words, inside)))  # X | None


def default(field: FieldInfo) -> str:
    """What holds when the key is left out."""
    if field.is_required():
        return "—"
    value = field.default
    if value is None or isinstance(value, BaseModel) or value == {}:
        return ""
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def main() -> None:
    for file, text in (
        (REPOSITORY / "docs" / "recipes.md", page()),
        (REPOSITORY / "recipes" / SCHEMA_FILE, schema_text()),
    ):
        file.write_text(text, encoding="utf-8")
        print(file.relative_to(REPOSITORY))


if __name__ == "__main__":
    main()
