"""What a benchmark is to the rest of the toolkit: what a model is asked, how, and what its answers are worth.

A benchmark is a file of `sft/evaluation/tasks/`, found by its name; this file knows none of them.

    Item ─queries─> Query ─model─> Answer ─score─> Outcome ─summary─> score, standard error, interval, categories

    Task           a benchmark under one protocol: its folder, the hash of what its scores depend on, its summary
    PromptedTask   asked by prompts: options are ranked by their likelihood, or an answer is generated
    MeasuredTask   asked by a measurement of its own: the held-out loss

Without torch, so that tasks are listed, and finished evaluations are compared, at once.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, Protocol, Self, TypeVar

from sft.core.errors import RunError, UserError
from sft.core.metric import Metric
from sft.core.sample import ImageRef, Sample
from sft.evaluation.results import Outcome, Result
from sft.evaluation.task_source import TaskSource

if TYPE_CHECKING:
    from sft.models.chat_template import ChatTemplate
    from sft.models.loaded_model import Loaded

How = Literal[
    "rank",  # the likelihood of each option
    "generate",  # the text that the model writes
    "loss",  # the loss of texts that are there
]
OnProgress = Callable[[int, int], None]
"""Called with how much is done, and of how much."""

TOO_LONG = "longer than the model's positions"
"""Why an item is not asked."""


class Query(NamedTuple):
    """A conversation that ends with the user's turn, and the options to compare where the task ranks."""

    sample: Sample
    options: tuple[str, ...] = ()


class AnswerScore(NamedTuple):
    """What the model gives one option."""

    log_prob: float
    """Sum over the option's tokens of the natural logarithm of their probability."""
    num_tokens: int


class Answer(NamedTuple):
    """What a model makes of a query: a score for each option, or a text."""

    scores: tuple[AnswerScore, ...] = ()
    text: str = ""

    @property
    def is_finite(self) -> bool:
        """Whether all scores are numbers: weights that are infinite or not numbers give others."""
        return all(math.isfinite(score.log_prob) for score in self.scores)


class Typical(NamedTuple):
    """The size of a benchmark and of its prompts, for `plan` where its files are not there. Tokens are LLaMA's, by the
    card's prompts and the released files; those of VisDial, memes and SST2 are estimated."""

    items: Mapping[str, int]  # by split; that of the model card last
    query: float  # tokens of a question, with the marks around its image
    shot: float = 0  # tokens of an answered one
    queries: float = 1  # of an item
    options: float = 1  # of a query that ranks
    option: float = 0  # tokens of an option but for the last, or of an answer that is written
    tree: float = 0  # the same of all options of a query, common beginnings once
    shots: tuple[int, ...] = (0, 4, 8, 16, 32)  # that the model card has figures for


class Item(Protocol):
    """What counts once: a question, whether it is asked by one query or by several."""

    @property
    def id(self) -> int | str:
        """Its name in the benchmark."""

    @property
    def cluster(self) -> str:
        """The same for items that are not independent: those about the same image."""

    @property
    def image_sha256(self) -> str:
        """Hash of the image's encoded bytes; empty without an image, and where reading all of them takes long."""

    @property
    def category(self) -> str:
        """The part of the benchmark that it belongs to, or an empty string."""

    @property
    def answers(self) -> tuple[str, ...]:
        """The right answers or references; empty where the benchmark keeps them back."""


