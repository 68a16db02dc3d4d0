"""The trainer's part at the events that transformers calls: resuming, stopping, filling in missing gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from sft.models.activation_checkpointing import recompute_share

if TYPE_CHECKING:
    from sft.training.trainer import Trainer


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
        """Make missing gradients zeros, so that a step is the same on one device and on several.

        A step of text alone gives the tower no gradient on one device, but zeros on several, where a black image stands
        in. AdamW skips a tensor without gradient; by a gradient of zeros it decays it and moves it by its momentum.
        """
        if self.trainer.nonfinite_steps or not self.trainer.engine.KEEPS_GRADIENTS:
            return  # the step is to change nothing, or the engine keeps the gradients
        for parameter in self.trainer.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have transformers save and stop, if that is wanted."""
        if self.trainer.parts.should_stop():
            control.should_save = control.should_training_stop = True
