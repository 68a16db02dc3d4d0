r"""Questions of your own with short answers: asked in words, right when the answer is one of those given.

One JSON object a line; images are files below the folder of the .jsonl:

    {"question": "What colour is the bus?", "answers": ["red", "dark red"], "image": "photos/bus.jpg"}
    {"question": "Is it raining?", "answer": "no", "images": ["street.jpg"], "id": "rain-1", "category": "yes/no"}

Answers are compared as VQA compares them (m4's variant, which always normalises), except that apostrophes are dropped
in place of VQA's table of contractions, on both sides.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.core import images
from sft.core.errors import UserError
from sft.core.files import hash_file, text_lines
from sft.core.metric import ACCURACY
from sft.core.sample import SkipSample
from sft.core.shipped import resolve
from sft.evaluation.metrics.vqa_accuracy import normalise_freely
from sft.evaluation.prompts import TaskItem, choose_prompt
from sft.evaluation.questions import OpenQuestions
from sft.evaluation.results import Result
from sft.evaluation.task import Answer
from sft.evaluation.task_source import TaskSource
from sft.recipe.explain import in_words

if TYPE_CHECKING:
    from sft.models.chat_template import ChatTemplate

_KEYS = {"question", "answer", "answers", "image", "images", "id", "category"}


class ExactMatch(OpenQuestions):
    """An answer is right when it is one of those given, after all are normalised."""

    name = "exact_match"
    metric = ACCURACY

    def __init__(self, file: Path, questions: Sequence[TaskItem]) -> None:
        self.items = questions
        self.benchmark = file.stem
        self._file = file

    @classmethod
    def open(cls, source: TaskSource) -> Sequence[ExactMatch]:
        """
        Raises:
            UserError: see `read_questions`; no file is named, or one that is none of questions; or there is no such
                prompt.
        """
        data = source.named_data("exact_match")
        if not data.endswith(".jsonl"):
            raise UserError(f"{data}: --by exact_match reads a .jsonl of questions with short answers")
        choose_prompt("exact_match", cls.prompts, source.settings.prompt)
        file = resolve(data)
        task = cls(file, read_questions(file))
        task.num_beams = source.settings.num_beams
        return [task]

    def protocol(self, template: ChatTemplate) -> dict[str, Any]:
        """Return the file and its images, and how an answer is written and compared."""
        own: dict[str, Any] = {"blind": True} if self.blind else {}
        own |= {"beams": self.num_beams} if self.num_beams > 1 else {}
        return own | {
            "by": "exact_match",
            "template": template.fingerprint,
            "file": hash_file(self._file),
            "images": [question.image_sha256 for question in self.items],
            "max_new_tokens": self.max_new_tokens,
            "normaliser": 1,
        }

    def result(self, answers: Sequence[Sequence[Answer | None]], protocol_hash: str, weights: str) -> Result:
        """
        Raises:
            UserError: a question does not fit the model's positions.
        """
        for question, given in zip(self.items, answers, strict=True):
            if None in given:
                raise UserError(f"{question.where}: the question has more tokens than the model takes; shorten it")
        return super().result(answers, protocol_hash, weights)

    def score(self, item: TaskItem, answers: Sequence[Answer]) -> float:
        """Return 1 for a right answer, else 0."""
        return float(is_match(answers[0].text, item.answers))

    def details(self, item: TaskItem, answers: Sequence[Answer], score: float) -> dict[str, Any]:
        """Return the score as `hit` too."""
        return super().details(item, answers, score) | {"hit": bool(score)}

    def summary(self, result: Result, *, blind_score: float | None = None) -> dict[str, Any]:
        """Return the score as `accuracy` too."""
        own = {"by": "exact_match", "accuracy": result.score}
        return super().summary(result, blind_score=blind_score) | own


def read_questions(file: Path) -> tuple[TaskItem, ...]:
    """Return all questions of a file; their images are hashed, and decoded once to check.

    Raises:
        UserError: naming file and line, what was found and what would be right.
    """
    try:
        lines = list(text_lines(file))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}; expected a .jsonl of questions") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8; expected a .jsonl of questions") from error
    questions = [_question(file, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not questions:
        raise UserError(f"{file}: no questions found")
    seen: dict[str, str] = {}
    for question in questions:
        if question.id in seen:
            raise UserError(f"{question.where}: id {question.id!r} is that of {seen[str(question.id)]} too")
        seen[str(question.id)] = question.where
    return tuple(questions)


def _question(file: Path, number: int, line: str) -> TaskItem:
    where = f"{file}:{number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON; expected one object a line") from error
    if not isinstance(row, dict) or not isinstance(row.get("question"), str) or not row["question"].strip():
        found = f"one with {', '.join(row) or 'no keys'}" if isinstance(row, dict) else in_words(row)
        raise UserError(f'{where}: expected an object with "question" and "answer" or "answers", found {found}')
    if unknown := sorted(row.keys() - _KEYS):
        raise UserError(f"{where}: unknown key {unknown[0]!r} (known: {', '.join(sorted(_KEYS))})")
    answers, names = _texts(row, "answer", where), _texts(row, "image", where)
    if not answers:
        raise UserError(f'{where}: no answer; expected "answer": "red" or "answers": ["red", "dark red"]')
    try:
        pictures = tuple(images.local_image(file.parent, name) for name in names)
        contents = [images.read_bytes(picture) for picture in pictures]
        for content in contents:
            images.verified(content)
    except SkipSample as skip:
        raise UserError(f"{where}: {skip.explained}") from skip
    name, sha256 = str(row.get("id", number)), hashlib.sha256(contents[0]).hexdigest() if contents else ""
    return TaskItem(
        id=name,
        where=where,
        text=row["question"].strip(),
        answers=answers,
        images=pictures,
        cluster=sha256 or f"question {name}",
        image_sha256=sha256,
        category=str(row.get("category", "")),
    )


def _texts(row: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    """Return what stands under `name` as one text, or under its plural as a list of them."""
    found = row.get(f"{name}s", [row[name]] if name in row else [])
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise UserError(f'{where}: expected "{name}" as a text, or "{name}s" as a list of texts')
    return tuple(found)


def is_match(said: str, answers: tuple[str, ...]) -> bool:
    """Return whether an answer is one of those given, after both are normalised."""
    return normalise_freely(said) in {normalise_freely(answer) for answer in answers}


TASK = ExactMatch
