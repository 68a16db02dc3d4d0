"""`idefics-sft mix RECIPE`: what the mixture will be, before anything is paid for."""

from collections.abc import Iterator, Sequence
from math import ceil
from typing import Annotated, Any, Literal

import typer
from rich.console import Console, Group
from rich.text import Text

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
from sft.core.errors import printable

EXAMPLES = (
    "mix my-data.yaml",
    "mix idefics-9b-instruct --sizes card     # without any data",
)


def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; the recipe's, if left out.")] = None,
    sizes: Annotated[
        Literal["card"] | None, typer.Option(help="Declared sizes instead of data: those of the model card's sources.")
    ] = None,
    json: Json = False,
) -> None:
    """Show the mixture: asked and achieved shares, epochs, what was left out, how full the packs are."""
    from sft.runs.names import find_recipe

    found = find_recipe(recipe, overrides or ())
    quiet_libraries()
    from sft.batches.declared_sizes import declared_sources
    from sft.batches.mixture_report import mix
    from sft.data.prepare import open_prepared

    arguments = [recipe, *(overrides or ())]
    sources = declared_sources(found.limited_data) if sizes else open_prepared(found, arguments)[0].sources
    with progress("planning", steps or found.training.max_steps, console(to_stderr=True)) as update:
        report = mix(found, sources, steps, update)
    if json:
        print_json(report)
    else:
        show(report, console())


# ------------------------------------------------------------------------------------------------------- tables

MAX_ROWS = 24
"""Sources that have a line of their own; the others share one."""
LONGEST_NAME = 28
Source = dict[str, Any]


def show(report: dict[str, Any], out: Console) -> None:
    """Print the mixture: shares in every unit, what is needed for it, how full the packs are."""
    own, others = _in_lines(report["sources"])
    out.print(_shares(report, own, others, out.width))
    out.print("off: packs too many or too few at the end of a window; inside: within it")
    for needed in _needed(report, own, others):
        out.print()
        out.print(needed)
    _notes(report, out)
    out.print()
    for line in _plots(report):
        out.print(line)


def _in_lines(sources: list[Source]) -> tuple[list[Source], list[Source]]:
    """Return the sources that get a line of their own, in the recipe's order, and the smaller ones that share one."""
    if len(sources) <= MAX_ROWS:
        return sources, []
    in_order = sorted(sources, key=lambda source: source["achieved"], reverse=True)
    large = {source["name"] for source in in_order[: MAX_ROWS - 1]}
    return [s for s in sources if s["name"] in large], [s for s in sources if s["name"] not in large]


def _shares(report: dict[str, Any], own: list[Source], others: list[Source], width: int) -> Group:
    header = ("source", "asked", "tokens", "trained", "samples", "epochs", "off", "inside", "")

    def row(name: str, sources: list[Source], bound: str = "") -> tuple[str, ...]:
        """Return the line of some sources: the sums of their shares, and the largest of the other figures."""
        shares = [sum(source["asked"] for source in sources)]
        for unit in ("tokens", "trained_tokens", "samples"):
            shares.append(sum(source["achieved_in"][unit] for source in sources))
        keys = ("epochs", "error_in_packs", "error_inside_in_packs")
        largest = (max(source[key] for source in sources) for key in keys)
        return (name, *map(percent, shares), *(f"{bound}{figure:.2f}" for figure in largest))

    rows = [row(_name(source), [source]) for source in own]
    if others:
        rows.append(row(f"{len(others):,} others", others, "≤ "))
    taken = sum(max(len(row[column]) for row in (header, *rows)) + 1 for column in range(len(header) - 1))
    room = max(min(width - taken, 32), 0)
    largest = max(source["achieved"] for source in report["sources"])
    bars = [Text(_bar(source["achieved"], largest, room), "cyan") for source in own] + [Text()] * bool(others)
    steps, packs = (f"{report[name]:,} {name[:4]}{'s' * (report[name] != 1)}" for name in ("steps", "packs_per_step"))
    title = f"Mixture by {report['unit']}, {steps} of {packs}"
    return table(title, header, [(*row, bar) for row, bar in zip(rows, bars, strict=True)])


