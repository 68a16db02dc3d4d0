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
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.core import images
from sft.core.distributed import all_or_none
from sft.core.errors import UserError
from sft.core.files import hash_file
from sft.core.sample import ImageRef, Message, Sample, SkipSample
from sft.evaluation.generate_answers import write_answers
from sft.evaluation.run_benchmark import asked_once
from sft.models.open_model import Load, find_family, load_template

MAX_NEW_TOKENS = 15
"""As m4 asked VQA (evaluation config, `max_new_tokens`)."""
_KEYS = {"question", "answer", "answers", "image", "images", "id", "category"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ShortQuestion:
    """A question, what is shown with it, and the answers that count."""

    id: str
    where: str
    """File and line, for messages."""
    text: str
    answers: tuple[str, ...]
    images: tuple[ImageRef, ...]
    image_sha256: str
    """Of the first image; empty without."""
    category: str

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The user's turn: images, then the question."""
        return (Message(role="user", content=(*self.images, self.text)),)


def read_questions(file: Path) -> tuple[ShortQuestion, ...]:
    """All questions of a file; their images are hashed, and decoded once to check.

    Raises:
        UserError: naming file and line, what was found and what would be right.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
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
            raise UserError(f"{question.where}: id {question.id!r} is that of {seen[question.id]} too")
        seen[question.id] = question.where
    return tuple(questions)


def _question(file: Path, number: int, line: str) -> ShortQuestion:
    where = f"{file}:{number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON; expected one object a line") from error
    if not isinstance(row, dict) or not isinstance(row.get("question"), str) or not row["question"].strip():
        raise UserError(f'{where}: expected an object with "question" and "answer" or "answers"')
    if unknown := sorted(row.keys() - _KEYS):
        raise UserError(f"{where}: unknown key {unknown[0]!r} (known: {', '.join(sorted(_KEYS))})")
    answers, names = _texts(row, "answer", where), _texts(row, "image", where)
    if not answers:
        raise UserError(f'{where}: no answer; expected "answer": "red" or "answers": ["red", "dark red"]')
    try:
        pictures = tuple(images.local_image(file.parent, name) for name in names)
        contents = [images.read_bytes(picture) for picture in pictures]
        for content in contents:
            images.verified_size(content)
    except SkipSample as skip:
        raise UserError(f"{where}: {skip.reason}{f' ({skip.detail})' if skip.detail else ''}") from skip
    return ShortQuestion(
        id=str(row.get("id", number)),
        where=where,
        text=row["question"].strip(),
        answers=answers,
        images=pictures,
        image_sha256=hashlib.sha256(contents[0]).hexdigest() if contents else "",
        category=str(row.get("category", "")),
    )


def _texts(row: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    """What stands under `name` as one text, or under its plural as a list of them."""
    found = row.get(f"{name}s", [row[name]] if name in row else [])
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise UserError(f'{where}: expected "{name}" as a text, or "{name}s" as a list of texts')
    return tuple(found)


def ask_short_answers(
    path: Path,
    questions: tuple[ShortQuestion, ...],
    file: Path,
    run_dir: Path,
    load: Load,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Have the model in `path` answer all questions and keep what it said, unless it is kept already.

    Returns the hash of the protocol.

    Raises:
        UserError: a question does not fit the model's positions.
    """
    template = load_template(find_family(path), path)
    protocol = {
        "by": "exact_match",
        "template": template.fingerprint,
        "file": hash_file(file),
        "images": [question.image_sha256 for question in questions],
        "max_new_tokens": MAX_NEW_TOKENS,
        "normaliser": 1,
    }

    def ask() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        with all_or_none():
            loaded = load(path)
        said = write_answers(
            loaded.model,
            loaded.template,
            [Sample(key=question.id, messages=question.prompt) for question in questions],
            max_new_tokens=MAX_NEW_TOKENS,
            max_positions=loaded.max_positions,
            autocast=loaded.autocast,
            on_progress=on_progress,
        )
        lines = []
        for question, answer in zip(questions, said, strict=True):
            if answer is None:
                room = loaded.max_positions - MAX_NEW_TOKENS
                raise UserError(f"{question.where}: the question has more than the {room} tokens that the model takes")
            lines.append(_line(question, answer))
        accuracy = sum(line["hit"] for line in lines) / len(lines)
        return {"by": "exact_match", "questions": len(lines), "accuracy": accuracy}, lines

    return asked_once(path, run_dir, file.stem, protocol, ask)


def _line(question: ShortQuestion, said: str) -> dict[str, Any]:
    return {
        "question": question.id,
        "cluster": question.image_sha256 or f"question {question.id}",
        "image_sha256": question.image_sha256,
        "category": question.category,
        "answers": list(question.answers),
        "prediction": said,
        "hit": is_match(said, question.answers),
    }


def is_match(said: str, answers: tuple[str, ...]) -> bool:
    """Whether an answer is one of those given, after both are normalised."""
    return normalise(said) in {normalise(answer) for answer in answers}


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_ARTICLES = {"a", "an", "the"}


def normalise(answer: str) -> str:
    """An answer as VQA compares it: lower case, without articles, punctuation and full stops, numbers as digits.

    A punctuation mark goes without trace where it stands next to a space anywhere in the answer, or where the answer
    has a comma between digits; else a space takes its place (GT-Vision-Lab/VQA, vqaEval.py, `processPunctuation`).
    """
    text = " ".join(answer.split())
    has_number = re.search(r"\d,\d", text) is not None
    out = text
    for mark in _PUNCTUATION:
        is_loose = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if is_loose or has_number else " ")
    out = re.sub(r"\.(?!\d)", "", out).replace("'", "").lower()
    return " ".join(_NUMBERS.get(word, word) for word in out.split() if word not in _ARTICLES)
