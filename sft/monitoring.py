"""What is looked at while a model is trained, handed to the trainer from outside: none of it changes what is trained.

Validation   held-out loss by source and a few fixed answers, into the line of the step in metrics.jsonl
Evaluation   the benchmark, asked of a checkpoint that was just written; pruning, and an early stop by patience
Trackers     every line of metrics.jsonl to trackio, wandb or tensorboard
"""

from __future__ import annotations

import copy
import gc
import io
import random
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from sft.chat_template import ChatTemplate
from sft.checkpoint import checkpoint_name
from sft.engines import is_shared_out
from sft.errors import RunError, UserError, reason_of
from sft.evaluation.processes import from_main, is_main_process
from sft.generation import prompt_of, write_on
from sft.held_out_loss import HeldOutPacks, SampleLoss, held_out_packs, mean_loss
from sft.images import decode_rgb, read_bytes
from sft.prepared import Sources
from sft.recipe import EvaluationConfig, Recipe
from sft.sample import ImageRef, Message, SkipSample
from sft.selection.choice import Selection
from sft.selection.held_out_loss import shared_losses
from sft.selection.questionnaire import scored_by
from sft.selection.session import Session
from sft.statistics import should_stop

Say = Callable[[str], None]
Line = dict[str, Any]
"""A line of metrics.jsonl."""

