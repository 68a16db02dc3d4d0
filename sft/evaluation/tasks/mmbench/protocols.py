"""How a question is put: the words around it, the shots before it, and which answers are compared.

    card      as HuggingFaceM4 chose the released instruct checkpoints (m4, MMBenchNewSplits…WithKLAndEntropy)
    vanilla   one order of the options
    circular  all of them

A question becomes a `Sample` that ends with the user's turn, shots and query in one: another benchmark needs only this
to be asked by `rank_answers` or by `generate_answers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from sft.core.errors import UserError
from sft.core.sample import Message, Sample
from sft.evaluation.tasks.mmbench.questions import Question, Row, all_rotations, first_rows, single_rows
from sft.recipe import Scoring

Protocol = Literal[
    "card",  # every row of the file by itself, all four letters
    "vanilla",  # pass 0 only
    "circular",  # every rotation of the options has to be answered right (MMBench's CircularEval)
]

CARD_PREFIX = "The user asks a multiple-choice question and the assistant uses the image to answer."
CARD_LETTERS = ("A", "B", "C", "D")
"""The card's choice compares all four, also where a question has fewer options."""

DEVIATIONS = {"card": ("the `.` and <end_of_utterance> after the letter are not scored",)}
"""Where a protocol differs from its source. The rest of the sequence, which the source summed too, is the same for all
four letters: leaving it out changes nothing, and keeps the sum exact (in bfloat16 it had steps of 2 and more)."""


def group_rows(rows: Sequence[Row], protocol: Protocol) -> list[Question]:
    """Return the rows of a file as what counts as a question under a protocol; raise UserError for another one."""
    if protocol not in get_args(Protocol):
        raise UserError(f"protocol: unknown {protocol!r} (known: {', '.join(get_args(Protocol))})")
    return {"card": single_rows, "vanilla": first_rows, "circular": all_rotations}[protocol](rows)


def check_protocol(protocol: Protocol, scorings: Sequence[Scoring]) -> None:
    """Raise UserError where the card's protocol is asked for with anything but letters."""
    others = [scoring for scoring in scorings if scoring != "letter"]
    if protocol == "card" and others:
        raise UserError(f"protocol card ranks letters, found {others[0]}; vanilla and circular rank {others[0]}")


def question_text(row: Row) -> str:
    """Return the question, word for word as for the released instruct checkpoints (m4, make_mmbench.py), existing
    options only. The space at its end is left to `_user`."""
    lines = [f"Context: {row.hint}"] if row.hint else []
    lines += [f"Question: {row.question}", "Possible answers:"]
    lines += [f"{letter}: {option}" for letter, option in zip(row.letters, row.options, strict=True)]
    return "\n".join([*lines, "Correct answer:"])


def query(
    row: Row, protocol: Protocol, scoring: Scoring, *, shots: Sequence[Row] = (), key: str = "question"
) -> Sample:
    """Return the conversation that asks `row` after answered `shots`."""
    system = (Message(role="system", content=(CARD_PREFIX,)),) if protocol == "card" else ()
    turns: list[Message] = []
    for shot in shots:
        answer = Message(role="assistant", content=(_shot_answer(shot, protocol, scoring),))
        turns += [_user(shot, protocol), answer]
    return Sample(key=key, messages=(*system, *turns, _user(row, protocol)))


def compared(row: Row, protocol: Protocol, scoring: Scoring) -> tuple[str, ...]:
    """Return the answers whose likelihoods are compared, in the order of `letters`."""
    return row.options if scoring == "text" else letters(row, protocol)


def letters(row: Row, protocol: Protocol) -> tuple[str, ...]:
    """Return the letters that can win."""
    return CARD_LETTERS if protocol == "card" else row.letters


def _user(row: Row, protocol: Protocol) -> Message:
    """Return the user's turn. In the source a space stands at the end of the text, left over from the base model's
    template, where the answer followed. The card's protocol keeps it; elsewhere the text ends as training data does."""
    text = question_text(row) + (" " if protocol == "card" else "")
    return Message(role="user", content=(row.image, text))


def _shot_answer(row: Row, protocol: Protocol, scoring: Scoring) -> str:
    if protocol == "card":
        return f"{row.answer}."
    return row.options[row.letters.index(row.answer)] if scoring == "text" else row.answer