class Task(ABC):
    """A benchmark under one protocol: the same items for every model. Its file sets `TASK` to the class."""

    name: ClassVar[str]
    """The name of its file: what --task and --by take."""
    metric: ClassVar[Metric]
    how: How
    splits: ClassVar[tuple[str, ...]] = ()
    """Parts that `evaluation.split` can name, the one that is asked if none is named first; empty where the data are
    one file."""
    benchmark: str
    """The folder of RUN/evaluations where its outcomes are kept."""
    label: str = ""
    """What tells tasks of one benchmark apart."""
    unit: ClassVar[str]
    """What progress counts."""
    typical: ClassVar[Typical | None] = None
    """None where a user's own data are all there is."""
    shots: int = 0
    """Answered items before each."""
    blind: bool = False
    """Whether it is asked without its images."""
    has_answers: bool = True
    """Whether it can be scored here: test splits cannot."""

    @classmethod
    def open(cls, source: TaskSource) -> Sequence[Task]:
        """Read the benchmark; several tasks where it is to be asked in several ways.

        Raises:
            UserError: it is missing or damaged; where, what was found, what would be right.
        """
        return [cls(source)]  # type: ignore[call-arg]  # the constructor of a task is its own matter

    @abstractmethod
    def protocol(self, template: ChatTemplate) -> dict[str, Any]:
        """Return everything but the weights that a score depends on, as JSON."""

    def protocol_hash(self, template: ChatTemplate) -> str:
        """Return 16 hexadecimal digits that change with the protocol."""
        return hashlib.sha256(json.dumps(self.protocol(template), sort_keys=True).encode()).hexdigest()[:16]

    def num_rows(self, result: Result) -> int:
        """Return how many answers a result holds, by which a file that lacks some is found out."""
        return len(result.outcomes)

    def paired_scores(self, outcomes: Sequence[Outcome]) -> list[float]:
        """Return a value for each item whose weighted mean is the score: what the bootstrap draws from. A task whose
        score is not a mean of its items' scores returns jackknife pseudo-values here."""
        return [outcome.score for outcome in outcomes]

    def summary(self, result: Result, *, blind_score: float | None = None) -> dict[str, Any]:
        """Return what the summary file holds and `evaluate --json` prints; scores are None where there are no answers.
        `blind_score` is the score of the same items without images."""
        scored = result.has_answers
        figures = self.all_figures(result) | (result.spread_of_groups() if scored else {})
        return {
            "benchmark": self.benchmark,
            "task": self.name,
            "metric": asdict(self.metric),
            "how": self.how,
            "protocol_hash": result.protocol_hash,
            "shots": self.shots,
            "with_images": not self.blind,
            "questions": result.num_questions,
            "rows": self.num_rows(result),
            "filtered": {reason: len(items) for reason, items in result.filtered.items()},
            "filtered_questions": {reason: list(items) for reason, items in result.filtered.items()},
            "score": result.score if scored else None,
            "standard_error": result.standard_error if scored else None,
            "interval": list(result.interval(self.metric)) if scored else None,
            "blind": result.score if self.blind and scored else blind_score,
            "categories": result.parts(lambda outcome: outcome.category) if scored else {},
        } | ({"figures": figures} if figures else {})

    def all_figures(self, result: Result) -> dict[str, float]:
        """Return further figures beside the score: the means of those that the items have."""
        names = result.outcomes[0].details.get("figures", {})
        values = {name: [outcome.details["figures"][name] for outcome in result.outcomes] for name in names}
        return {name: sum(own) / len(own) for name, own in values.items()}

    def without_images(self) -> Self:
        """Return the same task, asked without its images."""
        twin = copy(self)
        twin.blind = True
        return twin


class MeasuredTask(Task):
    """A task that is not asked by prompts."""

    @abstractmethod
    def measure(self, path: Path, loaded: Loaded, on_progress: OnProgress) -> Sequence[Outcome]:
        """Return the outcomes of the model that was loaded from `path`; all processes share in it."""


ItemT = TypeVar("ItemT", bound=Item)


