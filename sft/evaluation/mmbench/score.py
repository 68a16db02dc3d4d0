"""Asking a model a benchmark: which questions, under which protocol, and what came of it.

Every figure is named by a hash over all it depends on but the weights: prompt text, template and tokenizer, protocol,
ranking, shots, image or not, the file, and which of its questions.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sft.core.errors import RunError, UserError
from sft.core.sample import ImageRef, Message, Sample
from sft.evaluation.generate_answers import write_answers
from sft.evaluation.mmbench.parse_letter import MAX_NEW_TOKENS, find_letter
from sft.evaluation.mmbench.protocols import DEVIATIONS, Protocol, answers, check_protocol, group_rows, letters, query
from sft.evaluation.mmbench.questions import Question, Row, first_rows, read_tsv
from sft.evaluation.mmbench.shots import draw_shots, split_support
from sft.evaluation.rank_answers import TOKENS_PER_FORWARD, AnswerRequest, AnswerScore, score_answers
from sft.evaluation.results import Asked, QuestionResult, Rank, Result, in_random_order
from sft.models.chat_template import ChatTemplate

Progress = Callable[[int, int], None]

TOO_LONG = "longer than the model's positions"
"""Why a question is not asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """Questions of one file, chosen and grouped by a protocol."""

    name: str
    """The file's name without its suffix: the folder of its results."""
    protocol: Protocol
    fingerprint: str
    """Of the file's bytes, of which questions were chosen, and of what is shown before them."""
    questions: tuple[Question, ...]
    rows: tuple[Row, ...] = ()
    """All rows of the file, in its order."""
    shots: int = 0
    support: tuple[Row, ...] = ()
    """Rows with answers that may be shown before a question about something else."""
    seed: int = 0
    """Draws the shots."""

    @property
    def has_answers(self) -> bool:
        """Whether it can be scored here."""
        return bool(self.questions[0].first.answer)


def load_benchmark(
    path: Path,
    *,
    protocol: Protocol = "circular",
    max_questions: int | None = None,
    shots: int = 0,
    support: Path | None = None,
    seed: int = 0,
) -> Benchmark:
    """Read a TSV of MMBench layout; with `max_questions`, a seeded part of it made of whole images.

    `shots` questions are shown before each, from the TSV `support`, or from a part of `path` that is then not asked.

    Raises:
        UserError: see `read_tsv`; there are not enough answers to show.
    """
    rows = read_tsv(path)
    questions = group_rows(rows, protocol)
    shown: Sequence[Question] = ()
    if shots and support:
        shown = first_rows(read_tsv(support))
    elif shots:
        questions, shown = split_support(questions, num_shots=shots, seed=seed)
    if not questions:
        raise UserError(f"{path}: no questions are left to ask beside those set aside for {shots} shots")
    if shots and not all(question.first.answer for question in shown):
        raise UserError(f"{support or path}: has no answers to show as shots; give a TSV with answers as support")
    if max_questions is not None:
        questions = choose_questions(questions, max_questions, seed)
    support_rows = tuple(row for question in shown for row in question.rotations)
    for question in questions if shots else ():
        draw_shots(question, support_rows, num_shots=shots, seed=seed)  # told before a model is loaded
    parts = [_hash_of(path), ",".join(str(question.first.index) for question in questions)]
    if shots:
        parts += [str(seed), _hash_of(support or path), ",".join(str(question.first.index) for question in shown)]
    return Benchmark(
        name=path.stem,
        protocol=protocol,
        fingerprint=hashlib.sha256(" ".join(parts).encode()).hexdigest(),
        questions=tuple(questions),
        rows=tuple(rows),
        shots=shots,
        support=support_rows,
        seed=seed,
    )


def choose_questions(questions: Sequence[Question], max_questions: int, seed: int) -> list[Question]:
    """At most `max_questions`, all questions of images taken in random order; at least those of one image.

    Order within the file is kept. The draw depends on image content and seed, so a longer list begins with a shorter.
    """
    by_image: dict[str, list[Question]] = {}
    for question in questions:
        by_image.setdefault(question.cluster, []).append(question)
    chosen: set[str] = set()
    num_questions = 0
    for image in in_random_order(list(by_image), seed):
        num_questions += len(by_image[image])
        if chosen and num_questions > max_questions:
            break
        chosen.add(image)
    return [question for question in questions if question.cluster in chosen]