NUM_ANSWERS = 4
MAX_NEW_TOKENS = 32
THUMBNAIL = 320
"""Pixels of the longer side of an image in before.json."""


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
        by_loss = recipe.evaluation.every_steps and scored_by(recipe.evaluation) == "loss"
        held_out = None if is_all and not by_loss else sources.held_out()
        self._trackers = Trackers(recipe.training.report_to, Path(recipe.output_dir), say=say_once)
        self._validation = self._evaluation = None
        if held_out:
            self._validation = Validation(recipe, held_out, template, image_size=image_size, say=say_once)
        if recipe.evaluation.every_steps:
            session = Session(recipe, held_out=lambda: (held_out, template), say=say_once, progress=_no_bar)
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


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards the mode of every module and the state of every random generator are as before."""
    modes = {module: module.training for module in model.modules()}
    python, numpy = random.getstate(), np.random.get_state()
    model.eval()
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        random.setstate(python)
        np.random.set_state(numpy)


# --------------------------------------------------------------------------------------------------------- validation


class HeldOutQuestion(NamedTuple):
    """The beginning of a held-out sample, up to its first answer."""

    key: str
    prompt: tuple[Message, ...]
    answer: str
    """What the data say."""

    @property
    def text(self) -> str:
        """What is asked, an image as `<image>`."""
        return "\n".join(map(_text_of, self.prompt))

    @property
    def shown(self) -> Line:
        """What a report shows beside answers: what the data say, and the images, small, as base64 of JPEGs."""
        images = [item for message in self.prompt for item in message.content if isinstance(item, ImageRef)]
        return {"expected": self.answer, "images": [_thumbnail(image) for image in images]}


def _text_of(message: Message) -> str:
    return "".join(item if isinstance(item, str) else "<image>" for item in message.content)


def _thumbnail(image: ImageRef) -> str:
    file = io.BytesIO()
    small = decode_rgb(read_bytes(image))
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(file, "JPEG", quality=88)
    return b64encode(file.getvalue()).decode()


class Validation:
    """The same held-out packs and questions at every checkpoint, and before the first step: what `metrics.jsonl` and
    `before.json` keep as `validation` and `generations`. Called by the trainer with the model and the step; nothing at
    other steps."""

    def __init__(self, recipe: Recipe, held_out: Sources, template: ChatTemplate, *, image_size: int, say: Say) -> None:
        """
        Raises:
            UserError: no held-out sample of a source fits a pack.
        """
        self.packs = held_out_packs(held_out, seed=recipe.evaluation.seed)
        self.questions = held_out_questions(self.packs, template, room=recipe.data.sequence_length - MAX_NEW_TOKENS)
        self.template = template
        self.image_size = image_size
        self.every_steps, self.last_step = recipe.checkpoints.every_steps, recipe.training.max_steps
        self.failed: dict[str, str] = {}
        """Steps at which it failed, and why."""
        self._say = say

    def __call__(self, model: nn.Module, step: int) -> Line:
        """What the line of this step says besides."""
        if step % self.every_steps and step != self.last_step:
            return {}
        with undisturbed(model):
            losses, problem = self._losses(model)
            generations, other = self._generations(model)
        problem = problem or other
        if not problem:
            by_source = ", ".join(f"{name} {own['loss']:.3f}" for name, own in losses.items() if own["trained_tokens"])
            self._say(f"step {step}: held-out loss {mean_loss(losses) or 0:.3f} ({by_source})")
            if step == 0:
                shown = [question.shown for question in self.questions]
                generations = [line | more for line, more in zip(generations, shown, strict=True)]
            return {"validation": losses, "generations": generations}
        self.failed[f"validation at step {step}"] = problem
        self._say(f"step {step}: validation failed, training goes on: {problem}")
        return {"validation_failed": problem}

    def _losses(self, model: nn.Module) -> tuple[dict[str, Line], str]:
        """Mean loss and trained tokens of each source, or what went wrong. Packs are shared out to the processes."""
        try:
            samples = shared_losses(
                model,
                self.packs,
                image_size=self.image_size,
                always_whole=is_shared_out(model),
            )
        except Exception as error:  # whatever it is, it is no reason to end the training
            if is_shared_out(model) and not isinstance(error, UserError | RunError | SkipSample):
                raise  # from inside of a forward, in which the others wait
            return {}, reason_of(error)
        return {
            source.name: _mean([sample for sample in samples if sample.source == source.name])
            for source in self.packs.sources.sources
        }, ""

    def _generations(self, model: nn.Module) -> tuple[list[Line], str]:
        """The answers to a few questions, or what went wrong; every process gives the same ones."""
        if not self.questions:
            return [], ""
        try:
            answers = write_on(
                model,
                self.template.tokenizer,
                [prompt_of(self.template, question.prompt) for question in self.questions],
                max_new_tokens=MAX_NEW_TOKENS,
                batch_size=NUM_ANSWERS,
            )
        except Exception as error:  # as above
            if is_shared_out(model):
                raise
            return [], reason_of(error)
        return [
            {"key": question.key, "prompt": question.text, "answer": answer}
            for question, answer in zip(self.questions, answers, strict=True)
        ], ""


def _mean(samples: Sequence[SampleLoss]) -> Line:
    tokens = sum(sample.trained_tokens for sample in samples)
    total = sum(sample.loss * sample.trained_tokens for sample in samples)
    return {"loss": total / tokens if tokens else None, "trained_tokens": tokens}


def held_out_questions(
    packs: HeldOutPacks, template: ChatTemplate, *, room: int, number: int = NUM_ANSWERS
) -> list[HeldOutQuestion]:
    """The first questions of the packs, from one source after another; none from sources of documents. `room` is the
    number of tokens a question may have."""
    by_source = [_questions_of(packs, source, template, room) for source in range(len(packs.sources.sources))]
    in_turn = (question for one_each in zip_longest(*by_source) for question in one_each if question)
    return list(islice(in_turn, number))


def _questions_of(packs: HeldOutPacks, source: int, template: ChatTemplate, room: int) -> Iterator[HeldOutQuestion]:
    seen: set[str] = set()
    for item in (item for pack in packs.packs for item in pack if item.source == source):
        place = packs.sources.locate(item)
        part = packs.sources.parts[place.source][place.part]
        sample = part.store.sample(int(part.encoded.samples[place.row]))
        roles = [message.role for message in sample.messages]
        prompt = sample.messages[: roles.index("assistant")] if "assistant" in roles else ()
        if sample.key in seen or not prompt or prompt[-1].role != "user":
            continue
        seen.add(sample.key)
        if len(template.encode_prompt(prompt).input_ids) <= room:
            yield HeldOutQuestion(sample.key, prompt, _text_of(sample.messages[len(prompt)]))


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
            selection = self.session.ask_new(self.every_steps)
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
        sign = -1 if selection.by == "loss" else 1
        if not should_stop([sign * score.score for score in selection.scores], self.patience):
            return ""
        return f"{self.patience} evaluations brought no better score than {selection.best}"


def _summary(selection: Selection) -> str:
    newest = selection.scores[-1]
    unit = "held-out loss" if selection.by == "loss" else "score"
    limits = "" if newest.interval is None else " ({:.3f} to {:.3f})".format(*newest.interval)
    return f"{newest.checkpoint}: {unit} {newest.score:.3f}{limits}; selected so far: {selection.selected}"


# ----------------------------------------------------------------------------------------------------------- trackers

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
