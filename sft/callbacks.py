"""What the trainer does besides training, at the events that transformers calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import TrainerCallback

from sft.distributed import Rank
from sft.errors import RunError
from sft.metrics import METRICS, NONFINITE, StepMetrics, append_line, cut_after, finite, peak_memory_bytes
from sft.recipe import Engine, TrainingConfig


class Training(Protocol):
    """What callbacks see of the trainer (`sft.trainer.Trainer`)."""

    model: nn.Module
    rank: Rank
    engine: Engine
    settings: TrainingConfig
    step_metrics: StepMetrics
    nonfinite_steps: int
    resume_from: Path | None
    validate: Callable[[nn.Module, int], dict[str, Any]]

    @property
    def overflowed(self) -> bool:
        """Whether the step was left out for a float16 gradient that is too large."""

    def load_state(self, folder: Path) -> None:
        """Go on after the step of a state."""


class Resume(TrainerCallback):  # type: ignore[misc]
    """Begins where a state was saved."""

    def __init__(self, trainer: Training) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Transformers has made optimizer and schedule by now."""
        if self.trainer.resume_from:
            self.trainer.load_state(self.trainer.resume_from)


class Stop(TrainerCallback):  # type: ignore[misc]
    """Stops after a step, with a checkpoint, when asked to."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self.should_stop = should_stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask."""
        if self.should_stop():
            control.should_save = control.should_training_stop = True


class WriteMetrics(TrainerCallback):  # type: ignore[misc]
    """A line of metrics.jsonl a step; stops the run when too many in a row are not finite."""

    def __init__(self, trainer: Training, run_dir: Path, on_step: Callable[[int, dict[str, Any]], None]) -> None:
        self.trainer = trainer
        self.file = run_dir / METRICS
        self.on_step = on_step
        self.last = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock; lines of steps that come again go."""
        if self.trainer.rank.is_main:
            cut_after(self.file, state.global_step)
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
            append_line(self.file, finite(line))
        if self.trainer.nonfinite_steps:
            self._not_finite(line, keys)
        self.on_step(state.global_step, finite(line))

    def _not_finite(self, line: dict[str, Any], keys: list[tuple[str, ...]]) -> None:
        file = self.file.with_name(NONFINITE)
        found = {name: str(line[name]) for name in ("loss", "grad_norm")}
        append_line(file, {"step": line["step"], "rank": self.trainer.rank.number, **found, "micro_batches": keys})
        in_a_row = self.trainer.nonfinite_steps
        if in_a_row >= self.trainer.settings.max_nonfinite_steps:
            raise RunError(
                f"step {line['step']}: loss {found['loss']}, gradient norm {found['grad_norm']}: not finite, as in "
                f"{in_a_row} steps in a row (training.max_nonfinite_steps); {file} lists their samples"
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Neither writing a checkpoint nor evaluating it is a part of the next step's speed."""
        self.last = time.perf_counter()


class CheckGradients(TrainerCallback):  # type: ignore[misc]
    """On the first step that has images: everything that is to be trained gets a gradient and, of adapters, moves.

    A step of text alone cannot tell: the tower and the resampler are not called. Where the engine keeps gradients and
    weights to itself, it is seen whether a gradient comes by, and not whether an adapter moves.
    """

    def __init__(self, trainer: Training) -> None:
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
                parameter.register_hook(lambda gradient, name=name: self.came_by.add(name))  # type: ignore[no-untyped-call]

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


class FillGradients(TrainerCallback):  # type: ignore[misc]
    """A step of text alone gives the tower no gradient on one device, and zeros on several, where a black image stands
    in. AdamW leaves out the one and decays and moves on with the other, so both are zeros."""

    def __init__(self, trainer: Training) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After `CheckGradients` looked."""
        if self.trainer.engine != "ddp" or self.trainer.nonfinite_steps:
            return  # gradients are the engine's, or are to change nothing
        for parameter in self.trainer.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
