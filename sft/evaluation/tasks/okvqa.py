"""OK-VQA: questions about photographs of COCO that need knowledge of the world, answered by five people, each twice.

Needs the official files of https://okvqa.allenai.org/download.html (CC BY 4.0), and COCO's images of 2014:

    OpenEnded_mscoco_val2014_questions.json    mscoco_val2014_annotations.json    val2014/COCO_val2014_*.jpg

The answers that are compared are the stemmed ones, under `answer`. Shots come from `train`.
"""

from __future__ import annotations

from pathlib import Path

from sft.evaluation.prompts import TaskItem
from sft.evaluation.task import Typical
from sft.evaluation.vqa import VQA, read_vqa


class OKVQA(VQA):
    """VQA accuracy on OK-VQA."""

    name = "okvqa"
    splits = ("val", "train")
    typical = Typical(items={"val": 5_046}, query=18, shot=22, option=5)

    def read(self, folder: Path, split: str) -> list[TaskItem]:
        """Return all questions of a split, in the order of their file."""
        part = f"{split}2014"
        return read_vqa(
            folder / f"OpenEnded_mscoco_{part}_questions.json",
            folder / f"mscoco_{part}_annotations.json",
            lambda image: folder / part / f"COCO_{part}_{image:012d}.jpg",
        )


TASK = OKVQA
