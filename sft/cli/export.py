"""`idefics-sft export STORE --output FILE`: a prepared dataset for other toolkits."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sft.cli.stats import StorePath
from sft.cli.terminal import Json, console, print_json, progress


def run(
    store: StorePath,
    output: Annotated[Path, typer.Option(help="A .parquet file, or a folder for train.parquet.")],
    format: Annotated[Literal["messages-parquet"], typer.Option(help="What to write.")] = "messages-parquet",
    json: Json = False,
) -> None:
    """Write a prepared dataset as messages and images, which `datasets`, TRL and others read."""
    from sft.export import export_messages
    from sft.store import Store

    found = Store(store)
    out = console(to_stderr=json)
    with progress("exporting", len(found), out) as update:
        exported = export_messages(found, output, on_progress=update)
    if json:
        print_json({"path": str(exported.path), "samples": exported.samples, "images": exported.images})
        return
    out.print(f"{exported.path}: {exported.samples:,} samples, {exported.images:,} images")
    if exported.documents:
        out.print(f"{exported.documents:,} of them are documents; TRL knows no such role and refuses them")
