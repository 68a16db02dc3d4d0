"""TextCaps: captions of photographs with text in them, five for each.

Needs the official files of https://textvqa.org/textcaps/dataset (CC BY 4.0), and TextVQA's images:

    TextCaps_0.1_val.json    train_images/<image_id>.jpg, which holds the images of `val` too

`test` has its images in test_images/ and comes without captions. A row of the files is a caption; an image is asked
once.
"""

from __future__ import annotations

from pathlib import Path

from sft.evaluation.captions import Captions, grouped
from sft.evaluation.official_files import official_layout, read_json
from sft.evaluation.prompts import TaskItem
from sft.evaluation.task import Typical


class TextCaps(Captions):
    """CIDEr-D on TextCaps."""

    name = "textcaps"
    splits = ("val", "train", "test")
    typical = Typical(items={"val": 3_166, "test": 3_289}, query=7, shot=23, option=15)

    def read(self, folder: Path, split: str) -> list[TaskItem]:
        """Return the images of a split, in the order of the file."""
        file = folder / f"TextCaps_0.1_{split}.json"
        images = folder / ("test_images" if split == "test" else "train_images")
        with official_layout(file):
            rows = read_json(file)["data"]
            captions = [[row["caption_str"]] if "caption_str" in row else [] for row in rows]
            numbers = [row["image_id"] for row in rows]
        return grouped(numbers, captions, [images / f"{number}.jpg" for number in numbers])


TASK = TextCaps
