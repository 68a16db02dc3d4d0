"""The monitors that a recipe asks for while a model is trained. None of them changes what is trained.

validation             held-out loss by source and a few fixed answers, into the line of the step in metrics.jsonl
checkpoint_evaluation  the benchmark on a checkpoint that was just written; pruning, and an early stop by patience
trackers               every line of metrics.jsonl to trackio, wandb or tensorboard
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from transformers import TrainerCallback

from sft.core.distributed import is_main_process
from sft.data.sources import Sources
from sft.evaluation.tasks import named_tasks
from sft.models.chat_template import ChatTemplate
from sft.models.packed_model import PackedModel
from sft.recipe import Recipe
from sft.selection.session import Session
from sft.training.checkpoint_evaluation import CheckpointEvaluation
from sft.training.metrics import Line, Log
from sft.training.trackers import Trackers
from sft.training.validation import Validation


class Monitors:
    """The monitors of a training, handed to the trainer from outside."""

    def __init__(self, recipe: Recipe, sources: Sources, template: ChatTemplate, *, log: Log) -> None:
        """Raise UserError where nothing is held out to choose by, a benchmark cannot be read, or a tracker is not
        installed."""

        def log_once(line: str) -> None:
            if is_main_process():
                log(line)

        unseen = sources.not_held_out
        for name in unseen:
            why = "data.validation holds out no sample of it, for nothing would be left to train on"
            log_once(f"source {name!r}: {why}; its held-out loss is not known")
        is_all = len(unseen) == len(sources.sources)
        tasks = [task.name for task in named_tasks(recipe.evaluation)]
        by_loss = recipe.evaluation.every_steps and "loss" in tasks
        held_out = None if is_all and not by_loss else sources.held_out()
        self._trackers = Trackers(recipe.training.report_to, Path(recipe.output_dir), log=log_once)
        self.log = self._trackers.log
        self._validation = self._evaluation = None
        if held_out:
            self._validation = Validation(recipe, held_out, template, log=log_once)
        if recipe.evaluation.every_steps:
            no_bar = nullcontext(lambda done, unit: None)  # that of the training is on the screen
            session = Session(recipe, held_out=lambda: (held_out, template), log=log_once, progress=lambda name: no_bar)
            self._evaluation = CheckpointEvaluation(session, recipe.evaluation, log=log_once, track=self.log)

    def validate(self, model: PackedModel, step: int) -> Line:
        """Return the validation's part of the line of a step in metrics.jsonl."""
        return self._validation(model, step) if self._validation else {}

    @property
    def callbacks(self) -> list[TrainerCallback]:
        """The monitors that the trainer calls."""
        return [self._trackers, *([self._evaluation] if self._evaluation else [])]

    @property
    def ended(self) -> str:
        """Why training is to end before its last step; empty where it is not."""
        return self._evaluation.ended if self._evaluation else ""

    @property
    def failed(self) -> dict[str, str]:
        """Checkpoints and steps whose evaluation or validation failed so far, and why."""
        parts = (self._validation, self._evaluation)
        return {name: reason for part in parts if part for name, reason in part.failed.items()}
