"""Raw files -> stores, encoded arrays and the base model with its full vocabulary: what a run reads."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sft.core.errors import UserError
from sft.core.file_lock import locked
from sft.core.sample import Decoding
from sft.data.check_recipe import check_recipe
from sft.data.datasets import Adapter
from sft.data.encoded_arrays import INDEX, EncodedSamples, encode_samples, encoding_name
from sft.data.prepared_source import PreparedDataset
from sft.data.sources import Sources
from sft.data.store import MANIFEST, Settings, Store, is_store_folder, prepare_store
from sft.data.truncate import Limits
from sft.models import get_family
from sft.models.base_model import base_path, prepare_base
from sft.models.chat_template import ChatTemplate
from sft.models.loaded_model import load_template
from sft.recipe import DataConfig, DatasetConfig, Recipe

VALIDATION = "validation"  # what the user's own held-out conversations are called in tables


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What the command line says about a preparation, beyond the recipe."""

    num_proc: int = 1
    limit: int | None = None
    fresh: bool = False


Progress = Callable[[str, int, float], None]
"""Called with what is being prepared, how many records are done, and the share of the whole."""


def prepare(
    recipe: Recipe,
    on_progress: Progress = lambda name, records, share: None,
    options: PrepareOptions = PrepareOptions(),
) -> Sources:
    """Make whatever is missing of stores, base and encoded arrays; return the sources, ready to be mixed."""
    check_recipe(recipe)
    with locked(Path(recipe.data.store)):
        template = load_template(get_family(recipe.model.family), prepare_base(recipe))
        limits = sample_limits(recipe)

        def prepared(source: str, dataset: DatasetConfig) -> PreparedDataset:
            name = source if source == dataset.dataset else f"{source}: {dataset.dataset}"
            path = _store_path(recipe, dataset, options.limit)
            with locked(path, beside=True):
                store = _prepared_store(dataset, path, name, store_settings(recipe.data, options), on_progress)
                encoded = encode_samples(
                    store,
                    template,
                    encoded_path(store, template, limits),
                    limits=limits,
                    num_proc=options.num_proc,
                    on_progress=lambda samples: on_progress(f"{name}, token ids", samples, samples / len(store)),
                )
            return PreparedDataset(store, encoded)

        return _sources(recipe, prepared)


def _store_path(recipe: Recipe, dataset: DatasetConfig, limit: int | None = None) -> Path:
    """Return the folder of a store; one of the first records alone is not to be taken for a whole one."""
    store = dataset.store_in(recipe.data.store)
    return store if limit is None else store.with_name(f"{dataset.store_name}-first-{limit}")


def _prepared_store(dataset: DatasetConfig, path: Path, name: str, settings: Settings, on_progress: Progress) -> Store:
    adapter = Adapter(dataset.dataset, dataset.path, dataset.split, dataset.options)
    made_with = Store(path).decoding if (path / MANIFEST).is_file() and not settings.fresh else settings.decoding
    was = f"orientation {made_with.orientation}, max_pixels {made_with.max_pixels:,}"
    shown = name if made_with == settings.decoding else f"{name}, made again since data.images was {was}"
    on_progress(shown, 0, 0.0)  # so that it is seen to work before the first piece is done
    store = prepare_store(
        adapter,
        path,
        asked=dataset.model_dump(),
        settings=settings,
        on_progress=lambda records, share: on_progress(shown, records, share),
        called=f"{name} ({dataset.path})" if dataset.path else name,
    )
    on_progress(shown, store.manifest["records"], 1.0)
    return store


def prepare_one(
    asked: dict[str, Any],
    how: dict[str, Any],
    path: Path,
    max_skip_share: float | None,
    options: PrepareOptions,
    on_progress: Progress,
) -> Store:
    """Return the store of one dataset in the folder `path`, without a recipe. `asked` and `how` are keys of a recipe's
    dataset and of its `data`. Raise UserError where one is wrong, or the folder holds anything else, or more."""
    try:
        dataset = DatasetConfig.model_validate(asked)
        given = how if max_skip_share is None else {**how, "max_skip_share": max_skip_share}
        data = DataConfig.model_validate(
            {**given, "mixture": [{"name": dataset.dataset, "share": 1, "datasets": [asked]}]}
        )
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"--{str(problem['loc'][0]).replace('_', '-')}: {problem['msg']}") from error
    Adapter(dataset.dataset, dataset.path, dataset.split, dataset.options)  # what it refuses, before a folder is made
    if path.exists() and not is_store_folder(path) and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: is there already and is no prepared dataset; choose another --output")
    with locked(path, beside=True):
        _check_limit(path, options)
        return _prepared_store(dataset, path, dataset.dataset, store_settings(data, options), on_progress)


