"""`idefics-sft new FOLDER`: looks at a folder or file of data and writes a recipe for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sft.cli.terminal import Json, console, print_json
from sft.core.errors import UserError

EXAMPLES = (
    "new photos                           # photos.yaml",
    "new my_data/train.jsonl mine.yaml --mode lora",
    "new my_data --model shipped:tiny_base --mode full  # for a CPU",
    "new my_data --model HuggingFaceTB/SmolVLM-256M-Instruct",
)
DEFAULT_MODEL = "HuggingFaceM4/idefics-9b-instruct"


def run(
    data: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder or file of your data.")],
    to: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="The recipe; FOLDER's name if left out.")] = None,
    model: Annotated[str, typer.Option(help="Base model: a folder, a hub id, or shipped:tiny_base.")] = DEFAULT_MODEL,
    mode: Annotated[
        Literal["qlora", "lora", "full"], typer.Option(help="4-bit adapters, adapters, or all weights.")
    ] = "qlora",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    json: Json = False,
) -> None:
    """Look at data of your own, say in which form they are, and write a recipe that trains on them."""
    from sft.data.new_recipe import default_name, family_of, recipe_text, sizes_for
    from sft.data.recognise import recognise
    from sft.recipe.json_schema import SCHEMA_FILE, schema_text

    file = to or Path(f"{default_name(data)}.yaml")
    if file.suffix not in (".yaml", ".yml"):
        raise UserError(f"{file}: expected the name of a .yaml file for the recipe")
    if file.exists() and not force:
        raise UserError(f"{file}: is there already; name another FILE after the folder, or --force overwrites it")
    found = recognise(data)
    text = recipe_text(found, file=file, model=model, mode=mode)
    file.write_text(text, encoding="utf-8")
    (file.parent / SCHEMA_FILE).write_text(schema_text(), encoding="utf-8")
    sizes = sizes_for(found, family_of(model))
    if json:
        data_keys = {"dataset": found.dataset, "path": str(found.path), "options": dict(found.options)}
        counts = {"records": found.records, "samples": len(found.samples), "skipped": dict(found.skipped)}
        print_json({"recipe": str(file)} | data_keys | counts | {"epochs": sizes.epochs, "steps": sizes.steps})
        return
    out = console()
    for line in (*found.describe(), f"{file}: {sizes.epochs} epochs, about {sizes.steps:,} steps, mode {mode}"):
        out.print(line)
    out.print(f"Next: idefics-sft validate {file}")