class PromptedTask(Task, Generic[ItemT]):
    """A task whose items are asked by prompts. Its file provides `items`, `queries` and `score`."""

    items: Sequence[ItemT]
    max_new_tokens: int = 0
    """Of a generated answer."""
    num_beams: int = 1
    """Beams of the search for it; 1: greedy."""
    style: str = ""
    """The style of its prompt, where there are several."""

    @abstractmethod
    def queries(self, item: ItemT) -> Sequence[Query]:
        """Return what a model is asked about an item, shots and images in it: one query or several."""

    def query_ids(self, item: ItemT) -> Sequence[int | str]:
        """Return the names of an item's queries in a file of predictions."""
        return [item.id]

    @abstractmethod
    def score(self, item: ItemT, answers: Sequence[Answer]) -> float:
        """Return what the answers to an item's queries are worth."""

    def details(self, item: ItemT, answers: Sequence[Answer], score: float) -> dict[str, Any]:
        """Return what the line of an item holds besides, as JSON."""
        return {"answers": list(item.answers), "prediction": answers[0].text}

    def forbidden(self) -> Sequence[str]:
        """Return texts of one token that no generated answer may have."""
        return ()

    def cut(self, text: str) -> str:
        """Return the answer in what a model wrote."""
        return text

    def protocol(self, template: ChatTemplate) -> dict[str, Any]:
        """Return the names of all ways in which it is asked, and a hash over the texts of all queries and answers."""
        digest = hashlib.sha256()
        for item in self.items:
            texts = [[*_texts_of(self._shown(query.sample)), *query.options] for query in self.queries(item)]
            digest.update(json.dumps([item.id, texts, item.answers]).encode())
        return {
            "task": self.name,
            "metric": self.metric.name,
            "how": self.how,
            "template": template.fingerprint,
            "max_new_tokens": self.max_new_tokens,
            "blind": self.blind,
            "shots": self.shots,
            "items": digest.hexdigest(),
        } | ({"prompt": self.style, "beams": self.num_beams} if (self.style, self.num_beams) != ("chat", 1) else {})

    def all_queries(self) -> Iterator[list[Query]]:
        """Yield the queries of each item, without images where it is asked so."""
        for item in self.items:
            yield [query._replace(sample=self._shown(query.sample)) for query in self.queries(item)]

    def _shown(self, sample: Sample) -> Sample:
        return without_images(sample) if self.blind else sample

    def result(self, answers: Sequence[Sequence[Answer | None]], protocol_hash: str, weights: str) -> Result:
        """Put the answers of all items together; None stands for a query that was too long. An item with such a query
        is counted as filtered.

        Raises:
            RunError: all items are too long, or the model gives no finite likelihood to anything.
        """
        outcomes: list[Outcome] = []
        too_long: list[int | str] = []
        is_finite = False
        for item, given in zip(self.items, answers, strict=True):
            whole = [answer for answer in given if answer is not None]
            if len(whole) < len(given):
                too_long.append(self.name_of(item))
                continue
            is_finite = is_finite or any(answer.is_finite for answer in whole)
            outcomes.append(self._outcome(item, whole))
        if not outcomes:
            raise RunError(f"{self.benchmark}: all {len(too_long)} questions are {TOO_LONG}")
        if not is_finite:
            problem = "the model gives no finite likelihood to any answer: its training diverged"
            raise RunError(f"{self.benchmark}: {problem}")
        return Result(
            benchmark=self.benchmark,
            protocol_hash=protocol_hash,
            outcomes=tuple(outcomes),
            weights=weights,
            filtered={TOO_LONG: too_long} if too_long else {},
        )

    def name_of(self, item: ItemT) -> int | str:
        """Return how an item that is not asked is named."""
        return item.id

    def _outcome(self, item: ItemT, answers: Sequence[Answer]) -> Outcome:
        score = self._checked(item, self.score(item, answers)) if self.has_answers else math.nan
        return Outcome(
            item=item.id,
            cluster=item.cluster,
            image_sha256=item.image_sha256,
            category=item.category,
            score=score,
            details=self.details(item, answers, score),
        )

    def _checked(self, item: ItemT, score: object) -> float:
        expected = f"a number from 0 to 1, as {self.metric.name} is" if self.metric.is_share else "a finite number"
        number = float(score) if isinstance(score, Real) else math.nan
        if not math.isfinite(number) or (self.metric.is_share and not 0 <= number <= 1):
            raise UserError(f"{self.benchmark}: item {item.id!r} scores {score!r}; expected {expected}")
        return number


def without_images(sample: Sample) -> Sample:
    """Return the same conversation without its images."""
    texts = (tuple(part for part in message.content if isinstance(part, str)) for message in sample.messages)
    messages = (replace(message, content=own) for message, own in zip(sample.messages, texts, strict=True))
    return replace(sample, messages=tuple(messages))


def _texts_of(sample: Sample) -> list[str]:
    return [f"{message.role}: {_text_of(part)}" for message in sample.messages for part in message.content]


def _text_of(part: str | ImageRef) -> str:
    """Return a text as it is, and an image by the name of its file."""
    if isinstance(part, str):
        return part
    return f"<image {part.source.name}>" if isinstance(part.source, Path) else "<image>"
