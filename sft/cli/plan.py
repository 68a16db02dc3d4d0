"""`idefics-sft plan RECIPE`: what training will take of memory, time and money, before a GPU is rented."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from sft.cli.terminal import Json, Overrides, RecipeName, console, percent, print_json, table

if TYPE_CHECKING:
    from sft.cost.devices import Device
    from sft.cost.estimate import Plan
    from sft.recipe import Recipe

Gpu = Literal["a100-80", "h100-80", "l4-24", "t4-16", "rtx4090-24"]
MOST = 1e6
"""Gigabytes of a GPU, and its price: `inf` is a number too."""
EXAMPLES = (
    "plan my-data --gpu t4-16",
    "plan idefics-9b-instruct --gpus 8 --price-per-hour 2.5",
    "plan my-data training.gradient_checkpointing=false",
)


def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="How many.")] = 1,
    gpu: Annotated[Gpu | None, typer.Option(help="Which; a100-80, if left out.")] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(min=0.1, max=MOST, metavar="GIB", help="Usable memory of another GPU; then no time is given."),
    ] = None,
    utilisation: Annotated[
        float, typer.Option(min=0.001, max=1, help="Share of the GPU's peak that training reaches.")
    ] = 0.35,
    price_per_hour: Annotated[float | None, typer.Option(min=0, max=MOST, metavar="P", help="Of one GPU.")] = None,
    json: Json = False,
) -> None:
    """Show what training takes of each GPU, how long it lasts and what it costs; what to change if it does not fit."""
    from sft.cost.estimate import plan
    from sft.runs.names import find_recipe

    found = find_recipe(recipe, overrides or ())
    planned = plan(found, _device(gpu, gpu_memory, price_per_hour), gpus, utilisation, price_per_hour)
    if json:
        print_json(planned.report)
    else:
        show(found, planned, utilisation, console())


def _device(gpu: str | None, gib: float | None, price: float | None) -> "Device":
    from sft.core.errors import UserError
    from sft.cost.devices import DEVICES, device_of_memory

    if gib is None:
        return DEVICES[gpu or "a100-80"]
    if gpu is not None:
        raise UserError("--gpu and --gpu-memory: give one of them")
    if price is not None:
        raise UserError("--price-per-hour: the time is not known with --gpu-memory; give --gpu")
    return device_of_memory(gib)


def show(recipe: "Recipe", planned: "Plan", utilisation: float, out: Console) -> None:
    """Print memory by part, whether it fits, time and cost, and advice."""
    from sft.cost.devices import GIB

    setting, device, report = planned.setting, planned.device, planned.report
    how: list[str] = [setting.mode, setting.optimizer, setting.precision]
    how += [setting.engine] if setting.gpus > 1 else []
    how += ["checkpointing" + f" of {setting.checkpointing:g}" * (setting.checkpointing < 1)] * (
        setting.checkpointing > 0
    )
    out.print(f"{recipe.model.path} on {setting.gpus} x {device.name}: {', '.join(how)}")
    out.print(f"{report['parameters']:,} parameters, {report['trainable_parameters']:,} of them trained")
    out.print(f"fullest micro-batch: {setting.tokens:,} tokens, {setting.images} images")
    out.print()
    total, peak = device.usable_bytes, report["peak_bytes"]
    unit, name = (GIB, "GiB") if peak >= GIB else (2**20, "MiB")
    rows = [(part, f"{size / unit:,.1f}", _bar(size, peak)) for part, size in report["bytes"].items() if size]
    rows += [("at the peak", f"{peak / unit:,.1f}", ""), ("usable", f"{total / unit:,.1f}", "")]
    out.print(table("Memory of each GPU", ("", name, ""), rows))
    if report["fits"]:
        out.print(f"fits, {percent(1 - peak / total)} to spare")
    else:
        out.print(f"does not fit: {(peak - total) / GIB:.1f} GiB too much")
    out.print()
    _print_time(recipe, planned, utilisation, out)
    _print_shares(report["checkpointing"], setting.checkpointing, unit, name, out)
    if report["feature_cache"]:
        _print_feature_cache(report["feature_cache"], out)
    if not report["fits"]:
        out.print("It would fit with" if report["advice"] else "Nothing that plan knows would make it fit.")
        for line in report["advice"]:
            out.print(f"  {line}")


def _print_time(recipe: "Recipe", planned: "Plan", utilisation: float, out: Console) -> None:
    report, steps = planned.report, recipe.training.max_steps
    work = f"{steps:,} steps x {planned.micro_batches} micro-batches x {planned.cost.flop / 1e12:,.1f} TFLOP"
    peak, seconds = planned.device.flop_per_second, report["seconds"]
    if peak is None or seconds is None:
        out.print(f"{work}; no time without the GPU's speed")
        return
    out.print(f"{work}, at {percent(utilisation)} of {peak / 1e12:,.0f} TFLOP/s:")
    cost = "" if report["cost"] is None else f", cost {report['cost']:,.2f}"
    out.print(f"{_duration(seconds)}, {seconds * report['gpus'] / 3600:,.1f} GPU hours{cost}")


def _print_shares(shares: list[dict[str, Any]], asked: float, unit: int, name: str, out: Console) -> None:
    rows = [
        (
            f"{_value(row['share'])}{' (asked)' * (row['share'] == asked)}",
            f"{row['peak_bytes'] / unit:,.1f}",
            "yes" if row["fits"] else "no",
            f"{row['work']:.2f}",
        )
        for row in shares
    ]
    out.print()
    out.print(table("training.gradient_checkpointing", ("", f"{name} at the peak", "fits", "work"), rows))


def _value(share: float) -> str:
    """Return a value as a recipe says it."""
    return {0.0: "false", 1.0: "true"}.get(share, f"{share:g}")


def _print_feature_cache(cache: dict[str, Any], out: Console) -> None:
    size = f"{cache['bytes_per_image'] / 1000:,.3g} KB an image"
    if cache["images"] is not None:
        size += f", {cache['bytes'] / 1e9:,.3g} GB for {cache['images']:,} images"
    saved = f"{percent(cache['saves'])} of the work on a full micro-batch"
    if cache["on"]:
        out.print(
            f"feature cache: {size}; the first epoch fills it, and takes longer than this: it saves {saved} later"
        )
    else:
        out.print(f"data.feature_cache=on would take {size}, and save {saved} from the second epoch on")


def _duration(seconds: float) -> str:
    """Return a duration in the unit that suits it: 2.4 days, 3.1 hours, 5.0 minutes, 7.2 seconds."""
    for name, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {name}"
    return f"{seconds:.1f} seconds"


def _bar(size: int, largest: int, width: int = 24) -> str:
    return "█" * round(size / largest * width)
