"""Held-out loss by source and a few fixed answers, for the line of a step in metrics.jsonl."""

from __future__ import annotations

import io
import random
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, zip_longest
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from sft.core.errors import RunError, UserError, reason_of
from sft.core.images import decode_rgb, read_bytes
from sft.core.sample import ImageRef, Message, SkipSample
from sft.data.sources import Sources
from sft.evaluation.held_out_loss import HeldOutPacks, SampleLoss, held_out_packs, mean_loss, shared_losses
from sft.inference.generate import prompt_of, write_on
from sft.models.chat_template import ChatTemplate
from sft.recipe import Recipe
from sft.training.engines import is_shared_out
from sft.training.metrics import Line, Say

NUM_ANSWERS = 4
MAX_NEW_TOKENS = 32
THUMBNAIL = 320
"""Pixels of the longer side of an image in before.json."""


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
