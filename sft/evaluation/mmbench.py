"""MMBench's file format and the questions in it.

A TSV has one line per (question, pass): pass k of question i has `index` = i + k * 1,000,000, with options and answer
shifted by k. Files come with all passes, or with pass 0 only. An image is base64, or the index of the row that holds
it. Read with the csv module: pandas would turn the options `None` and `NA` into holes.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from sft import images
from sft.errors import UserError
from sft.sample import ImageRef, Message, SkipSample

Protocol = Literal[
    "circular",  # every rotation of the options has to be answered right (MMBench's CircularEval)
    "vanilla",  # pass 0 only
]

COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category",
           "comment", "split")  # fmt: skip
"""Columns of an official file, in its order."""

REQUIRED = ("index", "question", "A", "B", "answer", "image")
LETTERS = "ABCDE"
"""E is tolerated, as by other readers; no official v1.0 file has it."""

PASS = 1_000_000
"""Pass k of a question has its index + k * PASS."""

_MAX_FIELD = 2**31 - 1  # csv stops at 128 KiB, a base64 photo is larger


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One question in one order of its options."""

    index: int
    question: str
    hint: str
    letters: tuple[str, ...]
    """The letters that have an option."""
    options: tuple[str, ...]
    """Their texts, in the same order."""
    answer: str
    """The right letter."""
    category: str
    l2_category: str
    image: ImageRef
    image_sha256: str
    """Of the encoded bytes."""

    @property
    def question_index(self) -> int:
        """The same for all passes of a question."""
        return self.index % PASS


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question with the rows that a protocol asks about it, pass 0 first."""

    rotations: tuple[Row, ...]

    @property
    def first(self) -> Row:
        """The row of pass 0: what is the same in all of them is read from here."""
        return self.rotations[0]


def read_tsv(path: Path) -> list[Row]:
    """All rows of a file of MMBench layout, in its order. Each distinct image is held once, and decoded once to check.

    Raises:
        UserError: the file or a column is missing, or a row is wrong; the message names file and line.
    """
    encoded: dict[int, str] = {}  # the image field of each row
    fields: list[tuple[str, dict[str, str]]] = []
    for where, row in _read_fields(path):
        index = _index(row, where)
        if index in encoded:
            raise UserError(f"{where}: index {index} appears twice")
        encoded[index] = row["image"].strip()
        fields.append((where, row))
    pictures: dict[str, tuple[ImageRef, str]] = {}
    return [_row(row, _image(row["image"].strip(), encoded, pictures, where), where) for where, row in fields]


def group_rotations(rows: Sequence[Row], protocol: Protocol) -> list[Question]:
    """The questions of a file, in the order in which they first appear.

    Under `circular` a question that has fewer rows than options gets its rotations made from its first row.

    Raises:
        UserError: there is no such protocol.
    """
    if protocol not in get_args(Protocol):
        raise UserError(f"protocol: unknown {protocol!r} (known: {', '.join(get_args(Protocol))})")
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.question_index, []).append(row)
    questions = []
    for group in groups.values():
        group.sort(key=lambda row: row.index)
        if protocol == "vanilla":
            group = group[:1]
        elif len(group) != len(group[0].options):
            group = [rotate(group[0], by) for by in range(len(group[0].options))]
        questions.append(Question(rotations=tuple(group)))
    return questions


def rotate(row: Row, by: int) -> Row:
    """Pass `by` of a row of pass 0: option texts move up by `by` letters, the right answer with them."""
    right = row.letters.index(row.answer)
    return replace(
        row,
        index=row.index + by * PASS,
        options=row.options[by:] + row.options[:by],
        answer=row.letters[(right - by) % len(row.letters)],
    )


def prompt_text(row: Row) -> str:
    """What is asked, word for word as for the released instruct checkpoints (m4, make_mmbench.py).

    Only existing options are named. Without the space that stood at its end: it belongs to the answer.
    """
    lines = [f"Context: {row.hint}"] if row.hint else []
    lines += [f"Question: {row.question}", "Possible answers:"]
    lines += [f"{letter}: {option}" for letter, option in zip(row.letters, row.options, strict=True)]
    return "\n".join([*lines, "Correct answer:"])


def prompt(row: Row, *, blind: bool = False) -> tuple[Message, ...]:
    """The user's turn that asks `row`: the image, then the text; `blind` leaves the image out."""
    text = prompt_text(row)
    return (Message(role="user", content=(text,) if blind else (row.image, text)),)


def _read_fields(path: Path) -> list[tuple[str, dict[str, str]]]:
    """(place for messages, fields by column name) of each line."""
    limit = csv.field_size_limit(_MAX_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            found = reader.fieldnames or []
            missing = [column for column in REQUIRED if column not in found]
            if missing:
                shown = ", ".join(name[:40] for name in found[:20]) or "an empty file"
                raise UserError(f"{path}: missing columns {', '.join(missing)}; found {shown}")
            return [
                (f"{path}, line {reader.line_num}", {k: v or "" for k, v in row.items() if k is not None})
                for row in reader
            ]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; expected a TSV of MMBench layout") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: {error}; expected UTF-8 text, fields separated by tabs") from error
    finally:
        csv.field_size_limit(limit)


def _index(row: dict[str, str], where: str) -> int:
    try:
        return int(row["index"])
    except ValueError as error:
        raise UserError(f"{where}: index is {row['index'][:40]!r}, expected a whole number") from error


def _row(row: dict[str, str], picture: tuple[ImageRef, str], where: str) -> Row:
    letters = tuple(letter for letter in LETTERS if row.get(letter, "").strip())
    answer = row["answer"].strip()
    if len(letters) < 2:
        raise UserError(f"{where}: found {len(letters)} options, expected at least A and B")
    if answer not in letters:
        raise UserError(f"{where}: answer is {answer[:40]!r}, expected one of {', '.join(letters)}")
    image, sha256 = picture
    return Row(
        index=int(row["index"]),
        question=row["question"].strip(),
        hint=row.get("hint", "").strip(),
        letters=letters,
        options=tuple(row[letter].strip() for letter in letters),
        answer=answer,
        category=row.get("category", "").strip(),
        l2_category=(row.get("l2-category") or row.get("L2-category") or "").strip(),
        image=image,
        image_sha256=sha256,
    )


def _image(
    field: str, encoded: dict[int, str], pictures: dict[str, tuple[ImageRef, str]], where: str
) -> tuple[ImageRef, str]:
    """The image that a row's field holds or points to, checked when first met."""
    if field.isdigit():  # no encoded image is digits only
        if int(field) not in encoded or encoded[int(field)].isdigit():
            raise UserError(f"{where}: image is {field[:40]!r}, but no row of that index holds an image")
        field = encoded[int(field)]
    if field not in pictures:
        try:
            content = base64.b64decode(field, validate=True)
            images.decode_rgb(content)
        except (binascii.Error, ValueError) as error:
            raise UserError(f"{where}: image is neither base64 nor the index of a row") from error
        except SkipSample as skip:
            raise UserError(f"{where}: {skip.reason}") from skip
        pictures[field] = (ImageRef(source=content), hashlib.sha256(content).hexdigest())
    return pictures[field]
