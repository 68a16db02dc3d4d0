"""The words around a question, in each style in which a model can be asked.

A chat is the format of training. A document is text that the model goes on with: base models are asked so, since they
know no turns.

    Prompt + item + shots ─conversation─> messages whose last one is the user's, or a document that goes on
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft.core.errors import UserError
from sft.core.sample import ImageRef, Message


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskItem:
    """A question of a benchmark, what is shown with it, and its right answers."""

    id: int | str
    answers: tuple[str, ...]
    """The right answers, or what people answered; empty where the benchmark keeps them back."""
    images: tuple[ImageRef, ...]
    cluster: str
    """The same for items about one image."""
    text: str = ""
    """The question."""
    options: tuple[str, ...] = ()
    """What is ranked, of a task that ranks."""
    image_sha256: str = ""
    category: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Further texts that a prompt may name."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """What else its score depends on."""
    where: str = ""
    """File and line, for messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One style of asking. Names in braces stand for what an item brings: `{text}`, its `fields`, and `{image}`."""

    question: str = "{image}{text}"
    answer: str = "{answer}"
    """The answer, as shots have it and as it is ranked; names that only shots have are empty when it is ranked."""
    prefix: str = ""
    """Stands before everything: as a system message, or at the head of the document."""
    is_document: bool = False

    def asked(self, item: TaskItem) -> list[str | ImageRef]:
        """Return what is asked about an item, texts and images in reading order."""
        before, image, after = self.question.partition("{image}")
        names = {"text": item.text, **item.fields}
        images = item.images if image else ()
        parts: list[str | ImageRef] = [before.format_map(names), *images, after.format_map(names)]
        return [part for part in parts if part]

    def answered(self, shot: TaskItem, answer: str) -> str:
        """Return the answer of a shot."""
        return self.answer.format_map({**shot.fields, "answer": answer})

    def option(self, answer: str) -> str:
        """Return an answer as it is ranked."""
        return self.answer.format_map(defaultdict(str, answer=answer)).rstrip()


def conversation(prompt: Prompt, item: TaskItem, shots: Sequence[tuple[TaskItem, str]]) -> tuple[Message, ...]:
    """Return the question about an item after shots, which come with their answers."""
    if prompt.is_document:
        answered = [part for shot, answer in shots for part in (*prompt.asked(shot), prompt.answered(shot, answer))]
        return (Message(role="document", content=_joined([prompt.prefix, *answered, *prompt.asked(item)])),)
    turns = [Message(role="system", content=(prompt.prefix,))] if prompt.prefix else []
    for shot, answer in shots:
        turns.append(Message(role="user", content=tuple(prompt.asked(shot))))
        turns.append(Message(role="assistant", content=(prompt.answered(shot, answer),)))
    return (*turns, Message(role="user", content=tuple(prompt.asked(item))))


def choose_prompt(task: str, prompts: Mapping[str, Prompt], style: str | None) -> tuple[str, Prompt]:
    """Return the name and the words of a style, the first of a task's where none is named.

    Raises:
        UserError: the task is not asked in this style.
    """
    found = style or next(iter(prompts))
    if found not in prompts:
        raise UserError(f"{task}: there is no prompt {found!r}; expected {' or '.join(prompts)}")
    return found, prompts[found]


def _joined(parts: Sequence[str | ImageRef]) -> tuple[str | ImageRef, ...]:
    """Return the parts with texts that follow each other made one: a template would put a space between them."""
    found: list[str | ImageRef] = []
    for part in parts:
        if found and isinstance(part, str) and isinstance(found[-1], str):
            found[-1] += part
        elif part:
            found.append(part)
    return tuple(found)
