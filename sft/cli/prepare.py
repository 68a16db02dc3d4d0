"""`idefics-sft prepare RECIPE`: raw files -> stores, token ids, the base with its full vocabulary.

`idefics-sft prepare --dataset NAME --path RAW --output DIR` makes the store of one dataset, without a recipe.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console

from sft.cli.terminal import Json, Overrides, console, percent, preparation, print_json, quiet_libraries, table
from sft.core.errors import UserError, printable

if TYPE_CHECKING:
    from sft.data.prepare import PrepareOptions
    from sft.data.store import Store
EXAMPLES = ("prepare my-data.yaml --num-proc 8", "prepare --dataset messages --path my_data --output stores/mine")


def run(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A recipe file, a shipped name, or a RUN folder.")
    ] = None,
    overrides: Overrides = None,
    dataset: Annotated[str | None, typer.Option(help="One dataset without a recipe: the adapter's name.")] = None,
    path: Annotated[str | None, typer.Option(help="With --dataset: its raw files.")] = None,
    output: Annotated[Path | None, typer.Option(help="With --dataset: the folder of the store.")] = None,
    split: Annotated[str | None, typer.Option(help="With --dataset: which part of the raw data; train.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="With --dataset: KEY=VALUE for the adapter.")] = None,
    verify: Annotated[str | None, typer.Option(help="With --dataset: decode (the default) or header.")] = None,
    images: Annotated[
        str | None, typer.Option(help="With --dataset: embed (the default), reference, or as data.images.")
    ] = None,
    max_skip_share: Annotated[
        float | None, typer.Option(min=0, max=1, help="Stop when more than this share of the records is bad.")
    ] = None,
    num_proc: Annotated[int, typer.Option(min=1, help="Processes that work side by side.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many records of each dataset.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make stores again that are there already.")] = False,
    json: Json = False,
) -> None:
    """Prepare the datasets of a recipe and its base model, or one dataset."""
    from sft.data.prepare import PrepareOptions, prepare_one

    quiet_libraries()
    out = console(to_stderr=json)
    options = PrepareOptions(num_proc=num_proc, limit=limit, fresh=fresh)
    if dataset is not None:
        if recipe is not None or output is None:
            raise UserError("prepare --dataset NAME needs --path RAW and --output DIR, and no RECIPE")
        asked = {"dataset": dataset, "path": path, "split": split or "train", "options": _adapter_options(option or ())}
        how = {name: _yaml(f"--{name}", value) for name, value in (("verify", verify), ("images", images)) if value}
        with preparation(out) as update:
            store = prepare_one(asked, how, output, max_skip_share, options, update)
        parts, following = [_Part(store.path.name, store, {})], [_stats_command(output)]
    else:
        if recipe is None:
            raise UserError("prepare needs a RECIPE, or --dataset NAME --path RAW --output DIR")
        folder = None if output is None else str(output)
        _refuse_dataset_options(path=path, output=folder, split=split, option=option, verify=verify, images=images)
        parts, following = _all(recipe, overrides or (), max_skip_share, options, out)
    if json:
        print_json({"stores": [_summary(part) for part in parts]})
        return
    show(parts, out)
    for line in following:
        out.print(printable(line), soft_wrap=True)


class _Part(NamedTuple):
    """A prepared dataset."""

    name: str
    """The source that it belongs to; the folder too where a source has several."""
    store: Store
    changes: dict[str, int]
    """How often what was done with samples that do not fit a pack."""


RECIPE_KEYS = {
    "path": "data.mixture.0.datasets.0.path",
    "split": "data.mixture.0.datasets.0.split",
    "option": "data.mixture.0.datasets.0.options",
    "output": "data.store",
    "verify": "data.verify",
    "images": "data.images",
}


def _refuse_dataset_options(**given: str | list[str] | None) -> None:
    """Raise UserError for an option that goes with --dataset, and name the key by which a recipe says the same."""
    for name, value in given.items():
        if value is not None:
            example = RECIPE_KEYS[name] if isinstance(value, list) else f"{RECIPE_KEYS[name]}={value}"
            raise UserError(f"--{name} goes with --dataset; a RECIPE has the key {example}, in it or after it")


def _all(
    recipe: str, overrides: Sequence[str], max_skip_share: float | None, options: PrepareOptions, out: Console
) -> tuple[list[_Part], list[str]]:
    """Prepare the datasets of a recipe, its base model and its benchmark; return the datasets, and lines that say what
    to do next."""
    from sft.data.prepare import prepare as prepare_sources
    from sft.evaluation.tasks import named_tasks, open_tasks
    from sft.runs.names import find_recipe

    limit = [] if max_skip_share is None else [f"data.max_skip_share={max_skip_share}"]
    found = find_recipe(recipe, [*overrides, *limit])
    with preparation(out) as update:
        sources = prepare_sources(found, update, options)
    benchmarks = [task for task in named_tasks(found.evaluation) if task.name != "loss"]
    open_tasks(benchmarks, found.evaluation, Path(found.data.store))  # built, and checked, before hours of training
    named = [(source.name, own) for source, own in zip(found.data.mixture, sources.parts, strict=True)]
    named += [("data.validation", [sources.validation])] if sources.validation else []
    parts = []
    for name, own in named:
        for part in own:
            full_name = f"{name} ({part.store.path.name})" if len(own) > 1 else name
            parts.append(_Part(full_name, part.store, part.encoded.changes))
    if options.limit is None:
        arguments = shlex.join([recipe, *overrides])
        return parts, [f"Next: idefics-sft mix {arguments}", f"  or: idefics-sft train {arguments}"]
    following = [_stats_command(path) for path in dict.fromkeys(part.store.path for part in parts)]
    why = f"The first {options.limit:,} records are for looking: mix and train want all, without --limit"
    return parts, [*following, why]


def _stats_command(store: Path) -> str:
    return f"Next: {shlex.join(['idefics-sft', 'stats', str(store)])}"


def _adapter_options(given: Sequence[str]) -> dict[str, Any]:
    options = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--option {text!r}: expected KEY=VALUE")
        options[key] = _yaml(f"--option {text!r}", value)
    return options


def _yaml(where: str, value: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: {value!r} is not readable as a YAML value") from error


def show(parts: Sequence[_Part], out: Console) -> None:
    """Print what each store holds, and what was left out of it and why."""
    rows = []
    for _, store, _ in parts:
        kinds = (sum(store.manifest[kind].values()) for kind in ("filtered", "skipped"))
        numbers = (store.manifest["records"], len(store), store.num_images, *kinds)
        rows.append((printable(store.path), *(f"{number:,}" for number in numbers)))
    out.print(table("Prepared", ("store", "records", "samples", "images", "filtered", "skipped"), rows))
    for part in parts:
        for line in _lines(part.store, part.changes):
            out.print(printable(f"{part.name}: {line}"))


def _lines(store: Store, changes: dict[str, int]) -> Iterator[str]:
    """Yield what a person should know of a store: what was left out, of its images, and what was cut."""
    from sft.data.statistics import not_read

    manifest, noted = store.manifest, store.manifest["image_notes"]
    for kind in ("filtered", "skipped"):
        for reason, number in manifest[kind].items():
            share = percent(number / max(manifest["records"], 1))
            yield f"{kind} {number:,} ({share}), {reason}; as {manifest['examples'][reason]}"
    applied = "applied" if store.decoding.orientation == "apply" else "not applied (data.images.orientation: ignore)"
    if number := noted.get("orientation"):
        yield f"{number:,} image{' has' if number == 1 else 's have'} an EXIF orientation, {applied}"
    if number := noted.get("no_end_marker"):
        yield f"{number:,} JPEG without an end marker taken; all of the data is there"
    yield from not_read(store)
    if manifest["limit"]:
        yield f"only the first {manifest['limit']:,} records, as --limit said"
    for what, number in changes.items():
        yield f"{number:,} samples do not fit a pack, {what}"


def _summary(part: _Part) -> dict[str, Any]:
    store = part.store
    kept = {key: store.manifest[key] for key in ("records", "filtered", "skipped", "image_notes", "not_read")}
    counted = {"samples": len(store), "images": store.num_images, "orientation": store.decoding.orientation}
    return {"path": str(store.path)} | kept | counted | {"fitted": part.changes}
