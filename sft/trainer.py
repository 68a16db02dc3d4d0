"""The training loop: TRL's trainer, of which only what transformers.Trainer has too is overridden.

It knows neither datasets nor a model family: it gets a model whose `forward(batch=…)` returns a `PackedOutput`, a
stream of micro-batches, and a function that writes a checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from sft.distributed import ALONE, Rank, engine_arguments, summed
from sft.errors import RunError
from sft.files import write_atomically
from sft.loss import trained_positions
from sft.optim import make_optimizer, parameter_groups, schedule
from sft.precision import choose_precision, device
from sft.recipe import Engine, TrainingConfig
from sft.sample import NO_SOURCE, Batch
from sft.training_state import load_state, read_progress, save_state

METRICS, NONFINITE = "metrics.jsonl", "nonfinite.jsonl"


class StepMetrics:
    """Sums of the running optimizer step on this rank, by source."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.reset()

    def reset(self) -> None:
        """Begin a step."""
        self.tokens = torch.zeros(len(self.names))
        self.trained_tokens = torch.zeros(len(self.names))
        self.loss_sums = torch.zeros(len(self.names))
        self.dirty_samples = 0
        self.has_images = False
        self.keys: list[tuple[str, ...]] = []
        """The samples of each micro-batch."""

    def add(self, batch: Batch, losses_P: Tensor, sources_P: Tensor) -> None:
        """Count a micro-batch."""
        num = len(self.names)
        self.keys.append(batch.keys)
        sources_T, is_real_P = batch.source_ids_T, sources_P != NO_SOURCE
        self.has_images |= bool((batch.image_ids_T[sources_T != NO_SOURCE] >= 0).any())
        sources_P, losses_P = sources_P[is_real_P], losses_P[is_real_P]
        self.tokens += torch.bincount(sources_T[sources_T != NO_SOURCE], minlength=num).cpu()
        self.trained_tokens += torch.bincount(sources_P, minlength=num).cpu()
        self.dirty_samples += len(batch.dirty)
        self.loss_sums += torch.bincount(sources_P, weights=losses_P, minlength=num).cpu()

    def line(self) -> dict[str, Any]:
        """The step's part of a line of metrics.jsonl: of all ranks, each of which asks for it."""
        sums = torch.cat(
            [self.loss_sums, self.tokens, self.trained_tokens, torch.tensor([float(self.dirty_samples)])]
        ).double()
        sums = summed(sums)
        loss_sums, all_tokens, all_trained_tokens = sums[:-1].view(3, -1)
        sources = {
            name: {
                "loss": float(loss / trained) if trained else None,
                "tokens": int(tokens),
                "trained_tokens": int(trained),
            }
            for name, loss, tokens, trained in zip(self.names, loss_sums, all_tokens, all_trained_tokens, strict=True)
        }
        total = all_trained_tokens.sum()
        return {
            "loss": float(loss_sums.sum() / total.clamp(min=1)),  # none are left where every sample is dirty
            "tokens": int(all_tokens.sum()),
            "trained_tokens": int(total),
            "dirty_samples": int(sums[-1]),
            "sources": sources,
        }


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
        should_stop: Callable[[], bool] = lambda: False,
        resume_from: Path | None = None,
        validate: Callable[[nn.Module, int], dict[str, Any]] = lambda model, step: {},
        callbacks: Sequence[TrainerCallback] = (),
        rank: Rank = ALONE,
        engine: Engine = "ddp",
        micro_batches_of_all: int | None = None,
    ) -> None:
        """`micro_batches_per_step`: of this rank. `micro_batches_of_all`: those of all ranks that have packs.
        `data_state` tells where `micro_batches` stand after a step. `write_checkpoint` is called with this trainer;
        `resume_from` is the `state/` of a checkpoint, whose place in the data `micro_batches` stand at already.
        `validate` is called after every step, and what it returns is a part of the step's line of metrics.jsonl."""
        self.validate = validate
        self.rank = rank
        self.engine = engine
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
            activation_checkpointing=settings.gradient_checkpointing,
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
            **engine_arguments(engine, clip=settings.clip, precision=self.precision),
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
                _Resume(self),
                _WriteMetrics(self, run_dir, on_step),
                _CheckGradients(self),
                _FillGradients(self),
                _Stop(should_stop),
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
        batch = self._normalised(inputs["batch"]).to(self.args.device)
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
        return bool(self.accelerator.optimizer_step_was_skipped)

    def _seed_micro_step(self) -> None:
        """Random numbers (of dropout) are a function of seed, step and micro-step: a resumed run has the same."""
        micro_step = len(self.step_metrics.keys)
        entropy = [self.seed, self.state.global_step, micro_step, self.args.process_index]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """The norm of the gradient, which is clipped; one that is not finite is thrown away, so that the step changes
        nothing. Under float16 the scaler does that."""
        norm = super()._clip_grad_norm(model)
        is_finite = math.isfinite(float(norm)) or self.precision == "float16"
        self.nonfinite_steps = 0 if is_finite else self.nonfinite_steps + 1
        if not is_finite:
            for parameter in model.parameters():
                parameter.grad = None
        return norm

    def save_state(self, folder: Path, more: dict[str, Any]) -> None:
        """Write what the next step needs, and `more` for whoever restores the rest."""
        progress = {
            "step": self.state.global_step,
            "schedule": self.lr_scheduler.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "data": self.data_state(self.state.global_step),
            **more,
        }
        save_state(folder, self.accelerator.unwrap_model(self.model), self.optimizer, progress)

    def load_state(self, folder: Path) -> None:
        """Go on after the step of a state. The data have their own (`MicroBatches.restore`)."""
        progress = read_progress(folder)
        load_state(folder, self.accelerator.unwrap_model(self.model), self.optimizer)
        self.lr_scheduler.load_state_dict(progress["schedule"])
        if self.accelerator.scaler and progress["scaler"]:
            self.accelerator.scaler.load_state_dict(progress["scaler"])
        self.state.global_step = self._globalstep_last_logged = progress["step"]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.write_checkpoint(self)


