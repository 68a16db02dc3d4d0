"""Winoground: two images and two captions of the same words in another order; which belongs to which.

Needs the gated files of https://huggingface.co/datasets/facebook/winoground, with images.zip unpacked:

    data/examples.jsonl    data/images/ex_0_img_0.png

Each caption gets the likelihood of its tokens under each image, divided by their number. The text score counts the
images whose own caption is likelier, for both; the image score the captions whose own image makes them likelier; the
group score, which is the score here, both. HuggingFaceM4 counted equals as right, and its code calls text and image
score by each other's names; so are the figures that are shown as `(m4)`. It divided by the length of the whole text,
prompt included. There are no shots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from sft.core.errors import UserError
from sft.core.metric import Metric
from sft.core.sample import ImageRef
from sft.evaluation.official_files import official_layout, read_jsonl
from sft.evaluation.prompts import Prompt, TaskItem
from sft.evaluation.questions import RankedQuestions
from sft.evaluation.task import Answer, Query, Typical
from sft.evaluation.task_source import TaskSource

M4 = {
    "text score": "image score (m4)",
    "image score": "text score (m4)",
    "group score": "group score (m4)",
}
"""What HuggingFaceM4's code calls each score, by its reference values."""


class Winoground(RankedQuestions):
    """Group score on Winoground, equals counted as wrong."""

    name = "winoground"
    metric = Metric(name="group score")
    splits = ("test",)
    typical = Typical(items={"test": 400}, query=10, queries=2, options=2, option=9, tree=15, shots=(0,))
    prompts: ClassVar[Mapping[str, Prompt]] = {
        "base": Prompt(question="{image}Description of the image:", answer=" {answer}", is_document=True),
        "chat": Prompt(question="{image}Describe the image briefly."),
    }

    def __init__(self, source: TaskSource) -> None:
        """
        Raises:
            UserError: see `Questions`; shots are asked for.
        """
        if source.settings.asked_shots.number:
            raise UserError("winoground: there are no shots; leave out shots")
        super().__init__(source)

    def read(self, folder: Path, split: str) -> list[TaskItem]:
        """Return all examples: the options are the two captions, each that of the image in its place."""
        file = folder / "data" / "examples.jsonl"
        with official_layout(file):
            return [
                TaskItem(
                    id=record["id"],
                    options=(record["caption_0"], record["caption_1"]),
                    answers=(record["caption_0"], record["caption_1"]),
                    images=tuple(
                        ImageRef(source=folder / "data" / "images" / f"{record[f'image_{number}']}.png")
                        for number in (0, 1)
                    ),
                    cluster=f"example {record['id']}",
                    category=record.get("collapsed_tag", ""),
                )
                for record in read_jsonl(file)
            ]

    def queries(self, item: TaskItem) -> list[Query]:
        """Return a query for each image, with both captions as its options."""
        twins = [replace(item, images=(image,)) for image in item.images]
        return [query for twin in twins for query in super(Winoground, self).queries(twin)]

    def score(self, item: TaskItem, answers: Sequence[Answer]) -> float:
        """Return the group score of an example."""
        return self.figures(item, answers)["group score"]

    def figures(self, item: TaskItem, answers: Sequence[Answer]) -> dict[str, float]:
        """Return text, image and group score, with equals as wrong and as right. What is not finite is wrong."""
        (first, second), (third, fourth) = (
            [score.log_prob / score.num_tokens for score in answer.scores] for answer in answers
        )
        leads = {
            "text score": (first - second, fourth - third),
            "image score": (first - third, fourth - second),
            "group score": (first - second, fourth - third, first - third, fourth - second),
        }
        strict = {name: float(all(lead > 0 for lead in own)) for name, own in leads.items()}
        return strict | {M4[name]: float(all(lead >= 0 for lead in own)) for name, own in leads.items()}


TASK = Winoground
