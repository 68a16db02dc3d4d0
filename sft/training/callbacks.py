"""The trainer's part at the events that transformers calls: the check that training reaches everything that is to be
trained, resuming, stopping, filling in missing gradients."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from sft.core.distributed import all_reduce_sum, any_process
from sft.core.errors import RunError
from sft.models.activation_checkpointing import recompute_share
from sft.training.engines.sharded_state import trained

if TYPE_CHECKING:
    from sft.training.trainer import Trainer


class CheckGradients(TrainerCallback):  # type: ignore[misc]
    """Checks, on the first step that has images, that every trainable tensor gets a gradient and every adapter moves. A
    step of text alone cannot show it: the tower and the resampler are not called. Where the engine removes gradients
    before the optimizer's step, hooks record them when they are computed."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.is_done = False
        self.can_show = False  # whether this step has images in any process
        self.recorded: dict[str, bool] = {}  # whether a gradient that a hook has recorded is more than zeros
        self.hooks: list[RemovableHandle] = []
        self.should_move: list[tuple[str, nn.Parameter]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record gradients that the engine removes."""
        if self.trainer.engine.KEEPS_GRADIENTS:
            return

        def record(name: str, gradient: Tensor) -> None:
            self.recorded[name] = self.recorded.get(name, False) or bool(gradient.any())

        self.hooks = [
            parameter.register_hook(partial(record, name))  # type: ignore[no-untyped-call]
            for name, parameter in trained(self.trainer.model).items()
        ]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that every trainable tensor has a gradient. That of an adapter's A is zero as long as its B is."""
        if self.is_done or self.trainer.nonfinite_steps:
            return
        self.can_show = any_process(self.trainer.step_metrics.has_images)
        if not self.can_show:
            return
        parameters = trained(self.trainer.model)
        without = [name for name, weight in parameters.items() if weight.grad is None and name not in self.recorded]
        if without:
            few = f"{len(without)} of {len(parameters)} trainable tensors got no gradient"
            raise RunError(f"step {state.global_step + 1}: {few}, {without[0]} among them")
        adapters = [(name, parameter) for name, parameter in parameters.items() if ".lora_B." in name]
        has_gradient = self._in_any_process([self._has_gradient(name, parameter) for name, parameter in adapters])
        self.should_move = [adapter for adapter, moves in zip(adapters, has_gradient, strict=True) if moves]
        if adapters and not self.should_move:
            raise RunError(f"step {state.global_step + 1}: the gradient of every adapter is zero")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that every B whose gradient is not zero has moved from zero."""
        if self.is_done or not self.can_show or self.trainer.overflowed or self.trainer.nonfinite_steps:
            return
        own_shard = self.trainer.engine.own_shard
        moved = self._in_any_process([bool(own_shard(parameter).any()) for _, parameter in self.should_move])
        stuck = [name for (name, _), has_moved in zip(self.should_move, moved, strict=True) if not has_moved]
        if stuck:
            few = f"{len(stuck)} adapters have a gradient but did not move"
            raise RunError(f"step {state.global_step + 1}: {few}, {stuck[0]} among them")
        self.is_done = True
        self.should_move = []
        for hook in self.hooks:
            hook.remove()

    def _has_gradient(self, name: str, parameter: nn.Parameter) -> bool:
        if parameter.grad is None:
            return self.recorded[name]
        return bool(self.trainer.engine.own_shard(parameter.grad).any())

    def _in_any_process(self, own: list[bool]) -> list[bool]:
        """Combine what the processes found: each has a shard of every tensor, or has recorded gradients of its own."""
        return [count > 0 for count in all_reduce_sum(torch.tensor(own, dtype=torch.float32)).tolist()]


class TrainingEvents(TrainerCallback):  # type: ignore[misc]
    """Checks the model that libraries have prepared, resumes, stops on request, and makes missing gradients zeros."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the model and resume. By now transformers has made optimizer and schedule, and has turned activation
        checkpointing on in all layers or in none: it stays on in the share of them that the recipe names."""
        trainer = self.trainer
        trainer.engine.check_prepared(trainer.model)
        if folder := trainer.parts.resume_from:
            trainer.load_state(folder)
        recompute_share(trainer.model, trainer.settings.gradient_checkpointing)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make missing gradients zeros, so that a step is the same on one device and on several. A step of text alone
        gives the tower no gradient on one device, but zeros on several, where a black image stands in. AdamW skips a
        tensor without gradient; by a gradient of zeros it decays it and moves it by its momentum."""
        if self.trainer.nonfinite_steps or not self.trainer.engine.KEEPS_GRADIENTS:
            return  # the step is to change nothing, or the engine keeps the gradients
        for parameter in self.trainer.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have transformers save and stop, if that is wanted."""
        if self.trainer.parts.should_stop():
            control.should_save = control.should_training_stop = True