def evaluate(
    model: nn.Module,
    template: ChatTemplate,
    benchmark: Benchmark,
    *,
    image_size: int,
    ranks: Sequence[Rank] = ("letter",),
    blind: bool = False,
    autocast: bool = False,
    weights: str = "",
    tokens_per_forward: int = TOKENS_PER_FORWARD,
    max_positions: int | None = None,
    on_progress: Progress | None = None,
) -> dict[Rank, Result]:
    """Ask every row of the benchmark; one result for each ranking. Those by likelihood share their forwards.

    A question that has more than `max_positions` tokens in one of its rotations is left out and counted. `weights` is
    kept in the result to tell whether it can be reused. For `image_size` see `ModelFamily.image_size`, for the rest
    `score_answers`.

    Raises:
        UserError: the protocol has no such ranking.
        RunError: all questions are too long, or the model's outputs are not finite.
    """
    check_protocol(benchmark.protocol, ranks)
    ranked: list[Rank] = [rank for rank in ranks if rank != "generate"]
    asked: dict[Rank, list[Asked | None]] = {}
    if ranked:
        samples = {rank: list(_samples(benchmark, rank, blind)) for rank in ranked}
        scores = score_answers(
            model,
            template,
            [
                AnswerRequest(sample, answers(row, benchmark.protocol, rank))
                for rank in ranked
                for row, sample in samples[rank]
            ],
            image_size=image_size,
            autocast=autocast,
            tokens_per_forward=tokens_per_forward,
            max_positions=max_positions,
            on_progress=on_progress,
        )
        found = iter(scores)
        for rank in ranked:
            asked[rank] = [_ranked(row, letters(row, benchmark.protocol), next(found)) for row, _ in samples[rank]]
    if "generate" in ranks:
        rows, prompts = zip(*_samples(benchmark, "generate", blind), strict=True)
        texts = write_answers(
            model,
            template,
            prompts,
            max_new_tokens=MAX_NEW_TOKENS,
            max_positions=max_positions,
            autocast=autocast,
            on_progress=on_progress,
        )
        asked["generate"] = [_written(row, text) for row, text in zip(rows, texts, strict=True)]
    return {
        rank: _result(
            benchmark, asked[rank], rank=rank, blind=blind, weights=weights,
            protocol_hash=protocol_hash(template, benchmark, rank=rank, blind=blind),
        )
        for rank in ranks
    }  # fmt: skip


def protocol_hash(template: ChatTemplate, benchmark: Benchmark, *, rank: Rank, blind: bool) -> str:
    """16 hexadecimal digits that change with anything but the weights that a score depends on."""
    example = query(_EXAMPLE, benchmark.protocol, rank, shots=[_EXAMPLE] * bool(benchmark.shots), blind=blind)
    parts = {
        "prompt": [_text_of(message) for message in example.messages],
        "template": template.fingerprint,
        "protocol": benchmark.protocol,
        "rank": rank,
        "max_new_tokens": MAX_NEW_TOKENS if rank == "generate" else 0,
        "blind": blind,
        "shots": benchmark.shots,
        "questions": benchmark.fingerprint,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _samples(benchmark: Benchmark, rank: Rank, blind: bool) -> Iterator[tuple[Row, Sample]]:
    """Every row that is asked, with its conversation: shots and query."""
    for question in benchmark.questions:
        shots = draw_shots(question, benchmark.support, num_shots=benchmark.shots, seed=benchmark.seed)
        for row in question.rotations:
            key = f"{benchmark.name}/{row.index}"
            yield row, query(row, benchmark.protocol, rank, shots=shots, blind=blind, key=key)


def _ranked(row: Row, letters_: Sequence[str], scores: Sequence[AnswerScore] | None) -> Asked | None:
    """What was predicted for a row: the likeliest option, the first of equals; none where weights are not finite."""
    if scores is None:
        return None
    by_letter = dict(zip(letters_, scores, strict=True))
    if not all(math.isfinite(score.log_prob) for score in scores):
        return Asked(
            index=row.index, answer=row.answer, prediction="", log_probs={}, num_tokens={}, letters=tuple(letters_)
        )
    return Asked(
        index=row.index,
        answer=row.answer,
        prediction=max(by_letter, key=lambda letter: by_letter[letter].log_prob),
        log_probs={letter: score.log_prob for letter, score in by_letter.items()},
        num_tokens={letter: score.num_tokens for letter, score in by_letter.items()},
    )


def _written(row: Row, text: str | None) -> Asked | None:
    if text is None:
        return None
    prediction = find_letter(text, row.letters, row.options)
    return Asked(
        index=row.index,
        answer=row.answer,
        prediction=prediction,
        log_probs={},
        num_tokens={},
        letters=row.letters,
        text=text,
    )


def _result(
    benchmark: Benchmark, asked: Sequence[Asked | None], *, rank: Rank, blind: bool, weights: str, protocol_hash: str
) -> Result:
    """The rows put together to questions; those with a row that could not be asked are counted."""
    rows = iter(asked)
    questions: list[QuestionResult] = []
    too_long: list[int] = []
    for question in benchmark.questions:
        rotations = [next(rows) for _ in question.rotations]
        whole = tuple(row for row in rotations if row is not None)
        if len(whole) < len(rotations):
            too_long.append(question.first.index)
            continue
        questions.append(
            QuestionResult(
                question=question.first.question_index,
                cluster=question.cluster,
                image_sha256=question.cluster,
                category=question.first.category,
                l2_category=question.first.l2_category,
                rotations=whole,
            )
        )
    if not questions:
        raise RunError(f"{benchmark.name}: all {len(too_long)} questions are {TOO_LONG}")
    result = Result(
        benchmark=benchmark.name,
        protocol=benchmark.protocol,
        protocol_hash=protocol_hash,
        rank=rank,
        blind=blind,
        questions=tuple(questions),
        weights=weights,
        shots=benchmark.shots,
        filtered={TOO_LONG: tuple(too_long)} if too_long else {},
        deviations=DEVIATIONS.get(benchmark.protocol, ()),
    )
    if result.num_not_finite == sum(len(question.rotations) for question in questions):
        raise RunError(f"{benchmark.name}: the model gives no finite likelihood to any answer: its training diverged")
    return result


def _hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _text_of(message: Message) -> list[str]:
    return [message.role, *(item if isinstance(item, str) else "<image>" for item in message.content)]


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
