"""Captions of COCO in Karpathy's splits: five captions that people wrote for each photograph.

Needs dataset_coco.json of https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip, and COCO's images
of 2014 (captions CC BY 4.0):

    dataset_coco.json    val2014/COCO_val2014_*.jpg    train2014/COCO_train2014_*.jpg, for shots

The images of its `restval`, which is a part of `train`, are in val2014.
"""

from __future__ import annotations

from pathlib import Path

from sft.evaluation.captions import Captions, read_karpathy
from sft.evaluation.prompts import TaskItem
from sft.evaluation.task import Typical


class CocoCaptions(Captions):
    """CIDEr-D on COCO's captions."""

    name = "coco_captions"
    splits = ("test", "val", "train")
    typical = Typical(items={"test": 5_000}, query=7, shot=23, option=15)

    def read(self, folder: Path, split: str) -> list[TaskItem]:
        """Return the images of a split, in the order of the file."""
        return read_karpathy(
            folder / "dataset_coco.json", split, lambda image: folder / image["filepath"] / image["filename"]
        )


TASK = CocoCaptions
