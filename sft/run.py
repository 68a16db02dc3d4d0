"""A run from a recipe: the one place that knows all parts.

prepare  raw files -> stores and encoded arrays, the base model with its full vocabulary
train    model + sources + trainer -> RUN/ with checkpoints
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from sft.chat_template import ChatTemplate
from sft.checkpoint import checkpoint_name, write_folder
from sft.data_loader import MicroBatches
from sft.datasets import Adapter
from sft.encoding import INDEX, EncodedSamples, encode_samples, fingerprint
from sft.errors import UserError
from sft.inference import load_template
from sft.locking import locked
from sft.models import ModelFamily, get_family
from sft.planner import Planner
from sft.prepared import Part, Sources
from sft.recipe import DataConfig, DatasetConfig, Recipe
from sft.run_status import RunStatus
from sft.shipped import resolve
from sft.store import MANIFEST, Settings, Store, is_store_folder, prepare_store
from sft.validation import check_recipe, is_local

if TYPE_CHECKING:
    import torch

VALIDATION = "validation"
"""What the user's own held-out conversations are called in tables."""

OUTPUTS = ("recipe.yaml", "metrics.jsonl", "checkpoints", "evaluations", "selection.json", "selection.svg")
"""What a run writes beside run.json."""

SNAPSHOT_DTYPE = "bfloat16"
"""Weight snapshots are rounded once to this: what is evaluated is what is shipped."""


# ------------------------------------------------------------------------------------------------------ prepare


def base_path(recipe: Recipe) -> Path:
    """Where the prepared base of a recipe stands; another place when the files of a local base change."""
    files = sorted(resolve(recipe.model.path).glob("*")) if is_local(recipe.model.path) else []
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(f"{recipe.model.path} {stamps}".encode()).hexdigest()[:8]
    name = recipe.model.path.rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    return Path(recipe.data.store) / "bases" / f"{name}-{digest}"


def prepare_base(recipe: Recipe) -> Path:
    """The base model with every special token, made on first use."""
    path = base_path(recipe)
    if not (path / "config.json").is_file():
        source = resolve(recipe.model.path) if is_local(recipe.model.path) else recipe.model.path
        path.parent.mkdir(parents=True, exist_ok=True)
        get_family(recipe.model.family).prepare_base(source, path)
    return path


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

        def prepared(source: str, dataset: DatasetConfig) -> Part:
            name = source if source == dataset.dataset else f"{source}: {dataset.dataset}"
            path = Path(recipe.data.store) / _store_name(dataset, options.limit)
            with locked(path, beside=True):
                store = _prepared_store(dataset, path, name, store_settings(recipe.data, options), on_progress)
                encoded = encode_samples(
                    store,
                    template,
                    encoded_path(store, template),
                    num_proc=options.num_proc,
                    on_progress=lambda samples: on_progress(f"{name}, token ids", samples, samples / len(store)),
                )
            return Part(store, encoded)

        return _sources(recipe, prepared)


def _store_name(dataset: DatasetConfig, limit: int | None) -> str:
    """A store of the first records alone has a name of its own: it is to look at, and no other takes it for a whole."""
    return dataset.store_name if limit is None else f"{dataset.store_name}-first-{limit}"


def _prepared_store(dataset: DatasetConfig, path: Path, name: str, settings: Settings, on_progress: Progress) -> Store:
    adapter = Adapter(dataset.dataset, dataset.path, dataset.split, dataset.options)
    on_progress(name, 0, 0.0)  # so that it is seen to work before the first piece is done
    store = prepare_store(
        adapter,
        path,
        asked=dataset.model_dump(),
        settings=settings,
        on_progress=lambda records, share: on_progress(name, records, share),
    )
    on_progress(name, store.manifest["records"], 1.0)
    return store


def prepare_one(
    asked: dict[str, Any],
    how: dict[str, str],
    path: Path,
    max_skip_share: float | None,
    options: PrepareOptions,
    on_progress: Progress,
) -> Store:
    """The store of one dataset in the folder `path`, without a recipe. `asked` and `how` are keys of a recipe's
    dataset and of its `data`.

    Raises:
        UserError: one of them is wrong, or the folder holds something else, or more than the records asked for.
    """
    try:
        dataset = DatasetConfig.model_validate(asked)
        given = how if max_skip_share is None else {**how, "max_skip_share": max_skip_share}
        data = DataConfig.model_validate(
            {**given, "mixture": [{"name": dataset.dataset, "share": 1, "datasets": [asked]}]}
        )
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"--{str(problem['loc'][-1]).replace('_', '-')}: {problem['msg']}") from error
    Adapter(dataset.dataset, dataset.path, dataset.split, dataset.options)  # what it refuses, before a folder is made
    if path.exists() and not is_store_folder(path) and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: is there already and is no prepared dataset; choose another --output")
    with locked(path, beside=True):
        _check_limit(path, options)
        return _prepared_store(dataset, path, dataset.dataset, store_settings(data, options), on_progress)


