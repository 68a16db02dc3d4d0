"""`idefics-sft export STORE`: a prepared dataset for other toolkits."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sft.cli.stats import StorePath
from sft.cli.terminal import Json, console, print_json, progress
from sft.core.errors import printable

EXAMPLES = ("export stores/mine --output mine.parquet",)


def run(
    store: StorePath,
    output: Annotated[
        Path | None,
        typer.Option(help="A .parquet file, or a folder for train.parquet; STORE.messages next to it, if left out."),
    ] = None,
    format: Annotated[Literal["messages-parquet"], typer.Option(help="What to write.")] = "messages-parquet",
    json: Json = False,
) -> None:
    """Write a prepared dataset as messages and images, which `datasets`, TRL and others read."""
    from sft.data.export import export_messages
    from sft.data.store import Store

    found = Store(store)
    output = output or store.absolute().with_name(f"{store.absolute().name}.messages")
    out = console(to_stderr=json)
    with progress("exporting", len(found), out) as update:
        exported = export_messages(found, output, on_progress=update)
    if json:
        print_json({"path": str(exported.path), "samples": exported.samples, "images": exported.images})
        return
    out.print(f"{printable(exported.path)}: {exported.samples:,} samples, {exported.images:,} images")
    if exported.documents:
        out.print(f"{exported.documents:,} of them are documents; TRL knows no such role and refuses them")
