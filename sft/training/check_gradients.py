"""The check that training reaches everything that is to be trained, on the first step that can show it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from sft.core.distributed import all_reduce_sum, any_process
from sft.core.errors import RunError
from sft.training.engines.sharded_state import trained

if TYPE_CHECKING:
    from sft.training.trainer import Trainer


class CheckGradients(TrainerCallback):  # type: ignore[misc]
    """Checks, on the first step that has images, that every trainable tensor gets a gradient and every adapter moves.

    A step of text alone cannot show it: the tower and the resampler are not called. Where the engine removes gradients
    before the optimizer's step, hooks record them when they are computed.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.is_done = False
        self.can_show = False
        """Whether this step has images in any process."""
        self.recorded: dict[str, bool] = {}
        """Whether a gradient that a hook has recorded is more than zeros."""
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
        without = [
            name for name, parameter in parameters.items() if parameter.grad is None and name not in self.recorded
        ]
        if without:
            raise RunError(
                f"step {state.global_step + 1}: {len(without)} of {len(parameters)} trainable tensors got no gradient, "
                f"{without[0]} among them"
            )
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
            raise RunError(
                f"step {state.global_step + 1}: {len(stuck)} adapters have a gradient but did not move, "
                f"{stuck[0]} among them"
            )
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
