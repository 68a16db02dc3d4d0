"""What an evaluation found, question by question, and the files of a run that hold it.

    RUN/evaluations/<benchmark>/<protocol_hash>/<checkpoint>.json     the summary
    RUN/evaluations/<benchmark>/<protocol_hash>/<checkpoint>.jsonl    one line per question

Without torch, so that choosing among finished evaluations is instant.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from sft.core.errors import UserError
from sft.core.files import write_atomically

Rank = Literal[
    "letter",  # the option whose letter is the likeliest answer
    "text",  # the option whose full text is
    "generate",  # the option that the written answer names
]

_Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One row that was asked, with what the model made of it."""

    index: int
    answer: str
    """Empty where the file keeps the answers back."""
    prediction: str
    """Empty where a written answer names no option, or likelihoods are not finite."""
    log_probs: dict[str, float]
    """Summed log-probability (natural logarithm) of each letter's option; empty where answers are written, and where
    they are not finite."""
    num_tokens: dict[str, int]
    """How many tokens were summed."""
    letters: tuple[str, ...] = ()
    """Where there are no log-probabilities: the letters of the options."""
    text: str = ""
    """The written answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionResult:
    """A question: right only if every rotation that was asked is."""

    question: int
    cluster: str
    """Questions of one cluster are not independent: same image, or each question by itself."""
    image_sha256: str
    category: str
    rotations: tuple[Asked, ...]
    l2_category: str = ""

    @property
    def hit(self) -> bool:
        """Whether all rotations were answered right."""
        return all(asked.prediction == asked.answer for asked in self.rotations)

    @property
    def num_options(self) -> int:
        """Options that could be chosen."""
        return len(self.rotations[0].log_probs or self.rotations[0].letters)


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The answers of one model to one benchmark under one protocol. All shares are fractions of 1."""

    benchmark: str
    protocol: str
    protocol_hash: str
    rank: Rank
    blind: bool
    """The same prompts without their images."""
    questions: tuple[QuestionResult, ...]
    weights: str = ""
    """What identifies the weights, where the caller gave it: a result of other weights is not reused."""
    shots: int = 0
    """Answered questions before each."""
    filtered: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Questions that were not asked, by reason."""
    deviations: tuple[str, ...] = ()
    """Where the protocol differs from its source."""

    @property
    def has_answers(self) -> bool:
        """Whether it can be scored: test splits cannot."""
        return all(asked.answer for question in self.questions for asked in question.rotations)

    @property
    def accuracy(self) -> float:
        """Share of questions with a hit."""
        return _mean([question.hit for question in self.questions])

    @property
    def standard_error(self) -> float:
        """Of the accuracy, by clusters: see `clustered_standard_error`."""
        return clustered_standard_error(
            [question.hit for question in self.questions], [question.cluster for question in self.questions]
        )

    @property
    def chance(self) -> float:
        """Mean of 1 / number of options: what a guess scores that stays with one option text in all rotations."""
        return _mean([1 / question.num_options for question in self.questions])

    @property
    def independent_chance(self) -> float:
        """What guessing anew in every rotation scores."""
        return _mean([question.num_options ** -len(question.rotations) for question in self.questions])

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy, on the number of independent questions that its error stands for."""
        num_clusters = len({question.cluster for question in self.questions})
        return wilson_interval(self.accuracy, effective_size(self.accuracy, self.standard_error, num_clusters))

    @property
    def categories(self) -> dict[str, dict[str, float]]:
        """Number of questions and accuracy of each category, in alphabetical order."""
        return self._parts(lambda question: question.category)

    @property
    def l2_categories(self) -> dict[str, dict[str, float]]:
        """The same by the wider categories."""
        return self._parts(lambda question: question.l2_category)

    def _parts(self, name: Callable[[QuestionResult], str]) -> dict[str, dict[str, float]]:
        parts: dict[str, list[QuestionResult]] = {}
        for question in self.questions:
            parts.setdefault(name(question), []).append(question)
        return {
            part: {"questions": _num_distinct(parts[part]), "accuracy": _mean([q.hit for q in parts[part]])}
            for part in sorted(parts)
            if part
        }

    @property
    def letters(self) -> dict[str, float]:
        """How often each letter was predicted, over all rows: far from level means that letters are preferred. `none`
        for written answers that name no option."""
        counts = Counter(asked.prediction or "none" for question in self.questions for asked in question.rotations)
        total = sum(counts.values())
        return {letter: counts[letter] / total for letter in sorted(counts)}

    @property
    def num_not_finite(self) -> int:
        """Rows whose likelihoods are not finite: they count as wrong."""
        if self.rank == "generate":
            return 0
        return sum(not asked.log_probs for question in self.questions for asked in question.rotations)

    def on_half(self, half: Literal[0, 1], seed: int) -> Result:
        """The same result on one half of the images.

        Raises:
            UserError: none of the questions is about them.
        """
        questions = tuple(q for q in self.questions if half_of(q.image_sha256, seed) == half)
        if not questions:
            raise UserError(f"{self.benchmark}: a half of its images has no questions; it needs more images")
        return replace(self, questions=questions)

    def on_questions_of(self, other: Result) -> Result:
        """The same result on the rows that another one asked."""
        asked = {row.index for question in other.questions for row in question.rotations}
        return replace(self, questions=tuple(q for q in self.questions if q.rotations[0].index in asked))

    def summary(self, *, blind_accuracy: float | None = None) -> dict[str, Any]:
        """The keys of design.md section 5, scores None where there are no answers. `blind` there is the accuracy of
        the same questions without images."""
        scored = self.has_answers
        return {
            "benchmark": self.benchmark,
            "protocol": self.protocol,
            "protocol_hash": self.protocol_hash,
            "rank": self.rank,
            "shots": self.shots,
            "deviations": list(self.deviations),
            "with_images": not self.blind,
            "questions": _num_distinct(self.questions),
            "rows": sum(len(question.rotations) for question in self.questions),
            "filtered": {reason: len(questions) for reason, questions in self.filtered.items()},
            "filtered_questions": {reason: list(questions) for reason, questions in self.filtered.items()},
            "accuracy": self.accuracy if scored else None,
            "standard_error": self.standard_error if scored else None,
            "interval": list(self.interval) if scored else None,
            "chance": self.chance,
            "independent_chance": self.independent_chance,
            "blind": self.accuracy if self.blind and scored else blind_accuracy,
            "categories": self.categories if scored else {},
            "l2_categories": self.l2_categories if scored else {},
            "letters": self.letters,
            "not_finite": self.num_not_finite,
        }


