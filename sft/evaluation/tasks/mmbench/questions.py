"""MMBench's file format and the questions in it.

A TSV has one line per (question, pass): pass k of question i has `index` = i + k * 1,000,000, with options and answer
shifted by k. Files come with all passes, or with pass 0 only; a test split comes without answers. An image is base64,
or the index of the row that holds it. Read with the csv module: pandas would turn the options `None` and `NA` into
holes.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sft.core import images
from sft.core.errors import UserError
from sft.core.sample import ImageRef, SkipSample

COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category",
           "comment", "split")  # fmt: skip
"""Columns of an official file with answers, in its order."""

REQUIRED = ("index", "question", "A", "B", "image")
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
    """The right letter; empty where the file keeps the answers back."""
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
    """What counts as one: a question with the rows that are asked about it, pass 0 first, or a single row."""

    rotations: tuple[Row, ...]
    cluster: str
    """Questions about one image are not independent: the image's hash."""

    @property
    def first(self) -> Row:
        """The row of pass 0: what is the same in all of them is read from here."""
        return self.rotations[0]

    @property
    def id(self) -> int:
        """The same for all passes."""
        return self.first.question_index

    @property
    def image_sha256(self) -> str:
        """Hash of the image's encoded bytes."""
        return self.cluster

    @property
    def category(self) -> str:
        """The narrower category."""
        return self.first.category

    @property
    def answers(self) -> tuple[str, ...]:
        """The right letter of each rotation; empty texts where the file keeps the answers back."""
        return tuple(row.answer for row in self.rotations)


def read_tsv(path: Path) -> list[Row]:
    """Return all rows of a file of MMBench layout, in its order. Each distinct image is held once, and decoded once to
    check. Raise UserError where the file or a column is missing, it has no rows, or one is wrong; the message names
    file and line."""
    encoded: dict[int, str] = {}  # the image field of each row
    distinct: dict[str, str] = {}  # legacy files repeat the image in every pass; one copy is kept
    fields: list[tuple[str, int, dict[str, str]]] = []
    for where, row in _read_fields(path):
        index = _number(row["index"])
        if index is None:
            raise UserError(f"{where}: index is {row['index'][:40]!r}, expected a whole number")
        if index in encoded:
            raise UserError(f"{where}: index {index} appears twice")
        image = row.pop("image").strip()
        encoded[index] = distinct.setdefault(image, image)
        fields.append((where, index, row))
    if not fields:
        raise UserError(f"{path}: no questions found")
    has_answers = any(row.get("answer", "").strip() for _, _, row in fields)
    pictures: dict[str, tuple[ImageRef, str]] = {}
    return [
        _row(index, row, _image(encoded[index], encoded, pictures, where), has_answers, where)
        for where, index, row in fields
    ]


def single_rows(rows: Sequence[Row]) -> list[Question]:
    """Return every row by itself, in the file's order."""
    clusters = {question.id: question.cluster for question in _grouped(rows)}
    return [Question(rotations=(row,), cluster=clusters[row.question_index]) for row in rows]


def first_rows(rows: Sequence[Row]) -> list[Question]:
    """Return pass 0 of each question, in the order in which the questions first appear."""
    return [replace(question, rotations=(question.first,)) for question in _grouped(rows)]


def all_rotations(rows: Sequence[Row]) -> list[Question]:
    """Return every question with all its rotations: those of the file, or made from its first row where the file has
    others than one an option."""
    questions = []
    for question in _grouped(rows):
        first = question.first
        if len(question.rotations) != len(first.options):
            made = [rotate(first, by) for by in range(len(first.options))]
            question = replace(question, rotations=tuple(sorted(made, key=lambda row: row.index)))
        questions.append(question)
    return questions


def rotate(row: Row, by: int) -> Row:
    """Return the row `by` passes on: option texts move up by `by` letters, the right answer with them."""
    num_options = len(row.options)
    by_pass = (row.index // PASS + by) % num_options
    answer = row.letters[(row.letters.index(row.answer) - by) % num_options] if row.answer else ""
    options = row.options[by:] + row.options[:by]
    return replace(row, index=row.question_index + by_pass * PASS, options=options, answer=answer)


def _grouped(rows: Sequence[Row]) -> list[Question]:
    """Return the questions of the file. The image is that of the first row where copies of it differ in their bytes."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.question_index, []).append(row)
    in_order = (tuple(sorted(group, key=lambda row: row.index)) for group in groups.values())
    return [Question(rotations=group, cluster=group[0].image_sha256) for group in in_order]


def _read_fields(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Return (place for messages, fields by column name) of each line."""
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


def _number(text: str) -> int | None:
    """Return a whole number, or None for anything else."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None


def _row(index: int, row: dict[str, str], picture: tuple[ImageRef, str], has_answers: bool, where: str) -> Row:
    letters = tuple(letter for letter in LETTERS if row.get(letter, "").strip())
    answer = row.get("answer", "").strip()
    if len(letters) < 2:
        raise UserError(f"{where}: found {len(letters)} options, expected at least A and B")
    if has_answers and answer not in letters:
        raise UserError(f"{where}: answer is {answer[:40]!r}, expected one of {', '.join(letters)}")
    return Row(
        index=index,
        question=row["question"].strip(),
        hint=row.get("hint", "").strip(),
        letters=letters,
        options=tuple(row[letter].strip() for letter in letters),
        answer=answer,
        category=row.get("category", "").strip(),
        l2_category=(row.get("l2-category") or row.get("L2-category") or "").strip(),
        image=picture[0],
        image_sha256=picture[1],
    )


def _image(
    field: str, encoded: dict[int, str], pictures: dict[str, tuple[ImageRef, str]], where: str
) -> tuple[ImageRef, str]:
    """Return the image that a row's field holds or points to, checked when first met."""
    index = _number(field)  # no encoded image is so short
    if index is not None:
        if index not in encoded or _number(encoded[index]) is not None:
            raise UserError(f"{where}: image is {field[:40]!r}, but no row of that index holds an image")
        field = encoded[index]
    if field not in pictures:
        try:
            image = images.base64_image(field)
            content = images.read_bytes(image)
            images.decode_rgb(content)
        except SkipSample as skip:
            if "base64" in skip.reason:
                raise UserError(f"{where}: image is neither base64 nor the index of a row") from skip
            raise UserError(f"{where}: {skip.explained}") from skip
        pictures[field] = (image, hashlib.sha256(content).hexdigest())
    return pictures[field]
