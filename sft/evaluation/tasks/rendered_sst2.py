"""RenderedSST2: whether a movie review, which is written on an image, is positive or negative.

Needs https://openaipublic.azureedge.net/clip/data/rendered-sst2.tgz as it unpacks:

    test/positive/*.png    test/negative/*.png    valid/…    train/…

Shots come from `train`. The card's support set has 512 of its images.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from sft.core.errors import UserError
from sft.core.sample import ImageRef
from sft.evaluation.prompts import Prompt, TaskItem
from sft.evaluation.questions import RankedQuestions
from sft.evaluation.task import Typical

LABELS = ("negative", "positive")


class RenderedSST2(RankedQuestions):
    """Accuracy on RenderedSST2."""

    name = "rendered_sst2"
    splits = ("test", "valid", "train")
    typical = Typical(items={"test": 1_821}, query=10, shot=12, options=2)
    prompts: ClassVar[Mapping[str, Prompt]] = {
        "chat": Prompt(question="{image}Is the movie review in the image positive or negative? Answer with one word."),
        "base": Prompt(
            prefix="Instruction: A movie review is written on an image. Say if it is positive or negative.\n",
            question="Image:{image}Sentiment:",
            answer=" {answer}.\n",
            is_document=True,
        ),
    }

    def read(self, folder: Path, split: str) -> list[TaskItem]:
        """Return all images of a split in alphabetical order, so that the first items are not all of one label."""
        files = [(file, label) for label in LABELS for file in (folder / split / label).glob("*.png")]
        if not files:
            raise UserError(f"{folder / split}: no images found; expected {' and '.join(LABELS)} with .png files")
        return [
            TaskItem(
                id=f"{label}/{file.name}",
                options=LABELS,
                answers=(label,),
                images=(ImageRef(source=file),),
                cluster=f"{label}/{file.name}",
            )
            for file, label in sorted(files, key=lambda pair: (pair[0].name, pair[1]))
        ]


TASK = RenderedSST2
