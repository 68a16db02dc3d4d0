"""VizWiz: questions that blind people asked about their own photographs, each answered by ten people.

Needs the official files of https://vizwiz.org/tasks-and-datasets/vqa (CC BY 4.0):

    Annotations/val.json    val/VizWiz_val_*.jpg

`test` comes without answers. Shots come from `train`. A question has no number: its image names it. The records of
people have no numbers either, so the variants of VQA accuracy differ by up to 16 points here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from sft.core.sample import ImageRef
from sft.evaluation.official_files import official_layout, read_json
from sft.evaluation.prompts import Prompt, TaskItem
from sft.evaluation.task import Typical
from sft.evaluation.vqa import VQA

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
                TaskItem(
                    id=record["image"],
                    text=record["question"].strip(),
                    answers=tuple(one["answer"] for one in record.get("answers", ())),
                    images=(ImageRef(source=folder / split / record["image"]),),
                    cluster=record["image"],
                    category=record.get("answer_type", ""),
                    data={"marks": [one["answer_confidence"] for one in record.get("answers", ())]},
                )
                for record in read_json(file)
            ]


TASK = VizWiz
