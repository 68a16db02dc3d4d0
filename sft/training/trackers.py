"""Every line of metrics.jsonl to trackio, wandb or tensorboard."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from sft.core.errors import UserError, reason_of
from sft.evaluation.held_out_loss import mean_loss
from sft.training.metrics import Line, Say

PACKAGES = {"trackio": ("trackio",), "wandb": ("wandb",), "tensorboard": ("tensorboard", "tensorboardX")}
"""What has to be installed for a tracker: one of these."""


def check_trackers(names: Sequence[str]) -> None:
    """Whether the trackers of `training.report_to` are installed.

    Raises:
        UserError: one is not.
    """
    for name in names:
        if not any(find_spec(package) for package in PACKAGES[name]):
            raise UserError(f"training.report_to: {name} is not installed; run `pip install {name}`, or leave it out")


class Trackers(TrainerCallback):  # type: ignore[misc]
    """Hands every line of metrics.jsonl to trackers, by transformers' own integrations: `train/loss`,
    `train/loss/<source>`, `eval/loss/<source>`. One that fails is told of and gets no more; training goes on."""

    def __init__(self, names: Sequence[str], run_dir: Path, *, say: Say) -> None:
        """
        Raises:
            UserError: a tracker is not installed, or broken.
        """
        check_trackers(names)
        self._run_dir = run_dir
        self._say = say
        self._trackers = {}
        for name, kind in zip(names, get_reporting_integration_callbacks(list(names)), strict=True):
            with _usable(name):
                self._trackers[name] = kind()
        self._arguments: tuple[Any, ...] = ()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the trackers.

        Raises:
            UserError: one refuses.
        """
        own = copy.copy(args)
        own.run_name, own.project = self._run_dir.name, "idefics-sft"
        self._arguments = own, state, control
        for name, tracker in self._trackers.items():
            if name == "tensorboard":
                tracker.logging_dir = tracker.logging_dir or str(self._run_dir / "tensorboard")
            with _usable(name):
                tracker.on_train_begin(*self._arguments, model=kwargs.get("model"))

    def log(self, line: Line) -> None:
        """Hand on a line of metrics.jsonl."""
        if self._arguments:
            self._tell("on_log", logs=tracked(line))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the trackers."""
        self._tell("on_train_end", model=kwargs.get("model"))

    def _tell(self, event: str, **kwargs: Any) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                getattr(tracker, event)(*self._arguments, **kwargs)
            except Exception as error:  # the network, say
                del self._trackers[name]
                self._say(f"{name}: gets nothing more of this run, training goes on: {reason_of(error)}")


@contextmanager
def _usable(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise UserError(f"training.report_to: {name} cannot be used: {reason_of(error)}") from error


def tracked(line: Line) -> dict[str, float | str]:
    """Numbers and texts of a line of metrics.jsonl under the names that transformers' integrations expect: they put
    `eval/` in place of `eval_`, and `train/` before everything else."""
    found: Line = {name: value for name, value in line.items() if name not in ("step", "time")}
    sources, validation = found.pop("sources", {}), found.pop("validation", {})
    for name, own in sources.items():
        found |= {f"loss/{name}": own["loss"], f"trained_tokens/{name}": own["trained_tokens"]}
    found |= {f"eval_loss/{name}": own["loss"] for name, own in validation.items()}
    if validation:
        found["eval_loss"] = mean_loss(validation)
    for number, generation in enumerate(found.pop("generations", [])):
        found[f"eval_answer/{number}"] = f"{generation['prompt']}\n\n{generation['answer']}"
    return {name: value for name, value in found.items() if isinstance(value, int | float | str)}