def _check_limit(path: Path, options: PrepareOptions) -> None:
    """The first records of a dataset do not take the place of more of them.

    Raises:
        UserError: they would.
    """
    if options.limit is None or options.fresh or not (path / MANIFEST).is_file():
        return
    records = Store(path).manifest["records"]
    if records > options.limit:
        raise UserError(
            f"{path}: holds {records:,} records, and --limit {options.limit} would replace them; "
            "choose another --output, or --fresh"
        )


def open_sources(recipe: Recipe, template: ChatTemplate) -> Sources:
    """The prepared sources of a recipe.

    Raises:
        UserError: something is not prepared; the message names the command.
    """

    def opened(_: str, dataset: DatasetConfig) -> Part:
        store = Store(Path(recipe.data.store) / dataset.store_name)
        path = encoded_path(store, template)
        if not (path / INDEX).is_file():
            raise UserError(f"{store.path}: not encoded for this model; run `idefics-sft prepare` first")
        return Part(store, EncodedSamples(path))

    return _sources(recipe, opened)


def _sources(recipe: Recipe, part: Callable[[str, DatasetConfig], Part]) -> Sources:
    parts = [[part(source.name, dataset) for dataset in source.datasets] for source in recipe.data.mixture]
    validation = recipe.data.validation
    if validation is None or validation.path is None:
        return Sources(parts, recipe.data)
    own = part(VALIDATION, DatasetConfig(dataset="messages", path=validation.path))
    return Sources(parts, recipe.data, validation=own)


def store_settings(data: DataConfig, options: PrepareOptions) -> Settings:
    """How the stores of a recipe are made."""
    return Settings(
        images=data.images,
        verify=data.verify,
        max_record_bytes=data.max_record_bytes,
        max_skip_share=data.max_skip_share,
        num_proc=options.num_proc,
        limit=options.limit,
        fresh=options.fresh,
    )


def encoded_path(store: Store, template: ChatTemplate) -> Path:
    """Where a store keeps what a template encodes."""
    return store.path / "encoded" / fingerprint(template)


# -------------------------------------------------------------------------------------------------------- train


def train(
    recipe: Recipe,
    sources: Sources,
    on_step: Callable[[int, dict[str, Any]], None] = lambda step, line: None,
    say: Callable[[str], None] = lambda line: None,
) -> RunStatus:
    """Fine-tune as the recipe says, into its output_dir; what an earlier run left there goes first.

    `on_step` gets every line of metrics.jsonl as it is written, `say` what a person should know besides.

    Raises:
        UserError: the folder is in use or holds other things, or samples are too long for the model.
    """
    run_dir = Path(recipe.output_dir)
    with locked(run_dir):
        return _train(recipe, sources, run_dir, on_step, say)


