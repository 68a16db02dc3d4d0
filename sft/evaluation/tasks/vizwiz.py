"""VizWiz: questions that blind people asked about their own photographs, each answered by ten people.

Needs the official files of https://vizwiz.org/tasks-and-datasets/vqa (CC BY 4.0):

    Annotations/val.json    val/VizWiz_val_*.jpg

`test` comes without answers. Shots come from `train`. A question has no number: its image names it. The records of
people have no numbers either, so the variants of VQA accuracy differ by up to 16 points here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from sft.data.formats import Row
from sft.evaluation.official_files import official_layout, read_json
from sft.evaluation.prompts import Prompt, TaskItem
from sft.evaluation.task import Typical
from sft.evaluation.vqa import VQA, vqa_item

PREFIX = "Task: Answer the questions based on the image when possible, otherwise say unanswerable.\n"


class VizWiz(VQA):
    """VQA accuracy on VizWiz."""

    name = "vizwiz"
    splits = ("val", "train", "test")
    typical = Typical(items={"val": 4_319, "test": 8_000}, query=18, shot=22, option=5)
    prompts: ClassVar[Mapping[str, Prompt]] = {
        **VQA.prompts,
        "base": replace(VQA.prompts["base"], prefix=PREFIX),
    }

    def read(self, folder: Path, split: str) -> list[TaskItem]:
        """Return all questions of a split, in the order of their file."""
        file = folder / "Annotations" / f"{split}.json"
        with official_layout(file):
            return [
                vqa_item(record, folder / split / record["image"], record["image"], record["image"])
                for record in read_json(file)
            ]

    def from_copy(self, rows: Sequence[Row]) -> list[TaskItem]:
        """Return the questions of the rows of a copy, which names its images without suffix."""
        items = super().from_copy(rows)
        names = [f"{str(item.id).removesuffix('.jpg')}.jpg" for item in items]
        return [replace(item, id=name, cluster=name) for item, name in zip(items, names, strict=True)]


TASK = VizWiz
