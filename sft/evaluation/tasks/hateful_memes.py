"""HatefulMemes: whether a meme is hateful, as the likelihood of `yes` beside that of `no`.

Needs the files of Meta's challenge (their own licence; they may not be passed on) in one folder:

    test_seen.jsonl    dev_seen.jsonl    train.jsonl    img/01234.png

The score is the area under the ROC curve of the probability of `yes`. HuggingFaceM4 took the area of the hard answers
instead, which is (sensitivity + specificity) / 2 and 50 % for a model that always says the same; it is shown as well.
The card's base prompt had no `<s>` before it, which is put here. Shots come from `train`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from sft.core.errors import UserError
from sft.core.metric import Metric
from sft.core.sample import ImageRef
from sft.evaluation.metrics.roc_auc import roc_auc_values
from sft.evaluation.official_files import official_layout, read_jsonl
from sft.evaluation.prompts import Prompt, TaskItem
from sft.evaluation.questions import RankedQuestions
from sft.evaluation.results import Result
from sft.evaluation.task import Answer, Typical

HARD = "ROC AUC of hard answers (m4)"
SCENE = "The user sends memes with text written on them, and {} has to say whether the meme is hateful or not."


class HatefulMemes(RankedQuestions):
    """Area under the ROC curve on HatefulMemes."""

    name = "hateful_memes"
    metric = Metric(name="ROC AUC")
    splits = ("test_seen", "dev_seen", "dev_unseen", "test_unseen", "train")
    typical = Typical(items={"test_seen": 1_000}, query=40, shot=40, options=2)
    prompts: ClassVar[Mapping[str, Prompt]] = {
        "instruct": Prompt(
            prefix=SCENE.format("the assistant") + "\n",
            question='{image}is an image with written "{text}" on it. Is it hateful?',
            answer="{answer}.",
        ),
        "base": Prompt(
            prefix=f"It's a conversation between a human, the user, and an intelligent visual AI, Bot. {SCENE}".format(
                "Bot"
            ),
            question='{image}is an image with written "{text}" on it. Is it hateful? Answer:',
            answer=" {answer}",
            is_document=True,
        ),
    }

    def read(self, folder: Path, split: str) -> list[TaskItem]:
        """Return all memes of a split, in the order of its file; some copies of the test files have no labels."""
        file = folder / f"{split}.jsonl"
        with official_layout(file):
            return [
                TaskItem(
                    id=record["id"],
                    text=record["text"],
                    options=("yes", "no"),
                    answers=("yes" if record["label"] else "no",) if "label" in record else (),
                    images=(ImageRef(source=folder / record["img"]),),
                    cluster=record["img"],
                )
                for record in read_jsonl(file)
            ]

    def score(self, item: TaskItem, answers: Sequence[Answer]) -> float:
        """Return the probability of `yes`; `result` makes the item's part of the area of it."""
        if not answers[0].is_finite:
            return 0.0
        yes, no = (score.log_prob for score in answers[0].scores)
        return 1 / (1 + math.exp(min(no - yes, 700)))

    def details(self, item: TaskItem, answers: Sequence[Answer], score: float) -> dict[str, Any]:
        """Return the probability of `yes` as well."""
        return super().details(item, answers, score) | {"probability": score}

    def result(self, answers: Sequence[Sequence[Answer | None]], protocol_hash: str, weights: str) -> Result:
        """
        Raises:
            UserError: all memes have the same label.
        """
        found = super().result(answers, protocol_hash, weights)
        if not found.has_answers:
            return found
        is_hateful = [outcome.details["answers"] == ["yes"] for outcome in found.outcomes]
        try:
            soft = roc_auc_values([outcome.score for outcome in found.outcomes], is_hateful)
        except ValueError as error:
            raise UserError(f"{self.benchmark}: {error}; ask more questions") from error
        hard = roc_auc_values([outcome.details["prediction"] == "yes" for outcome in found.outcomes], is_hateful)
        outcomes = [
            replace(one, score=float(own), details={**one.details, "figures": {HARD: float(own_hard)}})
            for one, own, own_hard in zip(found.outcomes, soft, hard, strict=True)
        ]
        return replace(found, outcomes=tuple(outcomes))


TASK = HatefulMemes