def _check_limit(path: Path, options: PrepareOptions) -> None:
    """Raise UserError where the first records of a dataset would take the place of more of them."""
    if options.limit is None or options.fresh or not (path / MANIFEST).is_file():
        return
    records = Store(path).manifest["records"]
    if records > options.limit:
        found = f"holds {records:,} records, and --limit {options.limit} would replace them"
        raise UserError(f"{path}: {found}; choose another --output, or --fresh")


def open_sources(recipe: Recipe, template: ChatTemplate, arguments: Sequence[str] = ()) -> Sources:
    """Return the prepared sources of a recipe; raise a UserError with the command and `arguments` for missing ones."""
    limits = sample_limits(recipe)

    def opened(_: str, dataset: DatasetConfig) -> PreparedDataset:
        store = _opened_store(recipe, dataset, arguments)
        path = encoded_path(store, template, limits)
        if not (path / INDEX).is_file():
            what = "this model, data.sequence_length, data.max_images_per_pack and data.long_conversations"
            raise UserError(f"{store.path}: not encoded for {what}; run `{_command(arguments)}` first")
        return PreparedDataset(store, EncodedSamples(path))

    return _sources(recipe, opened)


def _opened_store(recipe: Recipe, dataset: DatasetConfig, arguments: Sequence[str]) -> Store:
    path = _store_path(recipe, dataset)
    if not (path / MANIFEST).is_file():
        raise UserError(f"{path}: no prepared dataset here; run `{_command(arguments)}` first")
    return Store(path)


def _command(arguments: Sequence[str]) -> str:
    return shlex.join(["idefics-sft", "prepare", *arguments])


def open_prepared(recipe: Recipe, arguments: Sequence[str] = ()) -> tuple[Sources, ChatTemplate]:
    """Return what `prepare` made of a recipe, as `open_sources`, and its template. Nothing is made or downloaded."""
    base = base_path(recipe)
    if not (base / "config.json").is_file():
        for dataset in (dataset for source in recipe.data.mixture for dataset in source.datasets):
            _opened_store(recipe, dataset, arguments)  # what is missing first is named first
        raise UserError(f"{base}: the base model is not prepared; run `{_command(arguments)}` first")
    template = load_template(get_family(recipe.model.family), base)
    return open_sources(recipe, template, arguments), template


def _sources(recipe: Recipe, part: Callable[[str, DatasetConfig], PreparedDataset]) -> Sources:
    parts = [[part(source.name, dataset) for dataset in source.datasets] for source in recipe.data.mixture]
    validation = recipe.data.validation
    if validation is None or validation.path is None:
        return Sources(parts, recipe.limited_data)
    own = part(VALIDATION, DatasetConfig(dataset="messages", path=validation.path))
    return Sources(parts, recipe.limited_data, validation=own)


def store_settings(data: DataConfig, options: PrepareOptions) -> Settings:
    """Return how the stores of a recipe are made."""
    return Settings(
        images=data.images.store,
        decoding=Decoding(orientation=data.images.orientation, max_pixels=data.images.max_pixels),
        verify=data.verify,
        max_record_bytes=data.max_record_bytes,
        max_skip_share=data.max_skip_share,
        **asdict(options),
    )


def sample_limits(recipe: Recipe) -> Limits:
    """Return how long a sample may be and how many images it may show, so that it fits a pack. Where samples do not see
    each other a pack may be longer than the prepared base has positions for, a sample may not. Raise UserError where
    images are cropped, and their tokens depend on their size."""
    family, data = get_family(recipe.model.family), recipe.data
    config = family.weights.load_config(base_path(recipe))
    if data.augment == "crop" and family.images(config).depends_on_size:
        why = f"changes the size of an image, on which its tokens depend in {recipe.model.family}"
        raise UserError(f"data.augment: crop {why}; set data.augment=none")
    max_positions = family.text.max_positions(config)
    tokens = min(data.sequence_length, max_positions) if data.pack_isolation else data.sequence_length
    return Limits(tokens, data.max_images_per_pack, data.long_conversations)


def encoded_path(store: Store, template: ChatTemplate, limits: Limits) -> Path:
    """Return the folder in which a store keeps what a template encodes."""
    return store.path / "encoded" / encoding_name(template, limits)
