"""The evaluation of checkpoints while a model is trained: the benchmark, pruning, and an early stop by patience."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from sft.core.contain import contained
from sft.core.distributed import from_main
from sft.recipe import EvaluationConfig
from sft.runs.checkpoint import checkpoint_name
from sft.selection.bootstrap import should_stop
from sft.selection.record import Selection
from sft.selection.session import Session
from sft.training.metrics import Line, Log
from sft.training.preserve_state import preserve_state


class CheckpointEvaluation(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Does every `evaluation.every_steps` what `select` does, on the checkpoint that was just written. The checkpoint
    is loaded from its folder: what is scored is what is shipped, rounded as it is, and `select` finds its answers in
    the cache. That takes the memory of a bfloat16 copy, at a time when gradients and activations are freed. A failure
    is reported and kept, and training goes on. All processes of a training call it."""

    def __init__(
        self, session: Session, settings: EvaluationConfig, *, log: Log, track: Callable[[Line], None]
    ) -> None:
        """`track` gets the newest score. Raise UserError where there is nothing to choose by, or it cannot be read."""
        assert settings.every_steps is not None
        self.session = session
        self.every_steps, self.patience = settings.every_steps, settings.patience
        self.failed: dict[str, str] = {}  # checkpoints whose evaluation failed, and why
        self.ended = ""  # why training is to end, once it is
        self._log, self._track = log, track
        session.prepare()

    def on_save(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Evaluate the checkpoint of this step."""
        if state.global_step % self.every_steps:
            return
        with preserve_state(model):
            selection = self._evaluate(checkpoint_name(state.global_step))
        if ends := from_main(lambda: self._why_to_end(selection)):
            self._log(f"step {state.global_step}: {ends}; training ends (evaluation.patience)")
            self.ended = f"evaluation.patience: {ends}"
            control.should_training_stop = True

    def _evaluate(self, checkpoint: str) -> Selection | None:
        selection = None
        with contained() as failure:
            selection = self.session.evaluate_new(self.every_steps)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if failure:
            self.failed[checkpoint] = failure.reason
            self._log(f"{checkpoint}: the evaluation failed, training goes on: {failure.reason}")
            return None
        self.failed |= self.session.failed
        if selection:
            self._log(_summary(selection))
            self._track({"eval_score": selection.scores[-1].score})
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