def _num_distinct(questions: Sequence[QuestionResult]) -> int:
    """Where rows count by themselves, a question has several."""
    return len({question.question for question in questions})


def half_of(image_sha256: str, seed: int) -> int:
    """0 or 1, at random by image: checkpoints are chosen on one half, figures come from the other."""
    return _draw(image_sha256, f"half {seed}") % 2


def in_random_order(image_sha256s: Sequence[str], seed: int) -> list[str]:
    """Distinct images in an order that depends on their content and the seed alone."""
    return sorted(set(image_sha256s), key=lambda sha256: (_draw(sha256, f"order {seed}"), sha256))


def _draw(image_sha256: str, what: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{what} {image_sha256}".encode()).digest()[:8], "big")


def clustered_standard_error(values: ArrayLike, clusters: Sequence[str]) -> float:
    """Standard error of a mean whose values depend on each other within clusters.

    sqrt(sum over clusters of (sum of deviations from the mean)^2) / n: Miller 2024 (arXiv 2411.00640), equation 4.
    With a cluster per value it is sqrt(p (1 - p) / n) for hits and misses. 0 for no values.
    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return 0.0
    _, cluster_of = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(cluster_of, weights=array - array.mean())
    return float(np.sqrt(np.sum(sums**2)) / len(array))


def effective_size(accuracy: float, standard_error: float, num_clusters: int) -> float:
    """How many independent questions would have this standard error: p (1 - p) / SE^2.

    Where all are hits, or all misses, or about one image, nothing is known of the spread between clusters: then each
    counts once.
    """
    if standard_error < 1e-9:  # 0, but for rounding
        return num_clusters
    return accuracy * (1 - accuracy) / standard_error**2


def wilson_interval(share: float, size: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share seen in `size` independent trials (Wilson 1927); (0, 1) for none."""
    if size == 0:
        return 0.0, 1.0
    z2 = _Z_95**2
    center = (share + z2 / (2 * size)) / (1 + z2 / size)
    margin = _Z_95 / (1 + z2 / size) * math.sqrt(share * (1 - share) / size + z2 / (4 * size**2))
    return max(0.0, center - margin), min(1.0, center + margin)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def result_file(run: Path, benchmark: str, protocol_hash: str, checkpoint: str) -> Path:
    """The summary's path; the questions stand beside it with the suffix .jsonl."""
    return run / "evaluations" / benchmark / protocol_hash / f"{checkpoint}.json"


def write_result(result: Result, run: Path, checkpoint: str) -> Path:
    """Write both files, the summary last: where it stands, the questions are complete. Returns the summary's path.

    `checkpoint` is the file's name: `checkpoint-<step>`, or `base`.
    """
    file = result_file(run, result.benchmark, result.protocol_hash, checkpoint)
    write_questions(result, file.with_suffix(".jsonl"))
    head = {"checkpoint": checkpoint, "weights": result.weights}
    write_atomically(file, json.dumps(head | result.summary(), indent=2) + "\n")
    return file


def write_questions(result: Result, file: Path) -> None:
    """One line of JSON a question: its id, cluster, what was asked and answered, and whether it is a hit; null where
    there are no answers."""
    hit = (lambda question: question.hit) if result.has_answers else (lambda question: None)
    lines = [json.dumps(asdict(question) | {"hit": hit(question)}) + "\n" for question in result.questions]
    write_atomically(file, "".join(lines))


def read_result(file: Path) -> Result:
    """Read what `write_result` wrote, by the summary's path.

    Raises:
        ValueError, KeyError, TypeError: one of the two files is damaged.
    """
    summary = json.loads(file.read_text(encoding="utf-8"))
    with file.with_suffix(".jsonl").open(encoding="utf-8") as lines:
        questions = tuple(_question_result(json.loads(line)) for line in lines)
    if sum(len(question.rotations) for question in questions) != summary["rows"]:
        raise ValueError(f"{file}: {summary['rows']} rows are told, others are there")
    return Result(
        benchmark=summary["benchmark"],
        protocol=summary["protocol"],
        protocol_hash=summary["protocol_hash"],
        rank=summary["rank"],
        blind=not summary["with_images"],
        questions=questions,
        weights=summary["weights"],
        shots=summary["shots"],
        filtered={reason: tuple(questions) for reason, questions in summary.get("filtered_questions", {}).items()},
        deviations=tuple(summary.get("deviations", ())),
    )


def find_result(run: Path, benchmark: str, protocol_hash: str, checkpoint: str, *, weights: str) -> Result | None:
    """The finished evaluation of these weights, if there is one; damaged files are none."""
    try:
        result = read_result(result_file(run, benchmark, protocol_hash, checkpoint))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return result if result.weights == weights else None


def _question_result(line: dict[str, Any]) -> QuestionResult:
    del line["hit"]
    rotations = tuple(Asked(**asked | {"letters": tuple(asked.get("letters", ()))}) for asked in line["rotations"])
    return QuestionResult(**line | {"rotations": rotations})
