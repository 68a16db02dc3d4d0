"""What is looked at while a model is trained, handed to the trainer from outside: none of it changes what is trained.

Validation   held-out loss by source and a few fixed answers, into the line of the step in metrics.jsonl
Evaluation   the benchmark, asked of a checkpoint that was just written; pruning, and an early stop by patience
Trackers     every line of metrics.jsonl to trackio, wandb or tensorboard
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from sft.core.distributed import from_main, is_main_process
from sft.core.errors import reason_of
from sft.data.sources import Sources
from sft.evaluation.tasks import named_tasks
from sft.models.chat_template import ChatTemplate
from sft.recipe import EvaluationConfig, Recipe
from sft.runs.checkpoint import checkpoint_name
from sft.selection.bootstrap import should_stop
from sft.selection.record import Selection
from sft.selection.session import Session
from sft.training.metrics import Line, Say
from sft.training.trackers import Trackers
from sft.training.validation import Validation, undisturbed


class Monitors:
    """What a recipe asks to have looked at while it is trained."""

    def __init__(self, recipe: Recipe, sources: Sources, template: ChatTemplate, *, image_size: int, say: Say) -> None:
        """
        Raises:
            UserError: nothing is held out to choose by, a benchmark cannot be read, a tracker is not installed.
        """

        def say_once(line: str) -> None:
            if is_main_process():
                say(line)

        unseen = sources.not_held_out
        for name in unseen:
            say_once(
                f"source {name!r}: data.validation holds out no sample of it, for nothing would be left to train on; "
                "its held-out loss is not known"
            )
        is_all = len(unseen) == len(sources.sources)
        tasks = [task.name for task in named_tasks(recipe.evaluation)]
        by_loss = recipe.evaluation.every_steps and "loss" in tasks
        held_out = None if is_all and not by_loss else sources.held_out()
        self._trackers = Trackers(recipe.training.report_to, Path(recipe.output_dir), say=say_once)
        self._validation = self._evaluation = None
        if held_out:
            self._validation = Validation(recipe, held_out, template, image_size=image_size, say=say_once)
        if recipe.evaluation.every_steps:
            session = Session(recipe, held_out=lambda: (held_out, template), log=say_once, progress=_no_bar)
            self._evaluation = Evaluation(session, recipe.evaluation, say=say_once, log=self._trackers.log)

    def validate(self, model: nn.Module, step: int) -> Line:
        """What the line of a step in metrics.jsonl says besides."""
        return self._validation(model, step) if self._validation else {}

    def log(self, line: Line) -> None:
        """Hand a line of metrics.jsonl to the trackers."""
        self._trackers.log(line)

    @property
    def callbacks(self) -> list[TrainerCallback]:
        """For the trainer."""
        return [self._trackers, *([self._evaluation] if self._evaluation else [])]

    @property
    def ended(self) -> str:
        """Why training is to end before its last step; empty where it is not."""
        return self._evaluation.ended if self._evaluation else ""

    @property
    def failed(self) -> dict[str, str]:
        """What could not be evaluated or validated so far, and why."""
        parts = (self._validation, self._evaluation)
        return {name: reason for part in parts if part for name, reason in part.failed.items()}


@contextmanager
def _no_bar(name: str) -> Iterator[Callable[[int, str], None]]:
    """The bar of the training is on the screen."""
    yield lambda done, unit: None


# --------------------------------------------------------------------------------------------------------- evaluation


class Evaluation(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Every `evaluation.every_steps`, what `select` does, on the checkpoint that was just written.

    The checkpoint is loaded from its folder: what is scored is what is shipped, rounded as it is, and `select` finds it
    answered. That takes the memory of a bfloat16 copy, where gradients and activations are let go of by then.
    A failure is told and kept, and training goes on. All processes of a training call it.
    """

    def __init__(
        self, session: Session, settings: EvaluationConfig, *, say: Say, log: Callable[[Line], None] = lambda line: None
    ) -> None:
        """`log` gets the newest score.

        Raises:
            UserError: there is nothing to choose by, or it cannot be read.
        """
        assert settings.every_steps is not None
        self.session = session
        self.every_steps, self.patience = settings.every_steps, settings.patience
        self.failed: dict[str, str] = {}
        """Checkpoints whose evaluation failed, and why."""
        self.ended = ""
        """Why training is to end, once it is."""
        self._say, self._log = say, log
        session.prepare()

    def on_save(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Evaluate the checkpoint of this step."""
        if state.global_step % self.every_steps:
            return
        with undisturbed(model):
            selection = self._ask(checkpoint_name(state.global_step))
        if ends := from_main(lambda: self._why_to_end(selection)):
            self._say(f"step {state.global_step}: {ends}; training ends (evaluation.patience)")
            self.ended = f"evaluation.patience: {ends}"
            control.should_training_stop = True

    def _ask(self, checkpoint: str) -> Selection | None:
        try:
            selection = self.session.evaluate_new(self.every_steps)
        except Exception as error:  # whatever it is, it is no reason to end the training
            self.failed[checkpoint] = reason_of(error)
            self._say(f"{checkpoint}: the evaluation failed, training goes on: {self.failed[checkpoint]}")
            return None
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.failed |= self.session.failed
        if selection:
            self._say(_summary(selection))
            self._log({"eval_score": selection.scores[-1].score})
        return selection

    def _why_to_end(self, selection: Selection | None) -> str:
        if selection is None or self.patience is None:
            return ""
        if not should_stop([selection.metric.sign * score.score for score in selection.scores], self.patience):
            return ""
        return f"{self.patience} evaluations brought no better score than {selection.best}"


def _summary(selection: Selection) -> str:
    newest = selection.scores[-1]
    unit = "held-out loss" if selection.by == "loss" else "score"
    limits = "" if newest.interval is None else " ({:.3f} to {:.3f})".format(*newest.interval)
    return f"{newest.checkpoint}: {unit} {newest.score:.3f}{limits}; selected so far: {selection.selected}"
