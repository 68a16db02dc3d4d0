"""A run from a recipe: the one place that knows all parts.

prepare  raw files -> stores and encoded arrays, the base model with its full vocabulary
train    model + sources + trainer -> RUN/ with checkpoints
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from sft.bases import base_path as base_path
from sft.bases import prepare_base as prepare_base
from sft.chat_template import ChatTemplate
from sft.checkpoint import STATE, check_state, checkpoint_name, keep_newest_states, step_of, write_folder
from sft.checks.before_training import before_training
from sft.checks.environment import LIBRARIES as VERSIONED
from sft.data_loader import MicroBatches
from sft.datasets import Adapter
from sft.distributed import (
    ALONE,
    Rank,
    any_process,
    as_main,
    check_precision,
    choose_engine,
    gathered_weights,
    wait_for_all,
)
from sft.encoding import INDEX, EncodedSamples, encode_samples, fingerprint
from sft.errors import UserError
from sft.files import discard
from sft.fitting import Limits
from sft.inference import load_template
from sft.locking import locked
from sft.lora import add_adapters, has_adapters, save_adapters
from sft.models import ModelFamily, get_family
from sft.optim import table_of, what_is_trained
from sft.planner import Planner
from sft.plans import Plans
from sft.precision import choose_precision, device, torch_dtype
from sft.prepared import Part, Sources
from sft.recipe import DataConfig, DatasetConfig, Recipe
from sft.run_status import RunStatus
from sft.stopping import StopRequest
from sft.store import MANIFEST, Settings, Store, is_store_folder, prepare_store
from sft.training_state import read_progress
from sft.validation import check_recipe

if TYPE_CHECKING:
    import torch

    from sft.dry_run import Measured

VALIDATION = "validation"
"""What the user's own held-out conversations are called in tables."""

OUTPUTS = (
    "nonfinite.jsonl",
    "recipe.yaml",
    "metrics.jsonl",
    "checkpoints",
    "evaluations",
    "selection.json",
    "selection.svg",
    "tensorboard",
)
"""What a run writes beside run.json."""

SNAPSHOT_DTYPE = "bfloat16"
"""Weight snapshots are rounded once to this: what is evaluated is what is shipped."""


# ------------------------------------------------------------------------------------------------------ prepare


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

        def prepared(source: str, dataset: DatasetConfig) -> Part:
            name = source if source == dataset.dataset else f"{source}: {dataset.dataset}"
            path = Path(recipe.data.store) / _store_name(dataset, options.limit)
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
    limits = sample_limits(recipe)

    def opened(_: str, dataset: DatasetConfig) -> Part:
        store = Store(Path(recipe.data.store) / dataset.store_name)
        path = encoded_path(store, template, limits)
        if not (path / INDEX).is_file():
            raise UserError(
                f"{store.path}: not encoded for this model, data.sequence_length, data.max_images_per_pack and "
                "data.long_conversations; run `idefics-sft prepare` first"
            )
        return Part(store, EncodedSamples(path))

    return _sources(recipe, opened)


def open_prepared(recipe: Recipe) -> tuple[Sources, ChatTemplate]:
    """What `prepare` has made of a recipe. Nothing is made, and nothing is downloaded.

    Raises:
        UserError: something is not prepared; the message names the command.
    """
    base = base_path(recipe)
    if not (base / "config.json").is_file():
        for dataset in (dataset for source in recipe.data.mixture for dataset in source.datasets):
            Store(Path(recipe.data.store) / dataset.store_name)  # what is missing first is named first
        raise UserError(f"{base}: the base model is not prepared; run `idefics-sft prepare` first")
    template = load_template(get_family(recipe.model.family), base)
    return open_sources(recipe, template), template


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


def sample_limits(recipe: Recipe) -> Limits:
    """How long a sample may be, and how many images it may show: what fits a pack. Where samples do not see each other
    a pack may be longer than the prepared base has positions for, a sample may not."""
    family = get_family(recipe.model.family)
    data = recipe.data
    max_positions = family.max_positions(family.load_config(base_path(recipe)))
    tokens = min(data.sequence_length, max_positions) if data.pack_isolation else data.sequence_length
    return Limits(tokens, data.max_images_per_pack, data.long_conversations)


