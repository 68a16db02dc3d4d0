"""Training from a recipe and its prepared sources: the one place that knows all parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.batches.data_loader import MicroBatches
from sft.batches.feature_cache import Encoder, FeatureCache, bytes_of, fingerprint
from sft.batches.pack_stream import Planner
from sft.batches.steps import Plans
from sft.checks.before_training import before_training
from sft.core.distributed import ALONE, Rank, any_process, from_main
from sft.core.errors import UserError
from sft.core.file_lock import locked
from sft.core.precision import choose_precision, device, torch_dtype
from sft.data.sources import Sources
from sft.models import get_family
from sft.models.base_model import prepare_base
from sft.models.family import ModelFamily
from sft.models.lora import add_adapters
from sft.models.open_model import load_template
from sft.recipe import Recipe
from sft.runs.checkpoint import STATE, checkpoint_name, keep_newest_states, write_folder
from sft.runs.status import RunStatus
from sft.training.engines import check_readable, choose_engine, get_engine
from sft.training.optimizer import table_of, what_is_trained
from sft.training.out_of_memory import out_of_memory_told
from sft.training.run_folder import go_back_to, hardware, progress_of, recorded, save_snapshot, take_over, versions
from sft.training.stop_signal import StopRequest

if TYPE_CHECKING:
    import torch

    from sft.training.dry_run import Measured


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

    from sft.training.monitors import Monitors
    from sft.training.trainer import Trainer

    family = get_family(recipe.model.family)
    base = prepare_base(recipe)
    engine = choose_engine(recipe.distributed.engine, recipe.model.mode, rank, recipe.training.optimizer)
    get_engine(engine).check_precision(_precision(recipe))
    set_seed(recipe.seed)
    before = from_main(lambda: progress_of(resume_from, sources)) if resume_from else None
    if resume_from and before:
        check_readable(resume_from, before, engine, rank)
    with out_of_memory_told(recipe, lambda: recipe.model.path):
        model = load_for_training(recipe, family, base)
    _check_positions(recipe, family.max_positions(model.config))
    template = load_template(family, base)
    for warning in before_training(recipe, family, model, template, run_dir):
        say(f"warning: {warning}")
    looks = recipe if engine == "ddp" else _without_evaluation(recipe, engine, say)
    monitors = Monitors(looks, sources, template, image_size=family.image_size(model.config), say=say)
    from_main(lambda: go_back_to(recipe, resume_from) if resume_from else take_over(recipe, run_dir))
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
    features = _feature_cache(recipe, family, model, sources, engine, say) if recipe.data.feature_cache else None
    micro_batches = MicroBatches(plans, image_size=family.image_size(model.config), features=features)
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

        path = run_dir / "checkpoints" / checkpoint_name(trainer.state.global_step)
        weights = trainer.engine.gathered(trainer)

        def write_weights(folder: Path) -> None:
            save_snapshot(family, trainer.unwrapped, template, recipe, folder, weights)

        write_folder(path, write_weights, write_state, rank)
        if rank.is_main:
            keep_newest_states(path.parent, recipe.checkpoints.keep_state)

    def count(step: int, line: dict[str, Any]) -> None:
        spent["tokens"] += line["tokens"]
        monitors.log(line)
        on_step(step, line)

    get_engine(engine).share_out(model, _precision(recipe))
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
        say=say,
        should_stop=lambda: stop.is_agreed(any_process),
        resume_from=resume_from / STATE if resume_from else None,
        complete=_encoder(recipe, model, features, say) if features else lambda batch: batch,
        validate=monitors.validate,
        callbacks=monitors.callbacks,
        rank=rank,
        engine=engine,
        micro_batches_of_all=plans.micro_batches_of_all,
    )

    def steps_done() -> int:
        return max(int(trainer.state.global_step), before["step"] if before else 0)

    def status(state: str, why: str) -> RunStatus:
        return RunStatus(
            status=state,
            why=why,
            step=steps_done(),
            max_steps=recipe.training.max_steps,
            precision=trainer.precision,
            hardware=hardware(rank.of),
            versions=versions(),
            failed_evaluations=monitors.failed,
            **spent_so_far(),  # type: ignore[arg-type]
        )

    def is_short() -> bool:
        return steps_done() < recipe.training.max_steps

    def outcome() -> tuple[str, str]:
        """How the training ended, and why."""
        if not is_short():
            return "finished", "training.max_steps"
        if stop.why:
            return "stopped", stop.why
        return "finished", monitors.ended or f"{planner.mixture.ended()} came to the end of its max_epochs"

    def next_step() -> str:
        return f"step {steps_done() + 1}"

    with recorded(run_dir, status, outcome) if rank.is_main else nullcontext():
        if is_short():  # transformers would train a step more than there are
            with out_of_memory_told(recipe, next_step):
                trainer.train()
        else:
            say(f"step {steps_done():,} was the last (training.max_steps); nothing is left to train")
        last = run_dir / "checkpoints" / checkpoint_name(steps_done())
        if is_short() and not last.exists():
            write_checkpoint(trainer)
    model.eval()
    if stop.why and is_short():
        say(f"stopped after step {steps_done():,} ({stop.why})")
    return status(*outcome())


def _without_evaluation(recipe: Recipe, engine: str, say: Callable[[str], None]) -> Recipe:
    """A checkpoint to be asked questions is loaded as a whole, for which no process may have the room."""
    if recipe.evaluation.every_steps:
        say(
            f"evaluation.every_steps: not while {engine} shares the model out, nor evaluation.patience; run "
            f"`idefics-sft select {recipe.output_dir} --watch` beside the training"
        )
    without = recipe.evaluation.model_copy(update={"every_steps": None, "patience": None})
    return recipe.model_copy(update={"evaluation": without})


def _feature_cache(
    recipe: Recipe, family: ModelFamily, model: Any, sources: Sources, engine: str, say: Callable[[str], None]
) -> FeatureCache:
    """
    Raises:
        UserError: the tower is shared out.
    """
    if engine != "ddp":
        raise UserError(f"data.feature_cache: {engine} shares out the tower, whose weights it hangs on; set ddp")
    weights = ((n, weight) for n, weight in model.named_parameters() if family.group_of(n) in ("vision", "resampler"))
    how = {"model": family.tower_settings(model.config), "precision": _precision(recipe)}
    stores = list(dict.fromkeys(part.store for own in sources.parts for part in own))
    cache = FeatureCache(stores, fingerprint(weights, how), family.states_of_image(model.config))
    there, images = cache.count()
    size = bytes_of(cache.shape) * images
    say(f"feature cache: {there:,} of {images:,} images are encoded already; {size / 1e9:.3g} GB when all are")
    return cache


def _encoder(recipe: Recipe, model: Any, features: FeatureCache, say: Callable[[str], None]) -> Encoder:
    import torch

    precision = _precision(recipe)
    autocast = partial(torch.autocast, device().type, dtype=torch_dtype(precision), enabled=precision != "float32")
    return Encoder(model, features, autocast, warn=lambda line: say(f"warning: {line}"))


def _precision(recipe: Recipe) -> str:
    return choose_precision(recipe.training.precision, device())


def dry_run(recipe: Recipe, sources: Sources, say: Callable[[str], None] = lambda line: None) -> list[Measured]:
    """Everything up to the first steps of `train`, and two steps measured; nothing is written into output_dir.

    Raises:
        UserError: as `train`, or a check of `sft.checks` fails.
        RunError: a check fails, or there is not enough memory.
    """
    from transformers import set_seed

    from sft.training.dry_run import measure

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
