"""Tasks that ask one question an item: what they have in common, whatever their files, prompts and metric."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from sft.core.errors import UserError
from sft.core.metric import ACCURACY
from sft.core.sample import Sample
from sft.data.formats import Row
from sft.evaluation.copies import TABLES, copied_rows, find_copy
from sft.evaluation.draw_images import choose_part
from sft.evaluation.official_files import official_layout
from sft.evaluation.prompts import Prompt, TaskItem, choose_prompt, conversation
from sft.evaluation.results import Result
from sft.evaluation.shots import Shots, check_support, group_of, random_order
from sft.evaluation.task import Answer, PromptedTask, Query
from sft.evaluation.task_source import TaskSource

MAX_NEW_TOKENS = 15
"""Of an answer, as HuggingFaceM4 asked VQA and captions (evaluation config, `max_new_tokens`)."""


class Questions(PromptedTask[TaskItem]):
    """A task of one question an item. Its file provides `prompts`, `read` and `score`; or `items`, where `__init__` is
    its own."""

    unit = "questions"
    prompts: ClassVar[Mapping[str, Prompt]] = {"chat": Prompt()}
    """How it can be asked, by style; the first is taken where none is named. `base` and `instruct` are the card's."""
    style: str = "chat"
    support_split: ClassVar[str] = "train"
    """Where shots come from."""
    primed: ClassVar[int] = 0
    """Support items shown without their images where the card's base prompt has no shots."""
    has_copies = False
    shots_drawn: Shots | None = None

    def __init__(self, source: TaskSource) -> None:
        """
        Raises:
            UserError: a file or an image is missing, a file is not of the official layout, or there is no such prompt.
        """
        folder, split, settings = source.path(self.name), source.split(self.splits), source.settings
        self.benchmark = f"{self.name}_{split}"
        self.style, _ = choose_prompt(self.name, self.prompts, settings.prompt)
        self.num_beams = settings.num_beams
        self.items = choose_part(self.read_items(folder, split), settings.max_questions, settings.seed)
        self.has_answers = any(item.answers for item in self.items)
        if source.needs_images:
            self.check_images()
        self._draw_shots(folder, source)

    def read(self, folder: Path, split: str) -> list[TaskItem]:
        """Return all items of a split, in the order of its file.

        Raises:
            UserError: a file is missing, or not of the official layout.
        """
        raise NotImplementedError(f"{self.name}: its file reads no items")

    def read_items(self, folder: Path, split: str) -> list[TaskItem]:
        """Return the same, of a copy where official files are missing. Raise UserError where there is neither."""
        try:
            return self.read(folder, split)
        except UserError as error:
            if not self.has_copies or not isinstance(error.__cause__, OSError):
                raise
            table = TABLES.get(f"{self.name}_{split}", "")
            if files := find_copy(folder, split, table):
                with official_layout(files[0]):
                    return self.from_copy(copied_rows(files, folder))
            forms = f"{split}-00000-of-00001.parquet of the hub" + f" or VLMEvalKit's {table}" * bool(table)
            raise UserError(f"{error}, or a copy as {forms}") from error

    def from_copy(self, rows: Sequence[Row]) -> list[TaskItem]:
        """Return the items of the rows of a copy, of a task that has copies."""
        raise NotImplementedError(f"{self.name}: its file reads no copies")

    @property
    def prompt(self) -> Prompt:
        """The words around a question."""
        return self.prompts[self.style]

    def queries(self, item: TaskItem) -> list[Query]:
        """Return the question after its shots."""
        messages = conversation(self.prompt, item, self.answered_shots(item))
        options = tuple(map(self.prompt.option, self.options_of(item))) if self.how == "rank" else ()
        return [Query(Sample(key=f"{self.benchmark}/{item.id}", messages=messages), options)]

    def options_of(self, item: TaskItem) -> tuple[str, ...]:
        """Return what is ranked for an item."""
        return item.options

    def answered_shots(self, item: TaskItem) -> list[tuple[TaskItem, str]]:
        """Return what is shown before an item, with the answers that most people gave."""
        shots = self.shots_drawn.of(item) if self.shots_drawn else []
        return [(shot, most_common(shot.answers)) for shot in shots]

    def details(self, item: TaskItem, answers: Sequence[Answer], score: float) -> dict[str, Any]:
        """Return the right answers, the prediction, and where there are any further figures and the group of shots."""
        more: dict[str, Any] = {"figures": self.figures(item, answers)}
        if self.shots_drawn and self.shots_drawn.group:
            more["group"] = self.shots_drawn.group(item)
        return super().details(item, answers, score) | {key: value for key, value in more.items() if value}

    def summary(self, result: Result, *, blind_score: float | None = None) -> dict[str, Any]:
        """Return the summary, and by which model shots are alike to items."""
        shots, found = self.shots_drawn, super().summary(result, blind_score=blind_score)
        if shots and shots.alike_by:
            found |= {"shots_alike_by": shots.alike_by, "shots_at_random": shots.num_at_random}
        return found

    def figures(self, item: TaskItem, answers: Sequence[Answer]) -> dict[str, float]:
        """Return other measures of the same answers by name: variants of the metric."""
        return {}

    def read_support(self, folder: Path, named: str | None) -> list[TaskItem]:
        """Return the items that may be shots: those of a split, or of another folder of the same layout.

        Raises:
            UserError: a file is missing, or not of the official layout.
        """
        if named and named not in self.splits:
            return self.read_items(Path(named), self.support_split)
        return self.read_items(folder, named or self.support_split)

    def check_images(self, items: Sequence[TaskItem] | None = None) -> None:
        """
        Raises:
            UserError: an image file of the items is not there.
        """
        files = dict.fromkeys(image.source for item in items or self.items for image in item.images)
        if missing := [file for file in files if isinstance(file, Path) and not file.is_file()]:
            raise UserError(f"{missing[0]}: no such image; {len(missing):,} of {len(files):,} are missing")

    def _draw_shots(self, folder: Path, source: TaskSource) -> None:
        asked = source.settings.asked_shots
        self.shots = asked.number
        is_primed = not asked.number and bool(self.primed) and self.style == "base"
        if not asked.number and not is_primed:
            return
        support = [item for item in self.read_support(folder, asked.support) if item.answers]
        if is_primed:
            first = [replace(item, images=(), cluster=f"example {item.id}") for item in support[: self.primed]]
            self.shots_drawn = Shots(first, self.primed, lambda item: range(self.primed)[::-1])
            return
        self.check_images(support)
        check_support(support, asked.number, self.benchmark)
        key = f"{source.settings.seed if asked.seed is None else asked.seed} {self.benchmark}"
        num_groups = asked.groups if asked.select == "groups" else None
        order = random_order(len(support), key, num_groups)
        group = partial(group_of, key=key, num_groups=num_groups) if num_groups else None
        self.shots_drawn = Shots(support, asked.number, order, group)
        if asked.select == "rices":
            self.shots_drawn.alike_by, self.shots_drawn.features = "", asked.features


