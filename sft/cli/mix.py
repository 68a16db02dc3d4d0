"""`idefics-sft mix RECIPE`: what the mixture will be, before anything is paid for."""

from typing import Annotated, Any

import typer
from rich.console import Console

from sft.cli.terminal import Json, Overrides, RecipeName, console, percent, print_json, quiet_libraries, table


def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; the recipe's, if left out.")] = None,
    json: Json = False,
) -> None:
    """Show the mixture: asked and achieved shares, epochs, what was left out, how full the packs are."""
    from sft.naming import find_recipe

    found = find_recipe(recipe, overrides or ())
    quiet_libraries()
    from sft import run as runs
    from sft.inference import load_template
    from sft.mix import mix
    from sft.models import get_family

    template = load_template(get_family(found.model.family), runs.prepare_base(found))
    report = mix(found, runs.open_sources(found, template).sources, steps)
    if json:
        print_json(report)
    else:
        show(report, console())


def show(report: dict[str, Any], out: Console) -> None:
    """Print the mixture as a table."""
    rows = [
        (
            source["name"],
            percent(source["asked"]),
            percent(source["achieved"]),
            f"{source['tokens']:,}",
            f"{source['trained_tokens']:,}",
            f"{source['samples']:,}",
            f"{source['epochs']:.2f}",
            f"{sum(source['filtered'].values()):,}",
            f"{sum(source['skipped'].values()):,}",
        )
        for source in report["sources"]
    ]
    header = ("source", "asked", "achieved", "tokens", "trained", "samples", "epochs", "filtered", "skipped")
    out.print(table(f"Mixture in {report['unit']}, {report['steps']:,} steps", header, rows))
    for source in report["sources"]:
        for kind in ("filtered", "skipped"):
            for reason, number in source[kind].items():
                out.print(f"{source['name']}: {number:,} {kind}, {reason}")
    packs = report["packs"]
    out.print(
        f"{packs['count']:,} packs, {percent(packs['fill'])} full, {packs['distinct_images_per_pack']:.1f} distinct "
        f"images a pack for {packs['images_per_pack']:.1f} shown"
    )
