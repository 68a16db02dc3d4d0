"""TextVQA: questions about text in photographs of Open Images, each answered by ten people.

Needs the official files of https://textvqa.org/dataset (CC BY 4.0):

    TextVQA_0.5.1_val.json    train_images/<image_id>.jpg, which holds the images of `val` too

`test` has its images in test_images/ and comes without answers. Shots come from `train`.
"""

from __future__ import annotations

from pathlib import Path

from sft.evaluation.official_files import official_layout, read_json
from sft.evaluation.prompts import TaskItem
from sft.evaluation.task import Typical
from sft.evaluation.vqa import VQA, vqa_item


class TextVQA(VQA):
    """VQA accuracy on TextVQA."""

    name = "textvqa"
    splits = ("val", "train", "test")
    typical = Typical(items={"val": 5_000}, query=18, shot=22, option=5)

    def read(self, folder: Path, split: str) -> list[TaskItem]:
        """Return all questions of a split, in the order of their file."""
        file = folder / f"TextVQA_0.5.1_{split}.json"
        images = folder / ("test_images" if split == "test" else "train_images")
        with official_layout(file):
            return [
                vqa_item(
                    record, images / f"{record['image_id']}.jpg", record["question_id"], f"image {record['image_id']}"
                )
                for record in read_json(file)["data"]
            ]


TASK = TextVQA