def encoded_path(store: Store, template: ChatTemplate, limits: Limits) -> Path:
    """Where a store keeps what a template encodes."""
    return store.path / "encoded" / fingerprint(template, limits)


# -------------------------------------------------------------------------------------------------------- train


def train(
    recipe: Recipe,
    sources: Sources,
    on_step: Callable[[int, dict[str, Any]], None] = lambda step, line: None,
    say: Callable[[str], None] = lambda line: None,
    resume_from: Path | None = None,
    rank: Rank = ALONE,
) -> RunStatus:
    """Fine-tune as the recipe says, into its output_dir; what an earlier run left there goes first.

    `on_step` gets every line of metrics.jsonl as it is written, `say` what a person should know besides. With
    `resume_from`, a checkpoint of the run, training goes on after its step, and later checkpoints go. `rank` says which
    of several processes this is, all of which call this; only the main one writes. A signal, or a file `stop` in the
    folder, ends training after a step with a checkpoint; the status is `stopped` then.

    Raises:
        UserError: the folder is in use or holds other things, or the pack is too long for the model; or the checkpoint
            is not complete, or of other data.
    """
    run_dir = Path(recipe.output_dir)
    with locked(run_dir) if rank.is_main else nullcontext(), StopRequest(run_dir) as stop:
        return _train(recipe, sources, run_dir, on_step, say, resume_from, stop, rank)


def _train(
    recipe: Recipe,
    sources: Sources,
    run_dir: Path,
    on_step: Callable[[int, dict[str, Any]], None],
    say: Callable[[str], None],
    resume_from: Path | None,
    stop: StopRequest,
    rank: Rank,
) -> RunStatus:
    from transformers import set_seed

    from sft.monitoring import Monitors
    from sft.trainer import Trainer

    family = get_family(recipe.model.family)
    base = prepare_base(recipe)
    engine = choose_engine(recipe.distributed.engine, recipe.model.mode, rank)
    check_precision(engine, choose_precision(recipe.training.precision, device()))
    set_seed(recipe.seed)
    before = _progress_of(resume_from, sources) if resume_from else None
    model = load_for_training(recipe, family, base)
    _check_positions(recipe, family.max_positions(model.config))
    template = load_template(family, base)
    for warning in before_training(recipe, family, model, template, run_dir):
        say(f"warning: {warning}")
    monitors = Monitors(recipe, sources, template, image_size=family.image_size(model.config), say=say)
    as_main(rank, lambda: _go_back_to(recipe, resume_from) if resume_from else _take_over(recipe, run_dir))
    frozen = family.select_trainable(model, recipe.model.trainable)
    say(table_of(what_is_trained(model, recipe.training, family.group_of)))
    if frozen:
        say(f"frozen, since no gradient ever reaches them: {', '.join(frozen)}")
    planner = Planner(sources.sources, recipe.data, packs_per_step=recipe.packs_per_step, seed=recipe.seed)
    plans = Plans(
        sources,
        planner,
        micro_batch_packs=recipe.training.micro_batch_packs,
        image_cost=family.image_cost_in_tokens(model.config),
        rank=rank,
    )
    micro_batches = MicroBatches(plans, image_size=family.image_size(model.config))
    if before:
        micro_batches.restore(before["data"])
    if rank.of > 1:
        say(
            f"{rank.of} processes, {engine}: {plans.micro_batches_per_step} micro-batches each a step, "
            f"{plans.idle_share:.1%} of the places for packs idle"
        )
    started, cpu_started = time.perf_counter(), time.process_time()
    spent = {name: before["spent"][name] if before else 0 for name in ("tokens", "seconds", "cpu_seconds")}

    def spent_so_far() -> dict[str, float]:
        now = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started}
        return spent | {name: spent[name] + value for name, value in now.items()}

    def write_checkpoint(trainer: Trainer) -> None:
        def write_state(folder: Path) -> None:
            trainer.save_state(folder, {"spent": spent_so_far(), "sources": sources.fingerprint()})

        trained = trainer.accelerator.unwrap_model(trainer.model)
        path = run_dir / "checkpoints" / checkpoint_name(trainer.state.global_step)
        weights = gathered_weights(trainer)
        if rank.is_main:
            write_folder(
                path,
                lambda folder: save_snapshot(family, trained, template, recipe, folder, weights),
                write_state if engine == "ddp" else None,  # what is shared out is not kept as yet
            )
            keep_newest_states(path.parent, recipe.checkpoints.keep_state)
        wait_for_all()

    def count(step: int, line: dict[str, Any]) -> None:
        spent["tokens"] += line["tokens"]
        monitors.log(line)
        on_step(step, line)

    trainer = Trainer(
        model,
        group_of=family.group_of,
        tokenizer=template.tokenizer,
        micro_batches=micro_batches,
        micro_batches_per_step=plans.micro_batches_per_step,
        data_state=micro_batches.state,
        settings=recipe.training,
        checkpoint_every=recipe.checkpoints.every_steps,
        write_checkpoint=write_checkpoint,
        run_dir=run_dir,
        seed=recipe.seed,
        source_names=[source.name for source in recipe.data.mixture],
        on_step=count,
        should_stop=lambda: stop.is_agreed(any_process),
        resume_from=resume_from / STATE if resume_from else None,
        validate=monitors.validate if engine == "ddp" else lambda model, step: {},
        callbacks=monitors.callbacks,
        rank=rank,
        engine=engine,
        micro_batches_of_all=plans.micro_batches_of_all,
    )

    def status(state: str) -> RunStatus:
        return RunStatus(
            status=state,
            step=max(int(trainer.state.global_step), before["step"] if before else 0),
            max_steps=recipe.training.max_steps,
            precision=trainer.precision,
            versions=_versions(),
            failed_evaluations=monitors.failed,
            **spent_so_far(),  # type: ignore[arg-type]
        )

    def is_short() -> bool:
        return int(trainer.state.global_step) < recipe.training.max_steps

    def outcome() -> str:
        return "stopped" if stop.why and is_short() else "finished"

    with _recorded(run_dir, status, outcome) if rank.is_main else nullcontext():
        trainer.train()
        last = run_dir / "checkpoints" / checkpoint_name(trainer.state.global_step)
        if is_short() and not last.exists():
            write_checkpoint(trainer)
    model.eval()
    if outcome() == "stopped":
        say(f"stopped after step {trainer.state.global_step:,} ({stop.why})")
    elif is_short() and (ended := planner.mixture.ended()):
        say(f"{ended}: came to the end of its max_epochs, and training with it at step {trainer.state.global_step}")
    return status(outcome())


