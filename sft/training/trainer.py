"""The training loop: TRL's trainer, of which only what transformers.Trainer has too is overridden.

It knows neither datasets nor a model family: it gets a model whose `forward(batch=…)` returns a `PackedOutput`, a
stream of micro-batches, and a function that writes a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from sft.core.distributed import ALONE, Rank, any_process
from sft.core.precision import choose_precision, device
from sft.core.sample import NO_SOURCE, Batch
from sft.models.loss import trained_positions
from sft.recipe import Engine, TrainingConfig
from sft.training.callbacks import CheckGradients, FillGradients, RecomputeShare, Resume, Stop, WriteMetrics
from sft.training.engines import Writers, get_engine
from sft.training.engines.resume_state import read_progress, write_progress
from sft.training.metrics import StepMetrics
from sft.training.optimizer import make_optimizer, parameter_groups, schedule


class MicroBatchesOfStep:
    """The micro-batches of a step one by one: all at once are gigabytes of pixels. Transformers asks for their number
    beforehand; there are none after the last step."""

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

    def __init__(
        self,
        model: nn.Module,
        *,
        group_of: Callable[[str], str],
        tokenizer: PreTrainedTokenizerBase,
        micro_batches: IterableDataset[dict[str, Batch]],
        micro_batches_per_step: int,
        data_state: Callable[[int], dict[str, Any]],
        settings: TrainingConfig,
        checkpoint_every: int,
        write_checkpoint: Callable[[Trainer], None],
        run_dir: Path,
        seed: int,
        source_names: Sequence[str],
        on_step: Callable[[int, dict[str, Any]], None],
        say: Callable[[str], None] = lambda line: None,
        should_stop: Callable[[], bool] = lambda: False,
        resume_from: Path | None = None,
        complete: Callable[[Batch], Batch] = lambda batch: batch,
        validate: Callable[[nn.Module, int], dict[str, Any]] = lambda model, step: {},
        callbacks: Sequence[TrainerCallback] = (),
        rank: Rank = ALONE,
        engine: Engine = "ddp",
        micro_batches_of_all: int | None = None,
    ) -> None:
        """`micro_batches_per_step`: of this rank. `micro_batches_of_all`: those of all ranks that have packs.
        `data_state` tells where `micro_batches` stand after a step. `write_checkpoint` is called with this trainer;
        `resume_from` is the `state/` of a checkpoint, whose place in the data `micro_batches` stand at already.
        `complete` is what a batch goes through on the device before the model gets it.
        `validate` is called after every step, and what it returns is a part of the step's line of metrics.jsonl; and
        before the first, as step 0, for before.json."""
        self.validate = validate
        self.complete = complete
        self.rank = rank
        self.engine_name: Engine = engine
        self.engine = get_engine(engine)
        self.micro_batches_of_all = micro_batches_of_all or micro_batches_per_step
        self.optimizer: torch.optim.Optimizer | None = None
        self.lr_scheduler: Any = None
        self.group_of = group_of
        self.micro_batches = micro_batches
        self.micro_batches_per_step = micro_batches_per_step
        self.settings = settings
        self.data_state = data_state
        self.write_checkpoint = write_checkpoint
        self.seed = seed
        self.resume_from = resume_from
        self.nonfinite_steps = 0
        """In a row, up to now."""
        self.step_metrics = StepMetrics(source_names)
        self.precision = choose_precision(settings.precision, device())
        arguments = SFTConfig(
            output_dir=str(run_dir),
            max_steps=settings.max_steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=micro_batches_per_step,
            learning_rate=settings.learning_rate,
            max_grad_norm=settings.clip,
            bf16=self.precision == "bfloat16",
            fp16=self.precision == "float16",
            activation_checkpointing=bool(settings.gradient_checkpointing),
            activation_checkpointing_kwargs={"use_reentrant": False},  # the reentrant kind loses gradients of the tower
            logging_steps=1,
            logging_nan_inf_filter=False,  # it would log 0.0 in place of a loss that is not a number
            save_strategy="steps",
            save_steps=checkpoint_every,
            seed=seed,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            accelerator_config={"dispatch_batches": False, "split_batches": False},
            **self.engine.arguments(clip=settings.clip, precision=self.precision, convert=self._converts()),
        )
        # SFTTrainer wants a `datasets` object; the data loader is ours, so the numbers of the steps do.
        numbers = datasets.Dataset.from_dict({"input_ids": [[step] for step in range(settings.max_steps)]})
        trained = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=numbers,
            data_collator=lambda batch: batch,
            processing_class=tokenizer,
            callbacks=[
                *callbacks,
                Resume(self),
                RecomputeShare(self),
                WriteMetrics(self, run_dir, on_step, say),
                CheckGradients(self),
                FillGradients(self),
                Stop(should_stop),
            ],
        )
        for parameter, data in trained:
            # SFTTrainer rounds what is trained of a quantised model to bfloat16, in which small updates are lost.
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        # The loss is a part of the step's mean already; transformers would divide it by the number of micro-batches.
        self.loss_is_scaled_for_ga = True
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)

    def get_train_dataloader(self) -> DataLoader[dict[str, Batch]]:
        """Micro-batches as they come; nothing is drawn, cut or sharded behind the planner's back."""
        return DataLoader(self.micro_batches, batch_size=None)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Batch]], num_batches: int, device: torch.device
    ) -> tuple[MicroBatchesOfStep, None]:
        """The micro-batches of a step. Each knows the step's number of trained tokens, so nothing is counted here."""
        return MicroBatchesOfStep(epoch_iterator, num_batches), None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Batch], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's part of the step's mean loss, as often as there are ranks: engines take the mean of the
        ranks' gradients, and what is wanted is their sum."""
        batch = self.complete(self._normalised(inputs["batch"]).to(self.args.device))
        self._seed_micro_step()
        with self.compute_loss_context_manager():
            output = model(batch=batch, z_loss=self.settings.z_loss)
        self.step_metrics.add(batch, output.token_losses_P, output.source_ids_P)
        loss = output.loss * self.rank.of
        return (loss, output) if return_outputs else loss

    def _normalised(self, batch: Batch) -> Batch:
        """The batch with what its summed loss is divided by: the trained tokens of the step, as the planner counted
        them, or under `micro_batch_mean` its own times the number of micro-batches on all ranks."""
        if self.settings.normalisation == "token_mean":
            return batch
        own = int((batch.source_ids_T[trained_positions(batch.labels_T) + 1] != NO_SOURCE).sum())
        return replace(batch, num_trained_tokens=max(own, 1) * self.micro_batches_of_all)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The recipe's optimizer over groups of parameters."""
        if self.optimizer is None:
            groups = parameter_groups(self.model, self.settings, self.group_of)
            scaled = self.precision == "float16"
            self.optimizer = make_optimizer(groups, self.settings, self.model, scaled=scaled)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Linear warm-up and decay."""
        if self.lr_scheduler is None:
            self.lr_scheduler = schedule(optimizer or self.create_optimizer(), self.settings)
        return self.lr_scheduler

    @property
    def overflowed(self) -> bool:
        """Whether the last step was left out because a float16 gradient was too large; the scaler then scales less."""
        return self.precision == "float16" and bool(self.accelerator.optimizer_step_was_skipped)

    def _seed_micro_step(self) -> None:
        """Random numbers (of dropout) are a function of seed, step and micro-step: a resumed run has the same."""
        micro_step = len(self.step_metrics.keys)
        entropy = [self.seed, self.state.global_step, micro_step, self.rank.number]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """The norm of the gradient, which is clipped; one that is not finite is thrown away, and so is that of a loss
        that is not, on all ranks, so that the step changes nothing. Under float16 the scaler does that."""
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
    def unwrapped(self) -> nn.Module:
        """The model, of which this process may have but a share."""
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    @property
    def bare_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without what accelerate puts around it."""
        prepared: Any = self.optimizer
        optimizer: torch.optim.Optimizer = prepared.optimizer
        return optimizer

    def save_state(self, folder: Path, more: dict[str, Any]) -> None:
        """Write what the next step needs, and `more` for whoever restores the rest. All processes call it."""
        self.engine.save(self, folder)
        if not self.rank.is_main:
            return
        progress = {
            "engine": self.engine_name,
            "processes": self.rank.of,
            "step": self.state.global_step,
            "schedule": self.lr_scheduler.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "data": self.data_state(self.state.global_step),
            **more,
        }
        write_progress(folder, progress)

    def _converts(self) -> bool:
        """Whether the state to go on from is of another number of processes."""
        return self.resume_from is not None and Writers.of(read_progress(self.resume_from)).processes != self.rank.of

    def load_state(self, folder: Path) -> None:
        """Go on after the step of a state. The data have their own (`MicroBatches.restore`)."""
        progress = read_progress(folder)
        self.engine.load(self, folder, Writers.of(progress))
        self.lr_scheduler.load_state_dict(progress["schedule"])
        for group, rate in zip(self.bare_optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        if self.accelerator.scaler and progress["scaler"]:
            self.accelerator.scaler.load_state_dict(progress["scaler"])
        self.state.global_step = self._globalstep_last_logged = progress["step"]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.write_checkpoint(self)