class OpenQuestions(Questions):
    """A task whose questions are answered in words."""

    how = "generate"
    max_new_tokens = MAX_NEW_TOKENS
    stop_words: ClassVar[tuple[str, ...]] = ()
    """An answer to the card's base prompt ends before the first of these."""

    def forbidden(self) -> tuple[str, ...]:
        """Return the line breaks, which end the example of a base prompt (evaluation config of m4)."""
        return ("\n", "\n\n") if self.prompt.is_document else ()

    def cut(self, text: str) -> str:
        """Return the answer in what a model wrote."""
        if not self.prompt.is_document or not self.stop_words:
            return text
        return re.split("|".join(map(re.escape, self.stop_words)), text, maxsplit=1)[0].strip()


class RankedQuestions(Questions):
    """A task whose options are ranked by their likelihood. An answer is right when the likeliest option is, the first
    of equals."""

    how = "rank"
    metric = ACCURACY

    def predicted(self, item: TaskItem, answer: Answer) -> str:
        """Return the likeliest option; an empty text where likelihoods are not finite."""
        if not answer.is_finite:
            return ""
        log_probs = [score.log_prob for score in answer.scores]
        return self.options_of(item)[log_probs.index(max(log_probs))]

    def score(self, item: TaskItem, answers: Sequence[Answer]) -> float:
        """Return 1 for a right answer, else 0."""
        return float(self.predicted(item, answers[0]) in item.answers)

    def details(self, item: TaskItem, answers: Sequence[Answer], score: float) -> dict[str, Any]:
        """Return the prediction, and the log-probability of each option."""
        log_probs = [[round(score.log_prob, 6) for score in answer.scores] for answer in answers]
        own = {"prediction": self.predicted(item, answers[0]), "log_probs": log_probs}
        return super().details(item, answers, score) | own


def most_common(answers: Sequence[str]) -> str:
    """Return the answer that was given most often, the first of equals."""
    return Counter(answers).most_common(1)[0][0]
