"""What the trainer does besides training, at the events that transformers calls."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from sft.core.distributed import Rank, all_gather, all_reduce_sum, any_process
from sft.core.errors import RunError
from sft.core.files import write_atomically
from sft.models.activation_checkpointing import recompute_share
from sft.recipe import TrainingConfig
from sft.training.engines import EngineModule
from sft.training.loss_spikes import WINDOW, Spike, Spikes
from sft.training.metrics import (
    BEFORE,
    METRICS,
    NONFINITE,
    SPIKES,
    PackLoss,
    StepMetrics,
    append_line,
    finite,
    lines_upto,
    peak_memory_bytes,
)

WORST_PACKS, NAMED_SAMPLES = 4, 5
"""Packs of a step that spikes.jsonl lists, and samples of the first of them that are named."""


class Training(Protocol):
    """What callbacks see of the trainer (`sft.training.trainer.Trainer`)."""

    model: nn.Module
    rank: Rank
    engine: EngineModule
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
        self.trainer.engine.check_prepared(self.trainer.model)
        if self.trainer.resume_from:
            self.trainer.load_state(self.trainer.resume_from)


class RecomputeShare(TrainerCallback):  # type: ignore[misc]
    """Transformers has enabled activation checkpointing in all layers by now, or in none."""

    def __init__(self, trainer: Training) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave it on where the recipe wants it."""
        recompute_share(self.trainer.model, self.trainer.settings.gradient_checkpointing)


class Stop(TrainerCallback):  # type: ignore[misc]
    """Stops after a step, with a checkpoint, when asked to."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self.should_stop = should_stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask."""
        if self.should_stop():
            control.should_save = control.should_training_stop = True