def _progress_of(checkpoint: Path, sources: Sources) -> dict[str, Any]:
    """What the state of a checkpoint says.

    Raises:
        UserError: the state is not complete, or the prepared data are others now, so that they would come in another
            order.
    """
    check_state(checkpoint)
    progress = read_progress(checkpoint / STATE)
    if progress["sources"] != sources.fingerprint():
        raise UserError(
            f"{checkpoint}: its run was trained on other prepared data (raw files, tokenizer or limits changed); "
            "--resume none starts anew"
        )
    return progress


def _go_back_to(recipe: Recipe, checkpoint: Path) -> None:
    """Remove later checkpoints, for their steps come again; the recipe is the one of now."""
    (checkpoint.parents[1] / "recipe.yaml").write_text(_with_absolute_paths(recipe).to_yaml(), encoding="utf-8")
    for path in checkpoint.parent.glob("checkpoint-*"):
        if step_of(path) > step_of(checkpoint):
            discard(path)


def dry_run(recipe: Recipe, sources: Sources, say: Callable[[str], None] = lambda line: None) -> list[Measured]:
    """Everything up to the first steps of `train`, and two steps measured; nothing is written into output_dir.

    Raises:
        UserError: as `train`, or a check of `sft.checks` fails.
        RunError: a check fails, or there is not enough memory.
    """
    from transformers import set_seed

    from sft.dry_run import measure

    family, base = get_family(recipe.model.family), prepare_base(recipe)
    set_seed(recipe.seed)
    model = load_for_training(recipe, family, base)
    _check_positions(recipe, family.max_positions(model.config))
    template = load_template(family, base)
    for warning in before_training(recipe, family, model, template, Path(recipe.output_dir)):
        say(f"warning: {warning}")
    family.select_trainable(model, recipe.model.trainable)
    say(table_of(what_is_trained(model, recipe.training, family.group_of)))
    plans = Plans(
        sources,
        Planner(sources.sources, recipe.data, packs_per_step=recipe.packs_per_step, seed=recipe.seed),
        micro_batch_packs=recipe.training.micro_batch_packs,
        image_cost=family.image_cost_in_tokens(model.config),
    )
    return measure(recipe, family, model, template, plans)


