"""Trackers that get every line of metrics.jsonl: trackio, wandb and tensorboard."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from sft.core.contain import contained
from sft.core.errors import UserError
from sft.evaluation.held_out_loss import mean_loss
from sft.training.metrics import Line, Log

PACKAGES = {"trackio": ("trackio",), "wandb": ("wandb",), "tensorboard": ("tensorboard", "tensorboardX")}
"""The packages of each tracker, of which one has to be installed."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError where a tracker of `training.report_to` is not installed."""
    for name in names:
        if not any(find_spec(package) for package in PACKAGES[name]):
            raise UserError(f"training.report_to: {name} is not installed; run `pip install {name}`, or leave it out")


class Trackers(TrainerCallback):  # type: ignore[misc]
    """Sends every line of metrics.jsonl to trackers, by transformers' own integrations: `train/loss`,
    `train/loss/<source>`, `eval/loss/<source>`. A tracker that fails is reported and gets no more lines."""

    def __init__(self, names: Sequence[str], run_dir: Path, *, log: Log) -> None:
        """Raise UserError where a tracker is not installed, or broken."""
        check_trackers(names)
        self._run_dir, self._report = run_dir, log
        self._trackers = {}
        for name, kind in zip(names, get_reporting_integration_callbacks(list(names)), strict=True):
            with _usable(name):
                self._trackers[name] = kind()
        self._arguments: tuple[Any, ...] = ()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the trackers; raise UserError where one refuses."""
        own = copy.copy(args)
        own.run_name, own.project = self._run_dir.name, "idefics-sft"
        self._arguments = own, state, control
        for name, tracker in self._trackers.items():
            if name == "tensorboard":
                tracker.logging_dir = tracker.logging_dir or str(self._run_dir / "tensorboard")
            with _usable(name):
                tracker.on_train_begin(*self._arguments, model=kwargs.get("model"))

    def log(self, line: Line) -> None:
        """Send a line of metrics.jsonl."""
        if self._arguments:
            values = tracked(line)
            self._send(lambda tracker: tracker.on_log(*self._arguments, logs=values))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the trackers."""
        model = kwargs.get("model")
        self._send(lambda tracker: tracker.on_train_end(*self._arguments, model=model))

    def _send(self, event: Callable[[Any], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            with contained() as failure:  # the network, for example
                event(tracker)
            if failure:
                del self._trackers[name]
                self._report(f"{name}: gets nothing more of this run, training goes on: {failure.reason}")


@contextmanager
def _usable(name: str) -> Iterator[None]:
    with contained() as failure:
        yield
    if failure:
        raise UserError(f"training.report_to: {name} cannot be used: {failure.reason}") from failure.error


def tracked(line: Line) -> dict[str, float | str]:
    """Return the numbers and texts of a line of metrics.jsonl under the names that transformers' integrations expect:
    they put `eval/` in place of `eval_`, and `train/` before everything else."""
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
