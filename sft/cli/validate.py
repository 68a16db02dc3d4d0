"""`idefics-sft validate RECIPE`: keys, shares and paths, in a second and without a model."""

import shlex
from typing import Annotated

import typer

from sft.cli.terminal import Json, Overrides, RecipeName, print_json

EXAMPLES = ("validate my-data.yaml", "validate idefics-9b-instruct --no-paths")


def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    no_paths: Annotated[bool, typer.Option("--no-paths", help="Do not look whether raw files are there.")] = False,
    json: Json = False,
) -> None:
    """Check a recipe: its keys, shares, datasets and paths."""
    from sft.cost.family import check_images_fit
    from sft.data.check_recipe import check_recipe
    from sft.evaluation.tasks import named_tasks
    from sft.runs.names import find_recipe

    found = find_recipe(recipe, overrides or ())
    named_tasks(found.evaluation)
    check_recipe(found, paths=not no_paths)
    check_images_fit(found)
    command = f"idefics-sft prepare {shlex.join([recipe, *(overrides or ())])}"
    if json:
        print_json({"valid": True, "sources": [source.name for source in found.data.mixture], "next": command})
    else:
        sources, steps, epochs = len(found.data.mixture), found.training.max_steps, found.training.epochs
        long = f"{steps:,} step{'s' * (steps != 1)}" if steps else f"{epochs:g} epochs of {found.data.mixture[0].name}"
        counted = f"{sources} source{'s' * (sources != 1)}, {long}"
        print(f"{recipe}: valid, {counted}\nNext: {command}")