def _check_positions(recipe: Recipe, max_positions: int) -> None:
    """Where samples of a pack see each other, the whole pack must fit the model's positions.

    Raises:
        UserError: it does not.
    """
    length = recipe.data.sequence_length
    if not recipe.data.pack_isolation and length > max_positions:
        raise UserError(
            f"data.sequence_length: without pack_isolation a pack has {length} tokens, "
            f"the model has {max_positions} positions"
        )


def load_for_training(recipe: Recipe, family: ModelFamily, base: Path) -> torch.nn.Module:
    """The base as the recipe's mode trains it: groups that are trained in float32, frozen ones in what is computed in,
    or in 4 bits, with fresh adapters where the mode has them.

    Raises:
        UserError: a training.precision that this machine has not, or adapters of layers that the model has not.
    """
    settings = recipe.model
    precision = choose_precision(recipe.training.precision, device())
    if settings.lora is None and precision == "float16":
        precision = "float32"  # frozen weights are a part of the snapshot, and would be rounded twice
    model = family.load_model(
        base,
        trained=settings.trainable,
        frozen_dtype=torch_dtype(precision),
        quantised=settings.mode == "qlora",
        device=device(),
    )
    if settings.lora:
        add_adapters(model, family.lora_pattern(settings.lora.targets), settings.lora, base.absolute())
    return model


def _take_over(recipe: Recipe, run_dir: Path) -> None:
    """Make the folder ours: remove what an earlier run of ours wrote, so that no step of it is taken for one of this.
    Its recipe stands in it then.

    Raises:
        UserError: the folder holds files of these names that no run of ours has written.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    if RunStatus.read(run_dir) is None:
        foreign = [name for name in OUTPUTS if (run_dir / name).exists()]
        if foreign:
            raise UserError(f"{run_dir}: holds {', '.join(foreign)}, but not of a run; choose another output_dir")
    RunStatus(status="running", step=0, max_steps=recipe.training.max_steps).write(run_dir)
    delete_outputs(run_dir)
    (run_dir / "recipe.yaml").write_text(_with_absolute_paths(recipe).to_yaml(), encoding="utf-8")


def delete_outputs(run_dir: Path) -> None:
    """Delete what a run has written, and nothing else."""
    for name in OUTPUTS:
        path = run_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _recorded(
    run_dir: Path, status: Callable[[str], RunStatus], outcome: Callable[[], str] = lambda: "finished"
) -> Iterator[None]:
    """Keep run.json true: running, then finished, stopped or failed."""

    status("running").write(run_dir)
    try:
        yield
    except BaseException as error:
        status("stopped" if isinstance(error, KeyboardInterrupt) else "failed").write(run_dir)
        raise
    status(outcome()).write(run_dir)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in VERSIONED}


def save_snapshot(
    family: ModelFamily,
    model: torch.nn.Module,
    template: ChatTemplate,
    recipe: Recipe,
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Weights or adapters, config, tokenizer, chat template and recipe: a plain transformers or PEFT folder.

    `weights` are those of the model, where an engine keeps them apart.
    """
    if has_adapters(model):
        save_adapters(model, folder, weights)
    else:
        family.save_model(model, folder, torch_dtype(SNAPSHOT_DTYPE), weights)
    template.tokenizer.chat_template = template.template
    template.tokenizer.save_pretrained(folder)
    (folder / "recipe.yaml").write_text(_with_absolute_paths(recipe).to_yaml(), encoding="utf-8")


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe as it is kept: what is written is found again from any current directory."""
    data = recipe.data.model_copy(update={"store": str(Path(recipe.data.store).absolute())})
    return recipe.model_copy(update={"data": data, "output_dir": str(Path(recipe.output_dir).absolute())})
