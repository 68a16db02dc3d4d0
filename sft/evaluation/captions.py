"""What benchmarks of image captions have in common: prompts, stop words, and CIDEr-D."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any, ClassVar

from sft.core.metric import Metric
from sft.core.sample import ImageRef
from sft.data.formats import Row
from sft.evaluation.copies import first, texts
from sft.evaluation.metrics.cider import CiderD
from sft.evaluation.official_files import official_layout, read_json
from sft.evaluation.prompts import Prompt, TaskItem
from sft.evaluation.questions import OpenQuestions
from sft.evaluation.task import Answer

IMAGE_IDS = ("image_id", "cocoid", "img_id", "imgid", "question_id", "index")
CAPTIONS = ("annotations_captions", "caption_str", "sentences_raw", "sentences", "captions", "caption", "answer")
"""Columns of copies."""


class Captions(OpenQuestions):
    """CIDEr-D of captions; n-grams are weighed by the references of the items that are asked."""

    metric = Metric(name="CIDEr-D", is_share=False)
    unit = "captions"
    prompts: ClassVar[Mapping[str, Prompt]] = {
        "instruct": Prompt(question="{image}Describe the image briefly."),
        "base": Prompt(question="Image:{image}Caption:", answer=" {answer}\n", is_document=True),
    }
    has_copies = True
    primed = 2
    stop_words = ("Caption", "Description", "User", "Image", "task")

    @cached_property
    def cider(self) -> CiderD:
        """The metric, with the references of all items."""
        return CiderD([item.answers for item in self.items])

    def score(self, item: TaskItem, answers: Sequence[Answer]) -> float:
        """Return the CIDEr-D of a caption."""
        return self.cider.score(answers[0].text, item.answers)

    def from_copy(self, rows: Sequence[Row]) -> list[TaskItem]:
        """Return the images of a copy, whose rows are images or captions, with all their captions."""
        captions = [[own["raw"] if isinstance(own, dict) else own for own in texts(row, *CAPTIONS)] for row in rows]
        numbers = [first(row, *IMAGE_IDS) for row in rows]
        return grouped(numbers, captions, [row["image"] for row in rows], [row.get("domain", "") for row in rows])


def grouped(
    numbers: Iterable[int | str],
    captions: Iterable[Sequence[str]],
    images: Iterable[Path],
    categories: Iterable[str] = repeat(""),
) -> list[TaskItem]:
    """Return an item for each image of rows of captions, with those of all its rows."""
    found: dict[int | str, TaskItem] = {}
    for number, own, image, category in zip(numbers, captions, images, categories, strict=False):
        before = found[number].answers if number in found else ()
        found[number] = caption_item(number, (*before, *own), image, category)
    return list(found.values())


def read_karpathy(file: Path, split: str, image_of: Callable[[Mapping[str, Any]], Path]) -> list[TaskItem]:
    """Return the images of a split of Karpathy's files with their captions; `restval` belongs to `train`.

    Raises:
        UserError: the file is missing or not of the official layout.
    """
    parts = ("train", "restval") if split == "train" else (split,)
    with official_layout(file):
        return [
            caption_item(
                image.get("cocoid", image["imgid"]), [one["raw"] for one in image["sentences"]], image_of(image)
            )
            for image in read_json(file)["images"]
            if image["split"] in parts
        ]


def caption_item(number: int | str, captions: Sequence[str], image: Path, category: str = "") -> TaskItem:
    """Return an image with the captions that people wrote for it."""
    return TaskItem(
        id=number,
        answers=tuple(captions),
        images=(ImageRef(source=image),),
        cluster=f"image {number}",
        category=category,
    )
