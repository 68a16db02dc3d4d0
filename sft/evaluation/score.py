"""Asking a model a benchmark: which questions, under which protocol, and what came of it.

Every figure is named by a hash over all it depends on but the weights: prompt text, template and tokenizer, protocol,
ranking, image or not, the file, and which of its questions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from sft.chat_template import ChatTemplate
from sft.errors import UserError
from sft.evaluation.mmbench import Protocol, Question, Row, group_rotations, prompt, prompt_text, read_tsv
from sft.evaluation.ranking import TOKENS_PER_FORWARD, AnswerRequest, AnswerScore, score_answers
from sft.evaluation.results import Asked, QuestionResult, Rank, Result, in_random_order
from sft.sample import ImageRef

ClusterBy = Literal["image", "question"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """Questions of one file, chosen and grouped by a protocol."""

    name: str
    """The file's name without its suffix: the folder of its results."""
    protocol: Protocol
    fingerprint: str
    """Of the file's bytes and of which questions were chosen."""
    questions: tuple[Question, ...]


def load_benchmark(
    path: Path, *, protocol: Protocol = "circular", max_questions: int | None = None, seed: int = 0
) -> Benchmark:
    """Read a TSV of MMBench layout; with `max_questions`, a seeded part of it made of whole images.

    Raises:
        UserError: see `read_tsv`; or the file has no questions.
    """
    questions = group_rotations(read_tsv(path), protocol)
    if not questions:
        raise UserError(f"{path}: no questions found")
    if max_questions is not None:
        questions = choose_questions(questions, max_questions, seed)
    chosen = ",".join(str(question.first.index) for question in questions)
    file_hash = hashlib.sha256(path.read_bytes()).hexdigest()
    return Benchmark(
        name=path.stem,
        protocol=protocol,
        fingerprint=hashlib.sha256(f"{file_hash} {chosen}".encode()).hexdigest(),
        questions=tuple(questions),
    )


def choose_questions(questions: Sequence[Question], max_questions: int, seed: int) -> list[Question]:
    """At most `max_questions`, all questions of images taken in random order; at least those of one image.

    Order within the file is kept. The draw depends on image content and seed, so a longer list begins with a shorter.
    """
    by_image: dict[str, list[Question]] = {}
    for question in questions:
        by_image.setdefault(question.first.image_sha256, []).append(question)
    chosen: set[str] = set()
    num_questions = 0
    for image in in_random_order(list(by_image), seed):
        num_questions += len(by_image[image])
        if chosen and num_questions > max_questions:
            break
        chosen.add(image)
    return [question for question in questions if question.first.image_sha256 in chosen]


def evaluate(
    model: nn.Module,
    template: ChatTemplate,
    benchmark: Benchmark,
    *,
    image_size: int,
    ranks: Sequence[Rank] = ("text", "letter"),
    blind: bool = False,
    cluster_by: ClusterBy = "image",
    autocast: bool = False,
    weights: str = "",
    tokens_per_forward: int = TOKENS_PER_FORWARD,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[Rank, Result]:
    """Ask every row of the benchmark and rank its options; one result for each ranking.

    Rankings asked for together share their forwards. `cluster_by` says which questions depend on each other in the
    standard error: those about one image (default), or none (each question is its own cluster). `weights` is kept in
    the result to tell whether it can be reused. For `image_size` see `ModelFamily.image_size`, for the rest
    `score_answers`.
    """
    rows = [row for question in benchmark.questions for row in question.rotations]
    requests = [
        AnswerRequest(prompt(row, blind=blind), tuple(answer for rank in ranks for answer in _answers(row, rank)))
        for row in rows
    ]
    scores = score_answers(
        model,
        template,
        requests,
        image_size=image_size,
        autocast=autocast,
        tokens_per_forward=tokens_per_forward,
        on_progress=on_progress,
    )
    results: dict[Rank, Result] = {}
    for place, rank in enumerate(ranks):
        asked = {
            row.index: _asked(row, answers[place * len(row.letters) : (place + 1) * len(row.letters)])
            for row, answers in zip(rows, scores, strict=True)
        }
        results[rank] = Result(
            benchmark=benchmark.name,
            protocol=benchmark.protocol,
            protocol_hash=protocol_hash(template, benchmark, rank=rank, blind=blind),
            rank=rank,
            blind=blind,
            questions=tuple(_question_result(question, asked, cluster_by) for question in benchmark.questions),
            weights=weights,
        )
    return results


def protocol_hash(template: ChatTemplate, benchmark: Benchmark, *, rank: Rank, blind: bool) -> str:
    """16 hexadecimal digits that change with anything but the weights that a score depends on."""
    parts = {
        "prompt": prompt_text(_EXAMPLE),
        "template": template.fingerprint,
        "protocol": benchmark.protocol,
        "rank": rank,
        "blind": blind,
        "shots": 0,
        "questions": benchmark.fingerprint,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _answers(row: Row, rank: Rank) -> tuple[str, ...]:
    return row.options if rank == "text" else row.letters


def _asked(row: Row, scores: Sequence[AnswerScore]) -> Asked:
    """What was predicted for a row: the likeliest option, the first of equals."""
    by_letter = dict(zip(row.letters, scores, strict=True))
    return Asked(
        index=row.index,
        answer=row.answer,
        prediction=max(by_letter, key=lambda letter: by_letter[letter].log_prob),
        log_probs={letter: score.log_prob for letter, score in by_letter.items()},
        num_tokens={letter: score.num_tokens for letter, score in by_letter.items()},
    )


def _question_result(question: Question, asked: dict[int, Asked], cluster_by: ClusterBy) -> QuestionResult:
    first = question.first
    return QuestionResult(
        question=first.question_index,
        cluster=first.image_sha256 if cluster_by == "image" else str(first.question_index),
        image_sha256=first.image_sha256,
        category=first.category,
        rotations=tuple(asked[row.index] for row in question.rotations),
    )


_EXAMPLE = Row(
    index=0,
    question="question",
    hint="hint",
    letters=("A", "B"),
    options=("first", "second"),
    answer="A",
    category="",
    l2_category="",
    image=ImageRef(source=b""),
    image_sha256="",
)
"""Rendered into the protocol's hash, so that another prompt text gives another hash."""
