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
EXAMPLES = (
    "prepare my-data.yaml --num-proc 8",
    "prepare --dataset messages --path my_data --output stores/mine",
)


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
    from sft.data.prepare import PrepareOptions

    quiet_libraries()
    out = console(to_stderr=json)
    options = PrepareOptions(num_proc=num_proc, limit=limit, fresh=fresh)
    if dataset is not None:
        if recipe is not None or output is None:
            raise UserError("prepare --dataset NAME needs --path RAW and --output DIR, and no RECIPE")
        asked = {"dataset": dataset, "path": path, "split": split or "train", "options": _adapter_options(option or ())}
        how = {name: _yaml(f"--{name}", value) for name, value in (("verify", verify), ("images", images)) if value}
        prepared = _one(asked, how, output, max_skip_share, options, out)
    else:
        if recipe is None:
            raise UserError("prepare needs a RECIPE, or --dataset NAME --path RAW --output DIR")
        folder = None if output is None else str(output)
        _refuse_dataset_options(path=path, output=folder, split=split, option=option, verify=verify, images=images)
        prepared = _all(recipe, overrides or (), max_skip_share, options, out)
    if json:
        pairs = zip(prepared.stores, prepared.changes, strict=True)
        print_json({"stores": [_summary(store, changes) for store, changes in pairs]})
    else:
        show(prepared.stores, out)
        _show_end(prepared, out)


class _Prepared(NamedTuple):
    """What was prepared."""

    stores: list[Store]
    changes: list[dict[str, int]]
    """What was done, and how often, with samples of each store that do not fit a pack."""
    following: tuple[str, ...]
    """Lines that say what to do next."""


RECIPE_KEYS = {
    "path": "data.mixture.0.datasets.0.path",
    "split": "data.mixture.0.datasets.0.split",
    "option": "data.mixture.0.datasets.0.options",
    "output": "data.store",
    "verify": "data.verify",
    "images": "data.images",
}


def _refuse_dataset_options(**given: str | list[str] | None) -> None:
    """Refuse the options that go with --dataset: a recipe says these things by itself.

    Raises:
        UserError: one of the options that go with --dataset is given; it names the key of the recipe.
    """
    for name, value in given.items():
        if value is not None:
            example = RECIPE_KEYS[name] if isinstance(value, list) else f"{RECIPE_KEYS[name]}={value}"
            raise UserError(f"--{name} goes with --dataset; a RECIPE has the key {example}, in it or after it")


def _all(
    recipe: str, overrides: Sequence[str], max_skip_share: float | None, options: PrepareOptions, out: Console
) -> _Prepared:
    """Prepare the datasets of a recipe, its base model and its benchmark."""
    from sft.data.prepare import prepare as prepare_sources
    from sft.evaluation.tasks import named_tasks, open_tasks
    from sft.runs.names import find_recipe

    own = [] if max_skip_share is None else [f"data.max_skip_share={max_skip_share}"]
    found = find_recipe(recipe, [*overrides, *own])
    with preparation(out) as update:
        sources = prepare_sources(found, update, options)
    benchmarks = [task for task in named_tasks(found.evaluation) if task.name != "loss"]
    open_tasks(benchmarks, found.evaluation, Path(found.data.store))  # built, and checked, before hours of training
    parts = [part for own in sources.parts for part in own] + ([sources.validation] if sources.validation else [])
    stores = [part.store for part in parts]
    arguments = shlex.join([recipe, *overrides])
    following: tuple[str, ...] = (f"Next: idefics-sft mix {arguments}", f"  or: idefics-sft train {arguments}")
    if options.limit is not None:
        paths = dict.fromkeys(str(store.path) for store in stores)
        following = (
            *(f"Next: {shlex.join(['idefics-sft', 'stats', path])}" for path in paths),
            f"The first {options.limit:,} records are for looking: mix and train want all, without --limit",
        )
    return _Prepared(stores, [part.encoded.changes for part in parts], following)


def _one(
    asked: dict[str, Any],
    how: dict[str, str],
    output: Path,
    max_skip_share: float | None,
    options: PrepareOptions,
    out: Console,
) -> _Prepared:
    """Prepare one dataset without a recipe."""
    from sft.data.prepare import prepare_one

    with preparation(out) as update:
        store = prepare_one(asked, how, output, max_skip_share, options, update)
    return _Prepared([store], [{}], (f"Next: {shlex.join(['idefics-sft', 'stats', str(output)])}",))


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


def show(stores: Sequence[Store], out: Console) -> None:
    """Print what each store holds, and what was left out of it and why."""
    from sft.data.statistics import not_read

    rows = [
        (
            printable(store.path),
            f"{store.manifest['records']:,}",
            f"{len(store):,}",
            f"{store.num_images:,}",
            f"{sum(store.manifest['filtered'].values()):,}",
            f"{sum(store.manifest['skipped'].values()):,}",
        )
        for store in stores
    ]
    out.print(table("Prepared", ("store", "records", "samples", "images", "filtered", "skipped"), rows))
    for store in stores:
        for kind in ("filtered", "skipped"):
            for reason, number in store.manifest[kind].items():
                share = percent(number / max(store.manifest["records"], 1))
                example = store.manifest["examples"][reason]
                out.print(printable(f"{store.path.name}: {kind} {number:,} ({share}), {reason}; as {example}"))
        for line in (*_image_lines(store), *not_read(store)):
            out.print(printable(f"{store.path.name}: {line}"))
        if store.manifest["limit"]:
            out.print(
                f"{printable(store.path.name)}: only the first {store.manifest['limit']:,} records, as --limit said"
            )


def _image_lines(store: Store) -> Iterator[str]:
    """Yield what is told of the images of a store."""
    noted = store.manifest.get("image_notes", {})
    applied = "applied" if store.decoding.orientation == "apply" else "not applied (data.images.orientation: ignore)"
    if number := noted.get("orientation"):
        yield f"{number:,} image{' has' if number == 1 else 's have'} an EXIF orientation, {applied}"
    if number := noted.get("no_end_marker"):
        yield f"{number:,} JPEG without an end marker taken; all of the data is there"


def _show_end(prepared: _Prepared, out: Console) -> None:
    """Print what was done with samples that do not fit a pack, and the next command."""
    for store, changes in zip(prepared.stores, prepared.changes, strict=True):
        for what, number in changes.items():
            out.print(printable(f"{store.path.name}: {number:,} samples do not fit a pack, {what}"))
    for line in prepared.following:
        out.print(printable(line), soft_wrap=True)


def _summary(store: Store, fitted: dict[str, int]) -> dict[str, Any]:
    manifest = store.manifest
    return {
        "path": str(store.path),
        "records": manifest["records"],
        "samples": len(store),
        "images": store.num_images,
        "filtered": manifest["filtered"],
        "skipped": manifest["skipped"],
        "orientation": store.decoding.orientation,
        "image_notes": manifest.get("image_notes", {}),
        "not_read": manifest.get("not_read", {}),
        "fitted": fitted,
    }
