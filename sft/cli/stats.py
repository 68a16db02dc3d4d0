"""`idefics-sft stats STORE`: what a prepared dataset holds."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sft.cli.terminal import Json, console, percent, print_json, table
from sft.core.errors import printable

StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="The folder of a prepared dataset.")]
EXAMPLES = ("stats stores/mine",)


def run(store: StorePath, json: Json = False) -> None:
    """Show what a prepared dataset holds: samples, images, turns, lengths, what was left out."""
    from sft.data.statistics import store_stats
    from sft.data.store import Store

    stats = store_stats(Store(store))
    if json:
        print_json(stats)
    else:
        show(stats, console())


def show(stats: dict[str, Any], out: Console) -> None:
    """Print the figures of a store."""
    size = f"{stats['bytes'] / 1e6:,.1f} MB"
    images = f"{stats['images']:,} images shown, {stats['distinct_images']:,} distinct"
    out.print(f"{printable(stats['path'])}: {stats['dataset']}, licence {stats['licence']}, {size}")
    out.print(f"{stats['samples']:,} samples of {stats['records']:,} records; {images}")
    out.print("messages: " + ", ".join(f"{number:,} {role}" for role, number in stats["messages"].items()))
    names = {
        "turns": "turns a sample",
        "text": "characters a sample",
        "answer": "characters an answer",
        "image_width": "image width",
        "image_height": "image height",
    }
    rows = [
        (name, *(f"{stats[key][column]:,.0f}" for column in ("median", "p95", "max")), f"{stats[key]['mean']:,.1f}")
        for key, name in names.items()
        if stats[key]["total"]
    ]
    out.print(table("", ("", "median", "95 %", "largest", "mean"), rows))
    shares = (
        f"{n}: {number:,} ({percent(number / stats['samples'])})" for n, number in stats["images_per_sample"].items()
    )
    out.print("images a sample: " + ", ".join(shares))
    for kind in ("filtered", "skipped"):
        for reason, number in stats[kind].items():
            out.print(f"{kind}: {number:,}, {printable(reason)}")
