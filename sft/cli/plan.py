"""`idefics-sft plan RECIPE`: the memory, time and money that training takes, before a GPU is rented."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sft.cli.terminal import WIDTH, Json, Overrides, RecipeName, console, folded, percent, print_json, table
from sft.core.errors import UserError
from sft.cost.devices import DEVICES, GIB, Device, device_of_memory, find_device

if TYPE_CHECKING:
    from sft.cost.estimate import Estimate
    from sft.cost.family import Setting
    from sft.recipe import Recipe

DEFAULT_GPU = "a100-80"
MOST = 1e6
"""The largest memory in GiB and the largest price that are taken, since `inf` is a number too."""
EXAMPLES = (
    "plan my-data --gpu t4-16",
    "plan idefics-9b-instruct --gpus 8 --price-per-hour 2.5",
    "plan my-data training.gradient_checkpointing=false",
    "plan my-data --evaluation --task vqav2=coco --shots 0,4,8",
)


def _complete_gpu(incomplete: str) -> list[str]:
    return [name for name in DEVICES if name.startswith(incomplete)]


def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    gpu: Annotated[
        str | None, typer.Option(help=f"As in 4090 or h100; {DEFAULT_GPU} if left out.", autocompletion=_complete_gpu)
    ] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(min=0.1, max=MOST, metavar="GIB", help="Usable memory of another kind of GPU; no time is given."),
    ] = None,
    utilisation: Annotated[
        float, typer.Option(min=0.001, max=1, help="Share of the GPU's peak that training reaches.")
    ] = 0.35,
    price_per_hour: Annotated[float | None, typer.Option(min=0, max=MOST, metavar="P", help="Of one GPU.")] = None,
    evaluation: Annotated[
        bool, typer.Option("--evaluation", help="Plan what `evaluate` takes of a RECIPE or MODEL.")
    ] = False,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK[=PATH]", help="With --evaluation; left out: all of the model card."),
    ] = None,
    shots: Annotated[str | None, typer.Option(metavar="N,N", help="With --evaluation, as in 0,4,8.")] = None,
    max_questions: Annotated[int | None, typer.Option(min=1, help="With --evaluation: of each task.")] = None,
    json: Json = False,
) -> None:
    """Show what training takes of each GPU, how long it lasts and what it costs; what to change if it does not fit."""
    if evaluation:
        from sft.cost.evaluation import plan_evaluation

        device, numbers = _device(gpu, gpu_memory, price_per_hour), shots.split(",") if shots else []
        if device.flop_per_second is None or not all(number.isdecimal() for number in numbers):
            raise UserError("--evaluation: give --gpu, whose speed is known, and --shots as in 0,4,8")
        speed = device.flop_per_second * utilisation
        report = plan_evaluation(recipe, overrides or (), task or (), [*map(int, numbers)], max_questions, speed)
        prices = {f"{kind}cost": report[f"{kind}gpu_hours"] * (price_per_hour or 0) for kind in ("", "naive_")}
        report = {"model": recipe, "gpu": device.name} | report | (prices if price_per_hour else {})
        print_json(report) if json else _show_evaluation(report, console())
        return
    if task or shots or max_questions:
        raise UserError("--task, --shots and --max-questions go with --evaluation")
    from sft.cost.estimate import estimate
    from sft.runs.names import find_recipe

    found = find_recipe(recipe, overrides or ())
    estimated = estimate(found, _device(gpu, gpu_memory, price_per_hour), gpus, utilisation, price_per_hour)
    if json:
        print_json(estimated.report)
        return
    show(found, estimated, utilisation, console())
    if gpu is None and gpu_memory is None:
        console().print(f"\nPlanned for {estimated.device.name}, not for this machine; --gpu names another GPU.")


def _show_evaluation(report: dict[str, Any], out: Console) -> None:
    """Print what each task takes, and the sum."""
    names = ("task", "items", "± points", "queries", "forwards", "M tokens", "GPU h", "naive M", "naive h")
    rows = []
    for row in (*report["tasks"], {"task": "all"} | report):
        items = (f"{row['items']:,}", f"{100 * row['standard_error']:.1f}") if "items" in row else ("", "")
        units = {"tokens": 1e6, "gpu_hours": 1, "naive_tokens": 1e6, "naive_gpu_hours": 1}
        whole = (f"{row[key]:,.0f}" for key in ("queries", "forwards"))
        rows.append((row["task"], *items, *whole, *(f"{row[key] / unit:,.1f}" for key, unit in units.items())))
    out.print(table(f"{report['model']} on {report['gpu']}", names, rows))
    text = "± points: standard error of a share of 50 %. naive: a forward for each candidate, every image encoded anew."
    if any(row["from"] == "typical" for row in report["tasks"]):
        text += " Tasks without files have as many items and as long prompts as is typical."
    if "cost" in report:
        text += f" Cost {report['cost']:,.2f}, naive {report['naive_cost']:,.2f}."
    out.print(folded(text, WIDTH))


def _device(gpu: str | None, gib: float | None, price: float | None) -> Device:
    if gib is None:
        return find_device(gpu or DEFAULT_GPU)
    if gpu is not None:
        raise UserError("--gpu and --gpu-memory: give one of them")
    if price is not None:
        raise UserError("--price-per-hour: the time is not known with --gpu-memory; give --gpu")
    return device_of_memory(gib)


def show(recipe: "Recipe", estimated: "Estimate", utilisation: float, out: Console) -> None:
    """Print memory by kind, whether it fits, time and cost, and advice."""
    setting, device, report = estimated.setting, estimated.device, estimated.report
    out.print(f"{recipe.model.path} on {setting.gpus} x {device.name}")
    out.print(", ".join(_how(setting)))
    out.print(f"{report['parameters']:,} parameters, {report['trainable_parameters']:,} of them trained")
    tiles = f" of weight {setting.image_weight}" if setting.image_weight != setting.images else ""
    out.print(f"fullest micro-batch: {setting.tokens:,} tokens, {setting.images} images{tiles}")
    out.print()
    total, peak = device.usable_bytes, report["peak_bytes"]
    unit, name = (GIB, "GiB") if peak >= GIB else (2**20, "MiB")
    sizes = [(kind, size) for kind, size in report["bytes"].items() if size]
    rows = [(kind, f"{size / unit:,.1f}", "█" * round(size / peak * 24)) for kind, size in sizes]
    rows += [("at the peak", f"{peak / unit:,.1f}", ""), ("usable", f"{total / unit:,.1f}", "")]
    out.print(table("Memory of each GPU", ("", name, ""), rows))
    if report["fits"]:
        out.print(f"fits, {percent(1 - peak / total)} to spare")
    else:
        out.print(f"does not fit: {(peak - total) / GIB:.1f} GiB too much")
    out.print()
    _print_time(recipe, estimated, utilisation, out)
    _print_shares(report["checkpointing"], setting.checkpointing, unit, name, out)
    if report["feature_cache"]:
        _print_feature_cache(report["feature_cache"], out)
    if not report["fits"]:
        out.print("It would fit with" if report["advice"] else "Nothing that plan knows would make it fit.")
        for line in report["advice"]:
            out.print(folded(f"  {line}", WIDTH, 4))


def _how(setting: "Setting") -> Iterator[str]:
    """Yield the settings of training that bear on memory."""
    yield from (setting.mode, setting.optimizer, setting.precision)
    if setting.gpus > 1:
        yield setting.engine
    if setting.checkpointing:
        yield "checkpointing" + (f" of {setting.checkpointing:g}" if setting.checkpointing < 1 else "")


def _print_time(recipe: "Recipe", estimated: "Estimate", utilisation: float, out: Console) -> None:
    report = estimated.report
    if report["epochs"]:
        out.print("epochs: " + ", ".join(f"{name} {epochs:.3g}" for name, epochs in report["epochs"].items()))
    batches = f"{estimated.micro_batches} micro-batch{'es' * (estimated.micro_batches > 1)}"
    steps = f"{report['steps']:,} steps" if report["steps"] else f"{recipe.training.epochs:g} epochs (not prepared yet)"
    work = f"{steps} x {batches} x {estimated.cost.flop / 1e12:,.1f} TFLOP"
    peak, seconds = estimated.device.flop_per_second, report["seconds"]
    if peak is None or seconds is None:
        out.print(f"{work}; no time without {'the number of steps' if peak else 'the speed of the GPU'}")
        return
    out.print(f"{work},\nat {percent(utilisation)} of {peak / 1e12:,.0f} TFLOP/s:")
    cost = "" if report["cost"] is None else f", cost {report['cost']:,.2f}"
    hours = seconds * report["gpus"] / 3600
    out.print(f"{_duration(seconds)}, {f'{hours:,.1f}' if hours >= 0.05 else 'under 0.1'} GPU hours{cost}")
    _print_idle(recipe, estimated, out)


def _print_idle(recipe: "Recipe", estimated: "Estimate", out: Console) -> None:
    """Print the share of the work that is done on nothing, and the sizes of a step that avoid it."""
    if not (idle := estimated.report["idle"]):
        return
    at_once = recipe.training.micro_batch_packs * estimated.setting.gpus
    slots = estimated.micro_batches * at_once
    sizes = " or ".join(str(packs * recipe.data.sequence_length) for packs in (slots - at_once, slots) if packs)
    line = f"{percent(idle)} of it idle: a step has {recipe.packs_per_step:,} packs for {slots:,} slots. "
    line += f"training.tokens_per_step={sizes} leaves none idle; it is {recipe.training.tokens_per_step} now."
    out.print(folded(line, WIDTH))


def _print_shares(shares: list[dict[str, Any]], asked: float, unit: int, name: str, out: Console) -> None:
    rows = []
    for row in shares:
        share = {0.0: "false", 1.0: "true"}.get(row["share"], f"{row['share']:g}")  # as a recipe writes them
        fits = "yes" if row["fits"] else "no"
        share += " (asked)" * (row["share"] == asked)
        rows.append((share, f"{row['peak_bytes'] / unit:,.1f}", fits, f"{row['work']:.2f}"))
    out.print()
    out.print(table("training.gradient_checkpointing", ("", f"{name} at the peak", "fits", "work"), rows))


def _print_feature_cache(cache: dict[str, Any], out: Console) -> None:
    size = f"{cache['bytes_per_image'] / 1000:,.3g} KB an image"
    if cache["images"] is not None:
        size += f", {cache['bytes'] / 1e9:,.3g} GB for {cache['images']:,} images"
    saved = f"{percent(cache['saves'])} of the work on a full micro-batch"
    if cache["on"]:
        line = f"feature cache: {size}. The first epoch fills it and takes longer; later it saves {saved}."
    else:
        line = f"data.feature_cache=on would take {size}, and save {saved} from the second epoch on."
    out.print(folded(line, WIDTH))


def _duration(seconds: float) -> str:
    """Return a duration in the unit that suits it: 2.4 days, 3.1 hours, 5.0 minutes, 7.2 seconds."""
    for name, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {name}"
    return f"{seconds:.1f} seconds" if seconds >= 0.05 else "under 0.1 seconds"
