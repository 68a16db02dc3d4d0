"""`idefics-sft mix RECIPE`: what the mixture will be, before anything is paid for."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from sft.cli.terminal import (
    Json,
    Overrides,
    RecipeName,
    console,
    percent,
    print_json,
    progress,
    quiet_libraries,
    table,
)

MANY_EPOCHS = 4
"""Beyond four epochs repeated data is worth less and less than new (Muennighoff and others, 2023)."""


def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; the recipe's, if left out.")] = None,
    sizes: Annotated[
        Literal["card"] | None, typer.Option(help="Stated sizes instead of data: those of the model card's sources.")
    ] = None,
    json: Json = False,
) -> None:
    """Show the mixture: asked and achieved shares, epochs, what was left out, how full the packs are."""
    from sft.naming import find_recipe

    found = find_recipe(recipe, overrides or ())
    quiet_libraries()
    from sft.mix import mix

    wanted = steps or found.training.max_steps
    sources = _stated(found) if sizes else _prepared(found)
    with progress("planning", wanted, console(to_stderr=True)) as update:
        report = mix(found, sources, wanted, update)
    if json:
        print_json(report)
    else:
        show(report, console())


def _stated(recipe: Any) -> Sequence[Any]:
    from sft.stated import stated_sources

    return stated_sources(recipe.data)


def _prepared(recipe: Any) -> Sequence[Any]:
    from sft import run as runs
    from sft.inference import load_template
    from sft.models import get_family

    template = load_template(get_family(recipe.model.family), runs.prepare_base(recipe))
    return runs.open_sources(recipe, template).sources


def show(report: dict[str, Any], out: Console) -> None:
    """Print the mixture: shares in every unit, what is needed for it, how full the packs are."""
    sources = report["sources"]
    rows = [
        (
            source["name"],
            percent(source["asked"]),
            *(percent(source["achieved_in"][unit]) for unit in ("tokens", "trained_tokens", "samples")),
            f"{source['tokens']:,}",
            f"{source['samples']:,}",
            f"{source['epochs']:.2f}",
            _bar(source["achieved"], max(other["achieved"] for other in sources)),
        )
        for source in sources
    ]
    header = ("source", "asked", "tokens", "trained", "samples", "tokens", "samples", "epochs", "")
    out.print(table(f"Mixture by {report['unit']}, {report['steps']:,} steps", header, rows))
    out.print()
    rows = [
        (
            source["name"],
            f"{source['budget']['records']:,}",
            f"{source['records']:,}",
            f"{source['budget']['images']:,}",
            f"{source['budget']['bytes'] / 1e9:,.2f}",
            *(f"{source['held_out'].get(side, 0):,}" for side in ("validation", "neither")),
            f"{sum(source['filtered'].values()):,}",
            f"{sum(source['skipped'].values()):,}",
        )
        for source in sources
    ]
    header = ("needed", "samples", "of", "images", "GB", "validation", "neither", "filtered", "skipped")
    out.print(table("What these steps take", header, rows))
    _notes(report, out)


def _notes(report: dict[str, Any], out: Console) -> None:
    for source in report["sources"]:
        for kind in ("filtered", "skipped"):
            for reason, number in source[kind].items():
                out.print(f"{source['name']}: {number:,} {kind}, {reason}", markup=False)
        for what, number in source["fitted"].items():
            out.print(f"{source['name']}: {number:,} times, for it does not fit a pack: {what}", markup=False)
        if source["epochs"] > MANY_EPOCHS:
            out.print(f"warning: {source['name']} is gone through {source['epochs']:.1f} times")
    if report["ended_by"]:
        out.print(
            f"warning: {report['ended_by']} ends after max_epochs, and training with it: {report['steps']:,} steps"
        )
    packs = report["packs"]
    out.print(
        f"{packs['count']:,} packs, {percent(packs['fill'])} full, {packs['distinct_images_per_pack']:.1f} distinct "
        f"images a pack for {packs['images_per_pack']:.1f} shown: {percent(packs['encodes_saved'])} of encodes saved"
    )
    out.print(
        f"largest error at the end of a window: {report['largest_error_in_packs']:.2f} packs; "
        f"{report['tokens_left_over']:,} tokens are left over"
    )


def _bar(share: float, largest: float, width: int = 20) -> str:
    """A share as a bar, the largest of all being full."""
    eighths = round(share / max(largest, 1e-9) * width * 8)
    return ("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]).strip().ljust(width)