def _needed(report: dict[str, Any], own: list[Source], others: list[Source]) -> Iterator[Group]:
    """Yield the table of what has to be there for these steps, and that of what was left out. Columns of nothing but
    zeros are left out too."""

    def numbers(source: Source) -> list[int]:
        budget = source["budget"]
        return [
            budget["pieces"],
            source["pieces"],
            budget["images"],
            budget["bytes"],
            *(source["held_out"].get(side, 0) for side in ("validation", "neither")),
            sum(source["filtered"].values()),
            sum(source["skipped"].values()),
            source["tokens_left_over"],
        ]

    def together(sources: list[Source]) -> list[int]:
        return [sum(column) for column in zip(*map(numbers, sources), strict=True)]

    # A piece is a sample, or a part of one that is too long for a pack.
    header = ("pieces", "of", "images", "GB", "validation", "neither", "filtered", "skipped", "tokens over")
    rows = [(_name(source), numbers(source)) for source in own]
    if others:
        rows.append((f"{len(others):,} others", together(others)))
    rows.append(("all", together(report["sources"])))
    size = header.index("GB")
    left_out = [column for column in range(size + 1, len(header)) if rows[-1][1][column]]
    for title, kept in (("What these steps take", range(size + 1)), ("What is left out", left_out)):
        lines = [
            (name, *(f"{row[column] / 1e9:,.2f}" if column == size else f"{row[column]:,}" for column in kept))
            for name, row in rows
        ]
        if kept:
            yield table(title, ("source", *(header[column] for column in kept)), lines)


def _name(source: Source) -> str:
    name = printable(source["name"])
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _notes(report: dict[str, Any], out: Console) -> None:
    from sft.batches.look_ahead import MAX_NOTES, reasons

    for lines, style in ((reasons(report["sources"]), ""), (report["warnings"], "yellow")):
        for line in lines[:MAX_NOTES]:
            out.print(Text(f"{'warning: ' if style else ''}{printable(line)}", style))
        if (more := len(lines) - MAX_NOTES) > 0:
            out.print(Text(f"… and {more:,} more; --json has all", style))


# -------------------------------------------------------------------------------------------------------- plots


def _plots(report: dict[str, Any]) -> Iterator[str]:
    """Yield how far off shares are over the windows, and what packs hold."""
    from sft.batches.look_ahead import describe_packs

    windows, packs = report["windows"], report["packs"]
    if report["largest_error_inside_in_packs"]:
        many = "s" if windows["count"] > 1 else ""
        yield f"Largest error of a share in packs, over {windows['count']:,} window{many} of {windows['packs']:,}"
        for label, name in (("inside a window", "_inside"), ("at its end", "")):
            if values := windows[f"largest_error{name}_in_packs"]:
                yield f"  {label:17} {_columns(values)}  up to {max(values):.2f}"
    yield f"{packs['count']:,} pack{'s' * (packs['count'] != 1)}"
    by_fill = packs["by_fill"]
    emptiest = min(next((number for number, count in enumerate(by_fill) if count), 0), 90)
    full = percent(packs["fill"])
    yield f"  tokens            {emptiest} % {_columns(by_fill[emptiest:])} 100 %  {full} full on average"
    if packs["images_per_pack"]:
        by_images = packs["by_distinct_images"]
        fewest = next(number for number, count in enumerate(by_images) if count)
        yield (
            f"  distinct images   {fewest} {_columns(by_images[fewest:])} {len(by_images) - 1}  "
            f"{packs['distinct_images_per_pack']:.1f} on average"
        )
        saved = percent(packs["encodes_saved"])
        yield f"  images shown      {packs['images_per_pack']:.1f} on average: {saved} of encodes saved"
    yield from (f"  {line}" for line in describe_packs(packs))


def _bar(share: float, largest: float, width: int) -> str:
    """Return a share as a bar, the largest of all being full."""
    eighths = round(share / max(largest, 1e-9) * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


MAX_COLUMNS = 25
"""Columns of a plot."""


def _columns(values: Sequence[float]) -> str:
    """Return numbers as columns in a row, the largest being full; only nothing is drawn as nothing. Of many numbers,
    each column is the largest of some neighbours."""
    each = ceil(len(values) / MAX_COLUMNS)
    values = [max(values[start : start + each]) for start in range(0, len(values), each)]
    largest = max(values)
    return "".join(" ▁▂▃▄▅▆▇█"[ceil(value / largest * 8) if value > 0 else 0] for value in values)
