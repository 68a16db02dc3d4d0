"""Held-out loss by source and a few fixed answers, for the line of a step in metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest
from typing import NamedTuple

from sft.core.contain import contained
from sft.core.errors import RunError, UserError
from sft.core.images import thumbnail
from sft.core.sample import ImageRef, Message, SkipSample
from sft.data.sources import Sources
from sft.evaluation.held_out_loss import HeldOutPacks, SampleLoss, held_out_packs, mean_loss, shared_losses
from sft.inference.generate import generate, prompt_of
from sft.models.chat_template import ChatTemplate
from sft.models.packed_model import PackedModel
from sft.recipe import Recipe
from sft.training.engines import is_sharded
from sft.training.metrics import Line, Log
from sft.training.preserve_state import preserve_state

NUM_ANSWERS = 4
MAX_NEW_TOKENS = 32
THUMBNAIL = 320
"""Pixels of the longer side of an image in before.json."""


class Validation:
    """The same held-out packs and questions at every checkpoint, and before the first step: called with the model and
    the step, it returns `validation` and `generations` for metrics.jsonl or before.json, and nothing at other steps. A
    failure is reported and kept, and training goes on."""

    def __init__(self, recipe: Recipe, held_out: Sources, template: ChatTemplate, *, log: Log) -> None:
        """Raise UserError where no held-out sample of a source fits a pack."""
        self.packs = held_out_packs(held_out, seed=recipe.evaluation.seed)
        self.questions = held_out_questions(self.packs, template, room=recipe.data.sequence_length - MAX_NEW_TOKENS)
        self.template = template
        self.every_steps, self.last_step = recipe.checkpoints.every_steps, recipe.training.steps
        self.failed: dict[str, str] = {}  # steps at which validation failed, and why
        self._log = log

    def __call__(self, model: PackedModel, step: int) -> Line:
        """Return the validation's part of the line of this step."""
        if step % self.every_steps and step != self.last_step:
            return {}
        # Where the model is sharded, an exception inside a forward is raised: the other processes wait in it.
        sharded = is_sharded(model)
        before_forward = (UserError, RunError, SkipSample)
        losses: dict[str, Line] = {}
        generations: list[Line] = []
        with preserve_state(model):
            with contained(before_forward if sharded else (Exception,)) as no_losses:
                losses = self._losses(model, sharded)
            with contained(() if sharded else (Exception,)) as no_answers:
                generations = self._generations(model)
        if reason := no_losses.reason or no_answers.reason:
            self.failed[f"validation at step {step}"] = reason
            self._log(f"step {step}: validation failed, training goes on: {reason}")
            return {"validation_failed": reason}
        by_source = ", ".join(f"{name} {own['loss']:.3f}" for name, own in losses.items() if own["trained_tokens"])
        self._log(f"step {step}: held-out loss {mean_loss(losses) or 0:.3f} ({by_source})")
        if step == 0:
            shown = [question.shown for question in self.questions]
            generations = [line | more for line, more in zip(generations, shown, strict=True)]
        return {"validation": losses, "generations": generations}

    def _losses(self, model: PackedModel, sharded: bool) -> dict[str, Line]:
        """Return mean loss and trained tokens of each source. The packs are divided among the processes."""
        samples = shared_losses(model, self.packs, images=self.template.images, always_whole=sharded)
        names = [source.name for source in self.packs.sources.sources]
        return {name: _mean([sample for sample in samples if sample.source == name]) for name in names}

    def _generations(self, model: PackedModel) -> list[Line]:
        """Return the answers to the questions. Every process gives the same ones."""
        if not self.questions:
            return []
        prompts = [prompt_of(self.template, question.prompt) for question in self.questions]
        tokenizer = self.template.tokenizer
        answers = generate(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=NUM_ANSWERS)
        pairs = zip(self.questions, answers, strict=True)
        return [{"key": asked.key, "prompt": asked.text, "answer": answer} for asked, answer in pairs]


def _mean(samples: Sequence[SampleLoss]) -> Line:
    tokens = sum(sample.trained_tokens for sample in samples)
    total = sum(sample.loss * sample.trained_tokens for sample in samples)
    return {"loss": total / tokens if tokens else None, "trained_tokens": tokens}


# ------------------------------------------------------------------------------------------------------- the questions


class HeldOutQuestion(NamedTuple):
    """The beginning of a held-out sample, up to its first answer."""

    key: str
    prompt: tuple[Message, ...]
    answer: str
    """The answer in the data."""

    @property
    def text(self) -> str:
        """The text of the prompt, with `<image>` for an image."""
        return "\n".join(map(_text_of, self.prompt))

    @property
    def shown(self) -> Line:
        """What a report shows with the answers: the answer in the data, and the images, small, as base64 of JPEGs."""
        images = [item for message in self.prompt for item in message.content if isinstance(item, ImageRef)]
        return {"expected": self.answer, "images": [thumbnail(image, THUMBNAIL) for image in images]}


def _text_of(message: Message) -> str:
    return "".join(item if isinstance(item, str) else "<image>" for item in message.content)


def held_out_questions(packs: HeldOutPacks, template: ChatTemplate, *, room: int) -> list[HeldOutQuestion]:
    """Return the first questions of the packs, from one source after another. Documents give none. `room` is the number
    of tokens that a question may have."""
    by_source = [_questions_of(packs, source, template, room) for source in range(len(packs.sources.sources))]
    in_turn = (question for one_each in zip_longest(*by_source) for question in one_each if question)
    return list(islice(in_turn, NUM_ANSWERS))


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
