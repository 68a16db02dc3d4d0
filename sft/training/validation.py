"""Held-out loss by source and a few fixed answers, for the line of a step in metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence

from sft.core.contain import contained
from sft.core.errors import RunError, UserError
from sft.core.sample import SkipSample
from sft.data.sources import Sources
from sft.evaluation.held_out_loss import SampleLoss, held_out_packs, mean_loss, shared_losses
from sft.inference.generate import generate, prompt_of
from sft.models.chat_template import ChatTemplate
from sft.models.packed_model import PackedModel
from sft.recipe import Recipe
from sft.training.engines import is_sharded
from sft.training.held_out_questions import NUM_ANSWERS, held_out_questions
from sft.training.metrics import Line, Log
from sft.training.preserve_state import preserve_state

MAX_NEW_TOKENS = 32


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
        self.failed: dict[str, str] = {}
        """Steps at which validation failed, and why."""
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
