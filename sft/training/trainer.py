"""The training loop: TRL's trainer, of which only methods that transformers.Trainer has too are overridden.

It knows neither datasets nor a model family: it gets a model whose `forward(batch=…)` returns a `PackedOutput`, a
stream of micro-batches, and a function that writes a checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.optimizer import Optimizer
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from sft.core.distributed import ALONE, Rank, any_process
from sft.core.precision import choose_precision, device
from sft.core.sample import NO_SOURCE, Batch
from sft.models.family import Weights
from sft.models.loss import trained_positions
from sft.models.packed_model import PackedModel
from sft.recipe import EngineName, TrainingConfig
from sft.training.callbacks import CheckGradients, TrainingEvents
from sft.training.engines import get_engine
from sft.training.engines.resume_state import Progress, Spent, read_progress, write_progress
from sft.training.metrics import Line, Log, StepMetrics
from sft.training.optimizer import kept_settings, make_optimizer, parameter_groups, resume_schedule, schedule
from sft.training.write_metrics import WriteMetrics


@dataclass(frozen=True, kw_only=True)
class TrainerParts:
    """The parts that a trainer is made of."""

    model: PackedModel
    tokenizer: PreTrainedTokenizerBase
    settings: TrainingConfig
    weights: Weights
    """The family's, which names the group of a parameter."""
    seed: int
    micro_batches: Iterable[dict[str, Batch]]
    micro_batches_per_step: int
    """Micro-batches of this rank in a step."""
    micro_batches_of_all: int | None = None
    """Micro-batches of all ranks in a step that have packs. None: this is the only rank."""
    complete: Callable[[Batch], Batch] = lambda batch: batch
    """Completes a batch on the device before the model gets it."""
    source_names: Sequence[str]
    run_dir: Path
    checkpoint_every: int
    write_checkpoint: Callable[[], None] = lambda: None
    data_state: Callable[[int], dict[str, Any]] = lambda step: {}
    """Returns where `micro_batches` stand after a step, as JSON."""
    resume_from: Path | None = None
    """The `state/` of a checkpoint to resume from; `micro_batches` stand at its place in the data already."""
    on_step: Callable[[int, Line], None] = lambda step, line: None
    """Gets every line of metrics.jsonl."""
    log: Log = lambda line: None
    should_stop: Callable[[], bool] = lambda: False
    validate: Callable[[PackedModel, int], Line] = lambda model, step: {}
    """Returns a part of the line of a step; for step 0, before the first, the content of before.json."""
    callbacks: Sequence[TrainerCallback] = ()
    rank: Rank = ALONE
    engine: EngineName = "ddp"


class MicroBatchesOfStep:
    """The micro-batches of a step one by one: all at once they are gigabytes of pixels.

    Their number, which transformers asks for first, is 0 after the last step."""

    def __init__(self, micro_batches: Iterator[dict[str, Batch]], number: int) -> None:
        self._first = [*islice(micro_batches, 1)]
        self._others = islice(micro_batches, number - 1)
        self._number = number if self._first else 0

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        while self._first:
            yield self._first.pop()
        yield from self._others


