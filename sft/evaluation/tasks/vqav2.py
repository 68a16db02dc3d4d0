"""VQAv2: open questions about photographs of COCO, each answered by ten people.

Needs the official files of https://visualqa.org/download.html (annotations CC BY 4.0) in one folder:

    v2_OpenEnded_mscoco_val2014_questions.json    v2_mscoco_val2014_annotations.json    val2014/COCO_val2014_*.jpg

`train` has the same with train2014; `test` and `test-dev` come without answers. Shots come from `train`, whose files
are then needed too; so does the card's base prompt without shots, which shows two examples without their images.
"""

from __future__ import annotations

from pathlib import Path

from sft.evaluation.prompts import TaskItem
from sft.evaluation.task import Typical
from sft.evaluation.vqa import VQA, read_vqa

PARTS = {"val": "val2014", "train": "train2014", "test-dev": "test-dev2015", "test": "test2015"}
"""Split -> how its files are named."""


class VQAv2(VQA):
    """VQA accuracy on VQAv2."""

    name = "vqav2"
    splits = tuple(PARTS)
    typical = Typical(items={"val": 214_354, "test-dev": 107_394, "test": 447_793}, query=18, shot=22, option=5)

    def read(self, folder: Path, split: str) -> list[TaskItem]:
        """Return all questions of a split, in the order of their file; of `test` and `test-dev` without answers."""
        part, images = PARTS[split], PARTS[split].replace("-dev", "")
        return read_vqa(
            folder / f"v2_OpenEnded_mscoco_{part}_questions.json",
            None if split.startswith("test") else folder / f"v2_mscoco_{part}_annotations.json",
            lambda image: folder / images / f"COCO_{images}_{image:012d}.jpg",
        )


TASK = VQAv2
