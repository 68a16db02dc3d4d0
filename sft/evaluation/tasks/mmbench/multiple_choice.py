"""Multiple-choice questions of MMBench's layout as a task, one for each way of scoring the options.

Every figure is named by a hash over all it depends on but the weights: prompt text, template and tokenizer, protocol,
scoring, shots, image or not, the file, and which of its questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sft.core.errors import UserError
from sft.core.metric import ACCURACY
from sft.core.sample import ImageRef, Message
from sft.core.shipped import resolve
from sft.evaluation.results import Outcome, Result
from sft.evaluation.statistics import weighted_mean
from sft.evaluation.task import Answer, How, PromptedTask, Query
from sft.evaluation.task_source import TaskSource
from sft.evaluation.tasks.mmbench.benchmark import Benchmark, benchmark_file, load_benchmark
from sft.evaluation.tasks.mmbench.named_option import MAX_NEW_TOKENS, RULES, find_letter
from sft.evaluation.tasks.mmbench.protocols import DEVIATIONS, check_protocol, compared, letters, query
from sft.evaluation.tasks.mmbench.questions import Question, Row
from sft.evaluation.tasks.mmbench.shots import draw_shots
from sft.recipe import Scoring

if TYPE_CHECKING:
    from sft.models.chat_template import ChatTemplate


@dataclass(frozen=True, kw_only=True, slots=True)
class AskedRow:
    """One row that was asked, with what the model made of it."""

    index: int
    answer: str
    """Empty where the file keeps the answers back."""
    prediction: str
    """Empty where a generated answer names no option, or likelihoods are not finite."""
    log_probs: dict[str, float]
    """Summed log-probability (natural logarithm) of each letter's option; empty where answers are generated, and where
    they are not finite."""
    num_tokens: dict[str, int]
    """How many tokens were summed."""
    letters: Sequence[str] = ()
    """Where there are no log-probabilities: the letters of the options."""
    text: str = ""
    """The generated answer."""


def asked_rows(outcome: Outcome) -> list[AskedRow]:
    """Return the rows of a question, in the order in which they were asked."""
    return [AskedRow(**row) for row in outcome.details["rotations"]]


class MMBench(PromptedTask[Question]):
    """A question is right only if every rotation of it that is asked is."""

    name = "mmbench"
    metric = ACCURACY
    how: How = "rank"
    unit = "tokens"

    def __init__(self, questions: Benchmark, scoring: Scoring) -> None:
        """Raise UserError where the protocol has no such scoring."""
        check_protocol(questions.protocol, (scoring,))
        self.chosen = questions
        self.scoring = scoring
        self.how = "generate" if scoring == "generate" else "rank"
        self.label = scoring
        self.benchmark = questions.name
        self.items = questions.questions
        self.shots = questions.shots
        self.has_answers = questions.has_answers
        self.max_new_tokens = MAX_NEW_TOKENS if scoring == "generate" else 0

    @classmethod
    def open(cls, source: TaskSource) -> Sequence[MMBench]:
        """Read the TSV, or build the one that is made here; one task for each scoring of the settings. Raise UserError
        as `load_benchmark` does, and where no file is named, or one that is none."""
        data, settings = source.named_data("mmbench"), source.settings
        if data.endswith(".jsonl"):
            raise UserError(f"{data}: --by mmbench reads a TSV of MMBench layout; a .jsonl goes with --by exact_match")
        shots = settings.asked_shots
        if shots.select != "random" or shots.seed is not None or settings.prompt not in (None, "chat"):
            raise UserError("mmbench: leave out shots.select, shots.seed and prompt; it has random shots in a chat")
        questions = load_benchmark(
            benchmark_file(data, source.store, seed=settings.seed),
            protocol=settings.protocol,
            max_questions=settings.max_questions,
            shots=shots.number,
            support=resolve(shots.support) if shots.support else None,
            seed=settings.seed,
        )
        tasks = [cls(questions, scoring) for scoring in settings.ranks]
        for task in tasks:
            task.num_beams = settings.num_beams if task.how == "generate" else 1
        return tasks

    def protocol(self, template: ChatTemplate) -> dict[str, Any]:
        """Return the prompt of a made question, and what names the questions that are asked."""
        shown = [_EXAMPLE] * bool(self.shots)
        example = self._shown(query(_EXAMPLE, self.chosen.protocol, self.scoring, shots=shown))
        generated = {"rules": RULES} | ({"beams": self.num_beams} if self.num_beams > 1 else {})
        return {
            "prompt": [_text_of(message) for message in example.messages],
            "template": template.fingerprint,
            "protocol": self.chosen.protocol,
            "rank": self.scoring,
            "max_new_tokens": self.max_new_tokens,
            "blind": self.blind,
            "shots": self.shots,
            "questions": self.chosen.fingerprint,
        } | (generated if self.how == "generate" else {})

    def queries(self, item: Question) -> list[Query]:
        """Return a query for each rotation of a question, all after the same shots."""
        chosen = self.chosen
        shots = draw_shots(item, chosen.support, num_shots=chosen.shots, seed=chosen.seed)
        return [
            Query(
                query(row, chosen.protocol, self.scoring, shots=shots, key=f"{chosen.name}/{row.index}"),
                compared(row, chosen.protocol, self.scoring) if self.how == "rank" else (),
            )
            for row in item.rotations
        ]

    def query_ids(self, item: Question) -> list[int]:
        """Return the index of each row."""
        return [row.index for row in item.rotations]

    def score(self, item: Question, answers: Sequence[Answer]) -> float:
        """Return 1 if every rotation was answered right, else 0."""
        return float(all(asked.prediction == asked.answer for asked in self._asked(item, answers)))

    def details(self, item: Question, answers: Sequence[Answer], score: float) -> dict[str, Any]:
        """Return the rows that were asked, and whether the question is a hit; null where there are no answers."""
        return {
            "rotations": [asdict(asked) for asked in self._asked(item, answers)],
            "l2_category": item.first.l2_category,
            "hit": bool(score) if self.has_answers else None,
        }

    def name_of(self, item: Question) -> int:
        """Return the index of the row that is asked first."""
        return item.first.index

    def num_rows(self, result: Result) -> int:
        """Return the number of rows that were asked."""
        return sum(len(outcome.details["rotations"]) for outcome in result.outcomes)

    def _asked(self, item: Question, answers: Sequence[Answer]) -> list[AskedRow]:
        return [self._asked_row(row, answer) for row, answer in zip(item.rotations, answers, strict=True)]

    def _asked_row(self, row: Row, answer: Answer) -> AskedRow:
        """Return what was predicted for a row: the likeliest option, the first of equals, or the one that is named;
        none where likelihoods are not finite."""
        names = row.letters if self.how == "generate" else letters(row, self.chosen.protocol)
        scores = dict(zip(names, answer.scores, strict=True)) if self.how == "rank" and answer.is_finite else {}
        likeliest = max(scores, key=lambda letter: scores[letter].log_prob, default="")
        return AskedRow(
            index=row.index,
            answer=row.answer,
            prediction=likeliest if self.how == "rank" else find_letter(answer.text, row.letters, row.options),
            log_probs={letter: score.log_prob for letter, score in scores.items()},
            num_tokens={letter: score.num_tokens for letter, score in scores.items()},
            letters=[] if scores else list(names),
            text=answer.text,
        )

    def summary(self, result: Result, *, blind_score: float | None = None) -> dict[str, Any]:
        """Return the keys of design.md section 5: `accuracy` for the score, and what guessing would score."""
        scored = result.has_answers
        whole = super().summary(result, blind_score=blind_score)
        whole["accuracy"] = whole.pop("score")
        return whole | {
            "protocol": self.chosen.protocol,
            "rank": self.scoring,
            "deviations": list(DEVIATIONS.get(self.chosen.protocol, ())),
            "chance": chance(result),
            "independent_chance": independent_chance(result),
            "categories": result.parts(lambda one: one.category, "accuracy") if scored else {},
            "l2_categories": result.parts(lambda one: str(one.details["l2_category"]), "accuracy") if scored else {},
            "letters": predicted_letters(result),
            "not_finite": num_not_finite(result) if self.how == "rank" else 0,
        }


def chance(result: Result) -> float:
    """Return the mean of 1 / number of options: what a guess scores that stays with one option in all rotations."""
    return weighted_mean([1 / _num_options(asked_rows(outcome)) for outcome in result.outcomes])


def independent_chance(result: Result) -> float:
    """Return what guessing anew in every rotation scores."""
    rows = [asked_rows(outcome) for outcome in result.outcomes]
    return weighted_mean([_num_options(own) ** -len(own) for own in rows])


def _num_options(rows: Sequence[AskedRow]) -> int:
    return len(rows[0].log_probs or rows[0].letters)


def predicted_letters(result: Result) -> dict[str, float]:
    """Return how often each letter was predicted, over all rows: far from level means that letters are preferred.
    `none` stands for generated answers that name no option."""
    counts = Counter(row.prediction or "none" for row in _all_rows(result))
    return {letter: counts[letter] / counts.total() for letter in sorted(counts)}


def num_not_finite(result: Result) -> int:
    """Return the number of rows whose likelihoods are not finite: they count as wrong."""
    return sum(not row.log_probs for row in _all_rows(result))


def _all_rows(result: Result) -> list[AskedRow]:
    return [row for outcome in result.outcomes for row in asked_rows(outcome)]


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

TASK = MMBench
