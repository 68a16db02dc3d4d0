"""Captions of Flickr30k in Karpathy's splits: five captions that people wrote for each photograph.

Needs dataset_flickr30k.json of https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip, and the
images, which are given for research on request (https://shannon.cs.illinois.edu/DenotationGraph):

    dataset_flickr30k.json    flickr30k-images/*.jpg
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sft.data.formats import Row
from sft.evaluation.captions import Captions, read_karpathy
from sft.evaluation.prompts import TaskItem
from sft.evaluation.task import Typical

NUM_TRAIN = 29_000


class Flickr30k(Captions):
    """CIDEr-D on the captions of Flickr30k."""

    name = "flickr30k"
    splits = ("test", "val", "train")
    typical = Typical(items={"test": 1_000}, query=7, shot=23, option=15)

    def from_copy(self, rows: Sequence[Row]) -> list[TaskItem]:
        """Return the images of a copy; lmms-eval's calls all 31,783 of them `test`, which is refused."""
        if len(rows) > NUM_TRAIN:
            raise ValueError(f"{len(rows):,} images, those of all splits; take dataset_flickr30k.json")
        return super().from_copy(rows)

    def read(self, folder: Path, split: str) -> list[TaskItem]:
        """Return the images of a split, in the order of the file."""
        return read_karpathy(
            folder / "dataset_flickr30k.json", split, lambda image: folder / "flickr30k-images" / image["filename"]
        )


TASK = Flickr30k
