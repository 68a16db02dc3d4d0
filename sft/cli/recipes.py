"""`idefics-sft recipes list|show|copy`: the recipes that come with the toolkit."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sft.cli.completion import complete_shipped
from sft.cli.terminal import Json, console, examples, folded, print_json
from sft.core.errors import UserError
from sft.core.shipped import recipe_title, shipped_recipe, shipped_recipes

EXAMPLES = (
    "recipes list",
    "recipes show my-data",
    "recipes copy my-data              # my-data.yaml and its schema",
    "recipes copy my-data mine.yaml",
)
app = typer.Typer(help="List, show or copy the recipes that come with the toolkit.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe.", autocompletion=complete_shipped)]


@app.command(name="list", epilog=examples(EXAMPLES[:1]))
def list_(json: Json = False) -> None:
    """List the shipped recipes and what each is for."""
    titles = {name: recipe_title(file) for name, file in shipped_recipes().items()}
    if json:
        print_json({"recipes": titles})
        return
    out = console()
    width = max(map(len, titles)) + 2
    for name, title in titles.items():
        out.print(folded(f"{name:{width}}{title}", out.width, width))


@app.command(epilog=examples(EXAMPLES[1:2]))
def show(name: Name) -> None:
    """Print a shipped recipe."""
    sys.stdout.write(shipped_recipe(name).read_text(encoding="utf-8"))


@app.command(epilog=examples(EXAMPLES[2:]))
def copy(
    name: Name,
    to: Annotated[
        Path, typer.Argument(metavar="[FILE]", help="A .yaml file, or a folder; this one if left out.")
    ] = Path("."),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Copy a shipped recipe, to change it, and put its schema for editors next to it."""
    from sft.recipe.json_schema import SCHEMA_FILE, schema_text

    recipe = shipped_recipe(name)
    file = to / recipe.name if to.is_dir() else to
    if file.suffix not in (".yaml", ".yml"):
        raise UserError(f"{to}: expected a .yaml file, or a folder that is there")
    if file.exists() and not force:
        raise UserError(f"{file}: is there already; --force overwrites it")
    file.write_bytes(recipe.read_bytes())
    (file.parent / SCHEMA_FILE).write_text(schema_text(), encoding="utf-8")
    console().print(f"{file}, and {SCHEMA_FILE} for editors. Set the paths in it to your data.")
    console().print(f"Next: idefics-sft validate {file}")
