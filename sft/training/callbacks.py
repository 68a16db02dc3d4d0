"""What the trainer does at the events that transformers calls: resuming, stopping, filling in missing gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback

from sft.core.distributed import Rank
from sft.models.activation_checkpointing import recompute_share
from sft.models.packed_model import PackedModel
from sft.recipe import TrainingConfig
from sft.training.engines import EngineModule
from sft.training.metrics import Line, StepMetrics


class Parts(Protocol):
    """The parts of a trainer that callbacks use (`sft.training.trainer.TrainerParts`)."""

    @property
    def resume_from(self) -> Path | None:
        """The `state/` to resume from."""

    @property
    def validate(self) -> Callable[[PackedModel, int], Line]:
        """Returns a part of the line of a step."""


class Training(Protocol):
    """What callbacks see of the trainer (`sft.training.trainer.Trainer`)."""

    model: PackedModel
    rank: Rank
    engine: EngineModule
    settings: TrainingConfig
    step_metrics: StepMetrics
    nonfinite_steps: int

    @property
    def parts(self) -> Parts:
        """What the trainer is made of."""

    @property
    def overflowed(self) -> bool:
        """Whether the step was left out for a float16 gradient that overflowed."""

    def load_state(self, folder: Path) -> None:
        """Continue after the step of a state."""


class Resume(TrainerCallback):  # type: ignore[misc]
    """Begins where a state was saved."""

    def __init__(self, trainer: Training) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the state, now that transformers has made optimizer and schedule."""
        self.trainer.engine.check_prepared(self.trainer.model)
        if folder := self.trainer.parts.resume_from:
            self.trainer.load_state(folder)


class RecomputeShare(TrainerCallback):  # type: ignore[misc]
    """Leaves activation checkpointing on in the share of the layers that the recipe names."""

    def __init__(self, trainer: Training) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Turn it off in the other layers: by now transformers has turned it on in all of them, or in none."""
        recompute_share(self.trainer.model, self.trainer.settings.gradient_checkpointing)


class Stop(TrainerCallback):  # type: ignore[misc]
    """Stops after a step, with a checkpoint, when asked to."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self.should_stop = should_stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have transformers save and stop, if that is wanted."""
        if self.should_stop():
            control.should_save = control.should_training_stop = True


class FillGradients(TrainerCallback):  # type: ignore[misc]
    """Makes missing gradients zeros, so that a step is the same on one device and on several.

    A step of text alone gives the tower no gradient on one device, but zeros on several, where a black image stands in.
    AdamW skips a tensor without gradient; by a gradient of zeros it decays it and moves it by its momentum.
    """

    def __init__(self, trainer: Training) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fill them after `CheckGradients` has checked."""
        if self.trainer.nonfinite_steps or not self.trainer.engine.KEEPS_GRADIENTS:
            return  # the step is to change nothing, or the engine keeps the gradients
        for parameter in self.trainer.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