class WriteMetrics(TrainerCallback):  # type: ignore[misc]
    """A line of metrics.jsonl a step. Losses that jump are named with their packs; when too many steps in a row are not
    finite, the run ends."""

    def __init__(
        self,
        trainer: Training,
        run_dir: Path,
        on_step: Callable[[int, dict[str, Any]], None],
        say: Callable[[str], None],
    ) -> None:
        self.trainer = trainer
        self.file = run_dir / METRICS
        self.on_step = on_step
        self.say = say
        self.spikes = Spikes(trainer.step_metrics.names)
        self.last_was_spike = False
        self.last = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock; lines of steps that come again go, and the last of the others say what is usual. What is
        validated is so before the first step, too."""
        kept = lines_upto(self.file, state.global_step)
        for line in kept[-WINDOW - 1 :]:
            self.last_was_spike = self.spikes.add(json.loads(line)) is not None
        if self.trainer.rank.is_main:
            write_atomically(self.file, "".join(kept))
            for file in map(self.file.with_name, (NONFINITE, SPIKES)):
                if file.is_file():
                    write_atomically(file, "".join(lines_upto(file, state.global_step)))
        before = self.trainer.validate(self.trainer.model, 0) if self.trainer.resume_from is None else {}
        if before and self.trainer.rank.is_main:
            write_atomically(self.file.with_name(BEFORE), json.dumps(finite(before), allow_nan=False) + "\n")
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
        keys, packs = metrics.keys, metrics.packs
        metrics.reset()
        line |= self.trainer.validate(self.trainer.model, state.global_step)
        self.last = time.perf_counter()
        if self.trainer.rank.is_main:
            append_line(self.file, finite(line))
        if self.trainer.nonfinite_steps:
            self._not_finite(line, keys)
        self._name_spike(line, packs)
        self.on_step(state.global_step, finite(line))

    def _name_spike(self, line: dict[str, Any], packs: list[PackLoss]) -> None:
        """Every process sees the same loss, and has packs of its own."""
        spike, is_first = self.spikes.add(line), not self.last_was_spike
        self.last_was_spike = any_process(spike is not None)
        if not self.last_was_spike:
            return
        number = self.trainer.rank.number
        found = all_gather([(pack, number) for pack in packs])
        if not self.trainer.rank.is_main or spike is None:
            return
        found.sort(key=lambda pair: spike.expected * pair[0].trained_tokens - pair[0].loss_sum)
        worst = [
            {
                "rank": of,
                "loss": pack.loss_sum / max(pack.trained_tokens, 1),
                "trained_tokens": pack.trained_tokens,
                "samples": pack.keys,
            }
            for pack, of in found[:WORST_PACKS]
        ]
        append_line(self.file.with_name(SPIKES), {"step": line["step"], **spike._asdict(), "packs": worst})
        if is_first:  # of steps in a row, the others are in the file alone
            self.say(_told(line["step"], spike, worst))

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


def _told(step: int, spike: Spike, worst: list[dict[str, Any]]) -> str:
    """On one line."""
    keys = worst[0]["samples"]
    samples = ", ".join(keys[:NAMED_SAMPLES]) + f" and {len(keys) - NAMED_SAMPLES} more" * (len(keys) > NAMED_SAMPLES)
    return (
        f"step {step}: loss {spike.loss:.3f}, where {spike.expected:.3f} ± {spike.spread:.3f} is usual; first of all "
        f"by a pack with loss {worst[0]['loss']:.3f}: {samples} ({SPIKES} lists more)"
    )


class CheckGradients(TrainerCallback):  # type: ignore[misc]
    """On the first step that has images: everything that is to be trained gets a gradient and, of adapters, moves.

    A step of text alone cannot tell: the tower and the resampler are not called. Where the engine takes gradients away
    before the optimizer's step, they are seen as they come by.
    """

    def __init__(self, trainer: Training) -> None:
        self.trainer = trainer
        self.checked = False
        self.looks = False
        """Whether this step can tell, by what all processes say."""
        self.came_by: dict[str, bool] = {}
        """Whether a gradient that was seen is more than zeros."""
        self.hooks: list[Any] = []
        self.should_move: list[tuple[str, nn.Parameter]] = []

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.trainer.model.named_parameters() if p.requires_grad]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch for gradients that the engine takes away."""
        if self.trainer.engine.KEEPS_GRADIENTS:
            return

        def see(name: str, gradient: Tensor) -> None:
            self.came_by[name] = self.came_by.get(name, False) or bool(gradient.any())

        self.hooks = [
            parameter.register_hook(partial(see, name))  # type: ignore[no-untyped-call]
            for name, parameter in self._trained()
        ]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Every trainable tensor has a gradient. An adapter's B starts at zero, its A then has none but zeros."""
        if self.checked or self.trainer.nonfinite_steps:
            return
        self.looks = any_process(self.trainer.step_metrics.has_images)
        if not self.looks:
            return
        trained = self._trained()
        without = [name for name, parameter in trained if parameter.grad is None and name not in self.came_by]
        if without:
            raise RunError(
                f"step {state.global_step + 1}: {len(without)} of {len(trained)} trainable tensors got no gradient, "
                f"{without[0]} among them"
            )
        adapters = [(name, parameter) for name, parameter in trained if ".lora_B." in name]
        has_gradient = self._in_any_process([self._has_gradient(name, parameter) for name, parameter in adapters])
        self.should_move = [adapter for adapter, moves in zip(adapters, has_gradient, strict=True) if moves]
        if adapters and not self.should_move:
            raise RunError(f"step {state.global_step + 1}: the gradient of every adapter is zero")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Every B whose gradient is not zero has moved from zero."""
        if self.checked or not self.looks or self.trainer.overflowed or self.trainer.nonfinite_steps:
            return
        own_part = self.trainer.engine.own_part
        moved = self._in_any_process([bool(own_part(parameter).any()) for _, parameter in self.should_move])
        stuck = [name for (name, _), has_moved in zip(self.should_move, moved, strict=True) if not has_moved]
        if stuck:
            raise RunError(
                f"step {state.global_step + 1}: {len(stuck)} adapters have a gradient but did not move, "
                f"{stuck[0]} among them"
            )
        self.checked = True
        self.should_move = []
        for hook in self.hooks:
            hook.remove()

    def _has_gradient(self, name: str, parameter: nn.Parameter) -> bool:
        if parameter.grad is None:
            return self.came_by[name]
        return bool(self.trainer.engine.own_part(parameter.grad).any())

    def _in_any_process(self, own: list[bool]) -> list[bool]:
        """Each process has a share of every tensor, or has seen a gradient of its own."""
        return [count > 0 for count in all_reduce_sum(torch.tensor(own, dtype=torch.float32)).tolist()]


class FillGradients(TrainerCallback):  # type: ignore[misc]
    """A step of text alone gives the tower no gradient on one device, and zeros on several, where a black image stands
    in. AdamW leaves out the one and decays and moves on with the other, so both are zeros."""

    def __init__(self, trainer: Training) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After `CheckGradients` looked."""
        if self.trainer.nonfinite_steps or not self.trainer.engine.KEEPS_GRADIENTS:
            return  # they are to change nothing, or are the engine's
        for parameter in self.trainer.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
