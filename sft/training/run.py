"""A run of a recipe on its prepared sources. No other file knows all parts of a training."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from sft.batches.data_loader import MicroBatches
from sft.batches.look_ahead import look_ahead, planned
from sft.batches.pack_stream import Planner
from sft.batches.steps import Plans
from sft.core.distributed import ALONE, Rank, from_main
from sft.core.file_lock import locked
from sft.data.sources import Sources
from sft.models.base_model import prepare_base
from sft.recipe import ENGINES, Recipe
from sft.runs.checkpoint import STATE, checkpoint_name, keep_newest_states, write_folder
from sft.runs.status import RunStatus
from sft.training.cached_features import encoder_of, open_feature_cache
from sft.training.engines import check_readable, choose_engine, get_engine
from sft.training.engines.resume_state import Progress, Spent
from sft.training.metrics import Line, Log
from sft.training.monitors import Monitors
from sft.training.open_model import OpenedModel, choose_trained, open_model, precision_of
from sft.training.out_of_memory import explain_out_of_memory
from sft.training.run_folder import claim_folder, go_back_to, hardware, progress_of, recorded, save_snapshot, versions
from sft.training.stop_signal import StopRequest
from sft.training.trainer import Trainer, TrainerParts


def train(
    recipe: Recipe,
    sources: Sources,
    on_step: Callable[[int, Line], None] = lambda step, line: None,
    log: Log = lambda line: None,
    resume_from: Path | None = None,
    rank: Rank = ALONE,
    ahead: dict[str, Any] | None = None,
) -> RunStatus:
    """Fine-tune as the recipe says, into its output_dir; outputs of an earlier run there are deleted first.

    `on_step` gets every line of metrics.jsonl when it is written, `log` what a person should know besides. With
    `resume_from`, a checkpoint of the run, training continues after its step, and later checkpoints are deleted. `rank`
    says which of several processes this is, all of which call this; only the main one writes. A signal, or a file
    `stop` in the folder, ends training after a step with a checkpoint; the status is `stopped` then. `ahead` is the
    `plan_ahead` of this training, if it is known. Raise UserError where the folder is in use or holds other things, the
    pack is too long for the model, or the checkpoint is not complete, or of other data.
    """
    run_dir = Path(recipe.output_dir)
    with locked(run_dir) if rank.is_main else nullcontext(), StopRequest(run_dir) as stop:
        ahead = ahead or from_main(lambda: plan_ahead(recipe, sources, resume_from))
        return TrainingRun(recipe, ahead, sources, on_step, log, resume_from, stop, rank).train()


def plan_ahead(recipe: Recipe, sources: Sources, resume_from: Path | None = None) -> dict[str, Any]:
    """Return the `look_ahead` of a training, which may go on from a checkpoint, as `progress_of` reads it."""
    state = progress_of(resume_from, sources)["data"]["plans"] if resume_from else None
    return look_ahead(recipe, sources.sources, state)


class TrainingRun:
    """One run of a recipe. Making it makes its parts, in an order in which a mistake is found before it costs much:
    engine and checkpoint before the model is loaded, model and monitors before the folder is claimed."""

    def __init__(
        self,
        asked: Recipe,
        ahead: dict[str, Any],
        sources: Sources,
        on_step: Callable[[int, Line], None],
        log: Log,
        resume_from: Path | None,
        stop: StopRequest,
        rank: Rank,
    ) -> None:
        self.asked, self.ahead = asked, ahead
        self.recipe = recipe = planned(asked, ahead)
        self.sources, self.on_step, self.log = sources, on_step, log
        self.resume_from, self.stop, self.rank = resume_from, stop, rank
        self.run_dir = Path(recipe.output_dir)
        base = prepare_base(recipe)
        self.engine = choose_engine(recipe.distributed.engine, recipe.model.mode, rank, recipe.training.optimizer)
        get_engine(self.engine).check_precision(precision_of(recipe))
        self.saved = self._read_saved()
        self.opened = open_model(recipe, base, log)
        self.monitors = self._make_monitors()
        steps = recipe.training.steps
        kept = asked if self.saved is None or self.saved["step"] < steps else None
        from_main(lambda: go_back_to(kept, resume_from) if resume_from else claim_folder(asked, self.run_dir, steps))
        choose_trained(recipe, self.opened, log)
        self.plans = plan_steps(recipe, sources, self.opened, rank)
        self.trainer = self._make_trainer()

    def _read_saved(self) -> Progress | None:
        """Return the progress in the checkpoint to resume from, after checking that these processes can read it."""
        if (checkpoint := self.resume_from) is None:
            return None
        saved = from_main(lambda: progress_of(checkpoint, self.sources))
        check_readable(checkpoint, saved, self.engine, self.rank)
        return saved

    def _make_monitors(self) -> Monitors:
        """Return the monitors; no checkpoint is evaluated while an engine shards the model: it is evaluated as a whole,
        for which no process that keeps a share may have the memory."""
        recipe, evaluation = self.recipe, self.recipe.evaluation
        if ENGINES[self.engine].shards and evaluation.every_steps:
            self.log(
                f"evaluation.every_steps: not while {self.engine} shards the model, nor evaluation.patience; run "
                f"`idefics-sft select {recipe.output_dir} --watch` during the training"
            )
            evaluation = evaluation.model_copy(update={"every_steps": None, "patience": None})
            recipe = recipe.model_copy(update={"evaluation": evaluation})
        return Monitors(recipe, self.sources, self.opened.template, log=self.log)

    def _make_trainer(self) -> Trainer:
        recipe, opened, plans = self.recipe, self.opened, self.plans
        features = None
        if recipe.data.feature_cache:
            features = open_feature_cache(recipe, opened, self.sources, self.engine, self.log)
        micro_batches = MicroBatches(plans, opened.template.images, features=features)
        if self.saved:
            micro_batches.restore(self.saved["data"])
        if self.rank.of > 1:
            each, idle = plans.micro_batches_per_step, f"{plans.idle_share * 100:.1f} % of the places for packs idle"
            self.log(f"{self.rank.of} processes, {self.engine}: {each} micro-batches each a step, {idle}")
        self.clock = _Clock(self.saved["spent"] if self.saved else {"tokens": 0, "seconds": 0, "cpu_seconds": 0})
        get_engine(self.engine).shard(opened.model, precision_of(recipe))
        return Trainer(
            TrainerParts(
                model=opened.model,
                weights=opened.family.weights,
                tokenizer=opened.template.tokenizer,
                settings=recipe.training,
                seed=recipe.seed,
                micro_batches=micro_batches,
                micro_batches_per_step=plans.micro_batches_per_step,
                micro_batches_of_all=plans.micro_batches_of_all,
                complete=encoder_of(recipe, opened, features, self.log) if features else lambda batch: batch,
                source_names=[source.name for source in recipe.data.mixture],
                run_dir=self.run_dir,
                checkpoint_every=recipe.checkpoints.every_steps,
                write_checkpoint=self.write_checkpoint,
                data_state=micro_batches.state,
                resume_from=self.resume_from / STATE if self.resume_from else None,
                on_step=self._count_step,
                log=self.log,
                should_stop=self.stop.is_agreed,
                validate=self.monitors.validate,
                callbacks=self.monitors.callbacks,
                rank=self.rank,
                engine=self.engine,
            )
        )

    def train(self) -> RunStatus:
        """Train to the last step, or until something ends training before, and return the status."""
        with recorded(self.run_dir, self.status, self._outcome) if self.rank.is_main else nullcontext():
            if self._is_short:  # transformers would train a step more than there are
                with explain_out_of_memory(self.recipe, lambda: f"step {self.steps_done + 1}"):
                    self.trainer.train()
            else:
                self.log(f"step {self.steps_done:,} was the last ({self._outcome()[1]}); nothing is left to train")
            if self._is_short and not self._checkpoint.exists():
                self.write_checkpoint()
        self.opened.model.eval()
        if self.stop.why and self._is_short:
            self.log(f"stopped after step {self.steps_done:,} ({self.stop.why})")
        return self.status(*self._outcome())

    @property
    def steps_done(self) -> int:
        """Optimizer steps so far, those before a break among them."""
        return max(int(self.trainer.state.global_step), self.saved["step"] if self.saved else 0)

    @property
    def _is_short(self) -> bool:
        return self.steps_done < self.recipe.training.steps

    @property
    def _checkpoint(self) -> Path:
        return self.run_dir / "checkpoints" / checkpoint_name(self.steps_done)

    def write_checkpoint(self) -> None:
        """Write the weights and the state after the last step, and remove states that are not kept any longer."""
        trainer, path = self.trainer, self._checkpoint
        weights = trainer.engine.gather_weights(trainer)
        write_folder(
            path,
            lambda folder: save_snapshot(self.opened, trainer.unwrapped, self.asked, folder, weights),
            lambda folder: trainer.save_state(folder, spent=self.clock.spent, sources=self.sources.fingerprint()),
            self.rank,
        )
        if self.rank.is_main:
            keep_newest_states(path.parent, self.recipe.checkpoints.keep_state)

    def _count_step(self, step: int, line: Line) -> None:
        self.clock.tokens += line["tokens"]
        self.monitors.log(line)
        self.on_step(step, line)

    def status(self, status: str, why: str) -> RunStatus:
        """Return the content of run.json as it is now."""
        return RunStatus(
            status=status,
            why=why,
            step=self.steps_done,
            max_steps=self.recipe.training.steps,
            precision=self.trainer.precision,
            hardware=hardware(self.rank.of),
            versions=versions(),
            failed_evaluations=self.monitors.failed,
            **self.clock.spent,
        )

    def _outcome(self) -> tuple[str, str]:
        """Return how the training ended, and why."""
        if self._is_short:
            return ("stopped", self.stop.why) if self.stop.why else ("finished", self.monitors.ended or "")
        if not (ended_by := self.ahead["ended_by"]):
            return "finished", "training.max_steps"
        is_epochs = self.asked.training.epochs and ended_by == self.asked.data.mixture[0].name
        return "finished", "training.epochs" if is_epochs else f"{ended_by} came to the end of its max_epochs"


class _Clock:
    """Tokens, seconds and processor seconds of a run, those before a break among them."""

    def __init__(self, before: Spent) -> None:
        self.tokens = before["tokens"]
        self._seconds = before["seconds"] - time.perf_counter()
        self._cpu_seconds = before["cpu_seconds"] - time.process_time()

    @property
    def spent(self) -> Spent:
        """Return the tokens, seconds and processor seconds so far."""
        seconds, cpu_seconds = self._seconds + time.perf_counter(), self._cpu_seconds + time.process_time()
        return {"tokens": self.tokens, "seconds": seconds, "cpu_seconds": cpu_seconds}


def plan_steps(recipe: Recipe, sources: Sources, opened: OpenedModel, rank: Rank = ALONE) -> Plans:
    """Return the plan of every micro-batch of this process: which packs, in which order."""
    return Plans(
        sources,
        Planner(sources.sources, recipe.data, packs_per_step=recipe.packs_per_step, seed=recipe.seed),
        micro_batch_packs=recipe.training.micro_batch_packs,
        image_cost=opened.template.images.cost_in_tokens * _share_encoded(recipe, opened),
        rank=rank,
    )


def _share_encoded(recipe: Recipe, opened: OpenedModel) -> float:
    """Return how much of the work of a trained tower is done: a frozen one goes forward alone, where a token takes the
    backward pass as well, which is twice as much; states in the cache cost nothing."""
    if recipe.data.feature_cache:
        return 0.0
    group_of = opened.family.weights.group_of
    trained = {group_of(name) for name, weight in opened.model.named_parameters() if weight.requires_grad}
    return 1.0 if "vision" in trained else 1 / 3