class _Resume(TrainerCallback):  # type: ignore[misc]
    """Begins where a state was saved."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Transformers has made optimizer and schedule by now."""
        if self.trainer.resume_from:
            self.trainer.load_state(self.trainer.resume_from)


class _Stop(TrainerCallback):  # type: ignore[misc]
    """Stops after a step, with a checkpoint, when asked to."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self.should_stop = should_stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask."""
        if self.should_stop():
            control.should_save = control.should_training_stop = True


class _WriteMetrics(TrainerCallback):  # type: ignore[misc]
    """A line of metrics.jsonl a step; stops the run when too many in a row are not finite."""

    def __init__(self, trainer: Trainer, run_dir: Path, on_step: Callable[[int, dict[str, Any]], None]) -> None:
        self.trainer = trainer
        self.file = run_dir / METRICS
        self.on_step = on_step
        self.last = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock; lines of steps that come again go."""
        if self.trainer.rank.is_main:
            lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True) if self.file.is_file() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state.global_step]
            write_atomically(self.file, "".join(kept))
        self.last = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Write the step that just ended.

        Raises:
            RunError: it is the last of too many that are not finite.
        """
        if logs is None or "grad_norm" not in logs:
            return
        now = time.perf_counter()
        metrics = self.trainer.step_metrics
        line = {"step": state.global_step, "time": time.time()} | metrics.line()
        line |= {
            "learning_rate": logs["learning_rate"],
            "grad_norm": None if self.trainer.overflowed else float(logs["grad_norm"]),
            "tokens_per_second": line["tokens"] / (now - self.last),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        keys = metrics.keys
        metrics.reset()
        line |= self.trainer.validate(self.trainer.model, state.global_step)
        self.last = time.perf_counter()
        if self.trainer.rank.is_main:
            _append(self.file, _finite(line))
        if self.trainer.nonfinite_steps:
            self._not_finite(line, keys)
        self.on_step(state.global_step, _finite(line))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Neither writing a checkpoint nor evaluating it is a part of the next step's speed."""
        self.last = time.perf_counter()

    def _not_finite(self, line: dict[str, Any], keys: list[tuple[str, ...]]) -> None:
        file = self.file.with_name(NONFINITE)
        found = {name: str(line[name]) for name in ("loss", "grad_norm")}
        _append(file, {"step": line["step"], "rank": self.trainer.rank.number, **found, "micro_batches": keys})
        in_a_row = self.trainer.nonfinite_steps
        if in_a_row >= self.trainer.settings.max_nonfinite_steps:
            raise RunError(
                f"step {line['step']}: loss {found['loss']}, gradient norm {found['grad_norm']}: not finite, as in "
                f"{in_a_row} steps in a row (training.max_nonfinite_steps); {file} lists their samples"
            )


def _append(file: Path, line: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as opened:
        opened.write(json.dumps(line, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """A line of metrics with null in place of what is not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _CheckGradients(TrainerCallback):  # type: ignore[misc]
    """On the first step that has images: everything that is to be trained gets a gradient and, of adapters, moves.

    A step of text alone cannot tell: the tower and the resampler are not called. Where the engine keeps gradients and
    weights to itself, it is seen whether a gradient comes by, and not whether an adapter moves.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.checked = False
        self.came_by: set[str] = set()
        self.should_move: dict[str, nn.Parameter] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch for gradients that the engine takes away before the optimizer step."""
        if self.trainer.engine == "ddp":
            return
        for name, parameter in self.trainer.model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient, name=name: self.came_by.add(name))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Every trainable tensor has a gradient. An adapter's B starts at zero, its A then has none but zeros."""
        if self.checked or not self.trainer.step_metrics.has_images or self.trainer.nonfinite_steps:
            return
        trained = [(name, p) for name, p in self.trainer.model.named_parameters() if p.requires_grad]
        without = [name for name, parameter in trained if parameter.grad is None and name not in self.came_by]
        if without:
            raise RunError(
                f"step {state.global_step + 1}: {len(without)} of {len(trained)} trainable tensors got no gradient, "
                f"{without[0]} among them"
            )
        self.should_move = {
            name: parameter
            for name, parameter in trained
            if ".lora_B." in name and parameter.grad is not None and parameter.grad.any()
        }
        if self.trainer.engine == "ddp" and not self.should_move and any(".lora_B." in name for name, _ in trained):
            raise RunError(f"step {state.global_step + 1}: the gradient of every adapter is zero")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Every B whose gradient is not zero has moved from zero."""
        skipped = self.trainer.overflowed or self.trainer.nonfinite_steps
        if self.checked or not self.trainer.step_metrics.has_images or skipped:
            return
        stuck = [name for name, parameter in self.should_move.items() if not parameter.any()]
        if stuck:
            raise RunError(
                f"step {state.global_step + 1}: {len(stuck)} adapters have a gradient but did not move, "
                f"{stuck[0]} among them"
            )
        self.checked = True
        self.should_move = {}


class _FillGradients(TrainerCallback):  # type: ignore[misc]
    """A step of text alone gives the tower no gradient on one device, and zeros on several, where a black image stands
    in. AdamW leaves out the one and decays and moves on with the other, so both are zeros."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After `_CheckGradients` looked."""
        if self.trainer.engine != "ddp" or self.trainer.nonfinite_steps:
            return  # gradients are the engine's, or are to change nothing
        for parameter in self.trainer.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def peak_memory_bytes() -> int:
    """Largest memory so far: of the GPU, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