class Trainer(SFTTrainer):  # type: ignore[misc]  # trl is not typed
    """Supervised fine-tuning over a stream of packed micro-batches."""

    def __init__(self, parts: TrainerParts) -> None:
        self.parts, self.settings, self.rank = parts, parts.settings, parts.rank
        self.engine = get_engine(parts.engine)
        self.precision = choose_precision(parts.settings.precision, device())
        self.step_metrics = StepMetrics(parts.source_names)
        self.nonfinite_steps = 0  # the number of last steps in a row that were not finite
        self.optimizer: Optimizer | None = None
        self.lr_scheduler: LRScheduler | None = None
        trained = [(parameter, parameter.data) for parameter in parts.model.parameters() if parameter.requires_grad]
        super().__init__(
            model=parts.model,
            args=self._arguments(),
            # SFTTrainer wants a `datasets` object; the data loader is ours, so the numbers of the steps do.
            train_dataset=datasets.Dataset.from_dict({"input_ids": [[n] for n in range(self.settings.steps)]}),
            data_collator=lambda batch: batch,
            processing_class=parts.tokenizer,
            # Gradients are checked before the missing ones are made; metrics begin after resuming.
            callbacks=[*parts.callbacks, CheckGradients(self), TrainingEvents(self), WriteMetrics(self)],
        )
        for parameter, data in trained:
            # SFTTrainer rounds what is trained of a quantised model to bfloat16, in which small updates are lost.
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        # The loss is a part of the step's mean already; transformers would divide it by the number of micro-batches.
        self.loss_is_scaled_for_ga = True
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)

    def _arguments(self) -> SFTConfig:
        parts, settings = self.parts, self.settings
        return SFTConfig(
            output_dir=str(parts.run_dir),
            max_steps=settings.steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=parts.micro_batches_per_step,
            learning_rate=settings.learning_rate,
            max_grad_norm=settings.clip,
            bf16=self.precision == "bfloat16",
            fp16=self.precision == "float16",
            activation_checkpointing=bool(settings.gradient_checkpointing),
            activation_checkpointing_kwargs={"use_reentrant": False},  # the reentrant kind loses gradients of the tower
            logging_steps=1,
            logging_nan_inf_filter=False,  # it would log 0.0 in place of a loss that is not a number
            save_strategy="steps",
            save_steps=parts.checkpoint_every,
            seed=parts.seed,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            accelerator_config={"dispatch_batches": False, "split_batches": False},
            **self.engine.arguments(clip=settings.clip, precision=self.precision, convert=self._converts()),
        )

    def get_train_dataloader(self) -> DataLoader[dict[str, Batch]]:
        """Return the micro-batches as they come; the planner has drawn, cut and sharded already."""
        micro_batches: Any = self.parts.micro_batches
        return DataLoader(micro_batches, batch_size=None)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Batch]], num_batches: int, device: torch.device
    ) -> tuple[MicroBatchesOfStep, None]:
        """Return the micro-batches of a step. Each knows the step's number of trained tokens."""
        return MicroBatchesOfStep(self._timed(epoch_iterator), num_batches), None

    def _timed(self, micro_batches: Iterator[dict[str, Batch]]) -> Iterator[dict[str, Batch]]:
        """Yield the same micro-batches; the time until each is there is waiting."""
        started = time.perf_counter()
        for micro_batch in micro_batches:
            self.step_metrics.waited += time.perf_counter() - started
            yield micro_batch
            started = time.perf_counter()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Batch], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this micro-batch's part of the step's mean loss, times the number of ranks: engines take the mean of
        the ranks' gradients, and the sum is wanted."""
        batch = self.parts.complete(self._normalised(inputs["batch"]).to(self.args.device))
        self._seed_micro_step()
        with self.compute_loss_context_manager():
            output = model(batch=batch, z_loss=self.settings.z_loss)
        self.step_metrics.add(batch, output.token_losses_P, output.source_ids_P)
        loss = output.loss * self.rank.of
        return (loss, output) if return_outputs else loss

    def _normalised(self, batch: Batch) -> Batch:
        """Return the batch with the number that its summed loss is divided by: the trained tokens of the step, as the
        planner counted them, or under `micro_batch_mean` its own times the number of micro-batches on all ranks."""
        if self.settings.normalisation == "token_mean":
            return batch
        own = int((batch.source_ids_T[trained_positions(batch.labels_T) + 1] != NO_SOURCE).sum())
        micro_batches = self.parts.micro_batches_of_all or self.parts.micro_batches_per_step
        return replace(batch, num_trained_tokens=max(own, 1) * micro_batches)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Make the recipe's optimizer over groups of parameters."""
        if self.optimizer is None:
            groups = parameter_groups(self.model, self.settings, self.parts.weights)
            is_scaled = self.precision == "float16"
            self.optimizer = make_optimizer(groups, self.settings, self.model, is_scaled=is_scaled)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Make the linear warm-up and decay."""
        if self.lr_scheduler is None:
            self.lr_scheduler = schedule(optimizer or self.create_optimizer(), self.settings)
        return self.lr_scheduler

    @property
    def overflowed(self) -> bool:
        """Whether the last step was left out because a float16 gradient overflowed; the scaler then scales less."""
        return self.precision == "float16" and bool(self.accelerator.optimizer_step_was_skipped)

    def _seed_micro_step(self) -> None:
        """Seed torch by seed, step, micro-step and rank, so that a resumed run draws the same random numbers."""
        micro_step = len(self.step_metrics.keys)
        entropy = [self.parts.seed, self.state.global_step, micro_step, self.rank.number]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip the gradient and return its norm. Where the gradient or the loss of any rank is not finite, all ranks
        drop the gradient, so that the step changes nothing. Under float16 the scaler does that."""
        norm = self.engine.gradient_norm(self, super()._clip_grad_norm(model))
        is_scaled = self.precision == "float16"
        loss_is_finite = not any_process(not self.step_metrics.has_finite_loss)
        is_finite = loss_is_finite and (is_scaled or math.isfinite(float(norm)))
        self.nonfinite_steps = 0 if is_finite else self.nonfinite_steps + 1
        if not is_finite and not is_scaled:
            for parameter in model.parameters():
                parameter.grad = None
        return norm

    @property
    def unwrapped(self) -> PackedModel:
        """The model itself, of which this process may hold only a shard."""
        model: PackedModel = self.accelerator.unwrap_model(self.model)
        return model

    @property
    def bare_optimizer(self) -> Any:
        """The optimizer inside accelerate's wrapper."""
        prepared: Any = self.optimizer
        return prepared.optimizer

    def save_state(self, folder: Path, *, spent: Spent, sources: str) -> None:
        """Write everything that the next step needs, with what the run has spent and the fingerprint of its sources.
        All processes call it."""
        self.engine.save(self, folder)
        if not self.rank.is_main:
            return
        assert self.lr_scheduler is not None
        progress: Progress = {
            "engine": self.parts.engine,
            "processes": self.rank.of,
            "step": self.state.global_step,
            "schedule": self.lr_scheduler.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "data": self.parts.data_state(self.state.global_step),
            "spent": spent,
            "sources": sources,
        }
        write_progress(folder, progress)

    def _converts(self) -> bool:
        """Tell whether the state to resume from was written by another number of processes."""
        folder = self.parts.resume_from
        return folder is not None and read_progress(folder)["processes"] != self.rank.of

    def load_state(self, folder: Path) -> None:
        """Continue after the step of a state, under the settings of the recipe, which may have changed since. The data
        are restored elsewhere (`MicroBatches.restore`)."""
        assert isinstance(self.lr_scheduler, LambdaLR)
        progress = read_progress(folder)
        with kept_settings(self.bare_optimizer):
            self.engine.load(self, folder, progress)
        resume_schedule(self.lr_scheduler, self.bare_optimizer, progress["schedule"])
        if self.accelerator.scaler and progress["scaler"]:
            self.accelerator.scaler.load_state_dict(progress["scaler"])
        self.state.global_step = self._globalstep_last_logged = progress["step"]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.parts.write_checkpoint()