def _train(
    recipe: Recipe,
    sources: Sources,
    run_dir: Path,
    on_step: Callable[[int, dict[str, Any]], None],
    say: Callable[[str], None],
) -> RunStatus:
    from transformers import set_seed

    from sft.trainer import Trainer

    family = get_family(recipe.model.family)
    base = prepare_base(recipe)
    set_seed(recipe.seed)
    model = family.load_model(base)
    _check_positions(recipe, sources, family.max_positions(model))
    _take_over(run_dir, recipe.training.max_steps)
    (run_dir / "recipe.yaml").write_text(_with_absolute_paths(recipe).to_yaml(), encoding="utf-8")
    frozen = family.select_trainable(model)
    say(_what_is_trained(model, frozen))
    template = load_template(family, base)
    planner = Planner(sources.sources, recipe.data, packs_per_step=recipe.packs_per_step, seed=recipe.seed)
    micro_batches = MicroBatches(
        sources,
        planner,
        packs_per_step=recipe.packs_per_step,
        micro_batch_packs=recipe.training.micro_batch_packs,
        image_size=family.image_size(model),
    )

    def write_checkpoint(trained: torch.nn.Module, step: int) -> None:
        path = run_dir / "checkpoints" / checkpoint_name(step)
        write_folder(path, lambda folder: save_snapshot(family, trained, template, recipe, folder))

    tokens = 0

    def count(step: int, line: dict[str, Any]) -> None:
        nonlocal tokens
        tokens += line["tokens"]
        on_step(step, line)

    trainer = Trainer(
        model,
        tokenizer=template.tokenizer,
        micro_batches=micro_batches,
        micro_batches_per_step=recipe.packs_per_step // recipe.training.micro_batch_packs,
        settings=recipe.training,
        checkpoint_every=recipe.checkpoints.every_steps,
        write_checkpoint=write_checkpoint,
        run_dir=run_dir,
        seed=recipe.seed,
        source_names=[source.name for source in recipe.data.mixture],
        on_step=count,
    )
    started, cpu_started = time.perf_counter(), time.process_time()

    def status(state: str) -> RunStatus:
        return RunStatus(
            status=state,
            step=int(trainer.state.global_step),
            max_steps=recipe.training.max_steps,
            seconds=time.perf_counter() - started,
            cpu_seconds=time.process_time() - cpu_started,
            tokens=tokens,
            precision=trainer.precision,
            versions=_versions(),
        )

    with _recorded(run_dir, status):
        trainer.train()
    model.eval()
    if ended := planner.mixture.ended():
        say(f"{ended}: came to the end of its max_epochs, and training with it at step {trainer.state.global_step}")
    for size, num_dropped in zip(planner.sizes, planner.num_dropped, strict=True):
        if num_dropped:
            say(f"{size.name}: {num_dropped:,} samples do not fit a pack and were left out")
    return status("finished")


def _check_positions(recipe: Recipe, sources: Sources, max_positions: int) -> None:
    """Isolated samples must fit the model's positions; samples that see each other, the whole pack.

    Raises:
        UserError: they do not.
    """
    length = recipe.data.sequence_length
    if recipe.data.pack_isolation:
        length = min(length, sources.longest())
    if length > max_positions:
        what = "the longest sample has" if recipe.data.pack_isolation else "without pack_isolation a pack has"
        raise UserError(f"data.sequence_length: {what} {length} tokens, the model has {max_positions} positions")


def _what_is_trained(model: torch.nn.Module, frozen: tuple[str, ...]) -> str:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    line = f"training {trained:,} parameters"
    return f"{line}; frozen, since no gradient ever reaches them: {', '.join(frozen)}" if frozen else line


def _take_over(run_dir: Path, max_steps: int) -> None:
    """Make the folder ours: remove what an earlier run of ours wrote, so that no step of it is taken for one of this.

    Raises:
        UserError: the folder holds files of these names that no run of ours has written.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    if RunStatus.read(run_dir) is None:
        foreign = [name for name in OUTPUTS if (run_dir / name).exists()]
        if foreign:
            raise UserError(f"{run_dir}: holds {', '.join(foreign)}, but not of a run; choose another output_dir")
    RunStatus(status="running", step=0, max_steps=max_steps).write(run_dir)
    delete_outputs(run_dir)


def delete_outputs(run_dir: Path) -> None:
    """Delete what a run has written, and nothing else."""
    for name in OUTPUTS:
        path = run_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _recorded(run_dir: Path, status: Callable[[str], RunStatus]) -> Iterator[None]:
    """Keep run.json true: running, then finished, stopped or failed."""

    status("running").write(run_dir)
    try:
        yield
    except BaseException as error:
        status("stopped" if isinstance(error, KeyboardInterrupt) else "failed").write(run_dir)
        raise
    status("finished").write(run_dir)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "trl", "accelerate", "datasets")}


def save_snapshot(
    family: ModelFamily, model: torch.nn.Module, template: ChatTemplate, recipe: Recipe, folder: Path
) -> None:
    """Weights, config, tokenizer, chat template and recipe: a plain transformers folder."""
    import torch

    family.save_model(model, folder, getattr(torch, SNAPSHOT_DTYPE))
    template.tokenizer.chat_template = template.template
    template.tokenizer.save_pretrained(folder)
    (folder / "recipe.yaml").write_text(_with_absolute_paths(recipe).to_yaml(), encoding="utf-8")


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe as it is kept: what is written is found again from any current directory."""
    data = recipe.data.model_copy(update={"store": str(Path(recipe.data.store).absolute())})
    return recipe.model_copy(update={"data": data, "output_dir": str(Path(recipe.output_dir).absolute())})
