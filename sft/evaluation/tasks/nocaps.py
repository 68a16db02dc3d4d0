"""NoCaps: captions of photographs of Open Images, many with objects that COCO does not have; ten for each.

Needs the official files of https://nocaps.org/download (CC BY 2.0):

    nocaps_val_4500_captions.json    val/<file_name>

`test` has nocaps_test_image_info.json and test/, and comes without captions: the card's figures are of the server that
keeps them. Shots come from COCO's captions, as the card's did: --support names the folder of `coco_captions`, which may
be the same one.

A domain says how many objects of an image COCO knows. In its scores n-grams are weighed by the references of all
images; the figures with `own weights` weigh them by those of the domain alone, which gives other numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from sft.evaluation.captions import Captions, caption_item
from sft.evaluation.metrics.cider import CiderD
from sft.evaluation.official_files import official_layout, read_json
from sft.evaluation.prompts import TaskItem
from sft.evaluation.results import Result
from sft.evaluation.task import Answer, Typical
from sft.evaluation.tasks.coco_captions import CocoCaptions

FILES = {"val": "nocaps_val_4500_captions.json", "test": "nocaps_test_image_info.json"}
OWN = "own weights"


class NoCaps(Captions):
    """CIDEr-D on NoCaps, by domain."""

    name = "nocaps"
    splits = tuple(FILES)
    typical = Typical(items={"val": 4_500, "test": 10_600}, query=7, shot=23, option=15)

    def read(self, folder: Path, split: str) -> list[TaskItem]:
        """Return the images of a split, in the order of the file."""
        file = folder / FILES[split]
        captions: dict[int, list[str]] = defaultdict(list)
        with official_layout(file):
            content = read_json(file)
            for annotation in content.get("annotations", ()):
                captions[annotation["image_id"]].append(annotation["caption"])
            return [
                caption_item(
                    image["id"], captions[image["id"]], folder / split / image["file_name"], image.get("domain", "")
                )
                for image in content["images"]
            ]

    def read_support(self, folder: Path, named: str | None) -> list[TaskItem]:
        """Return the captions of COCO's `train`."""
        return CocoCaptions.__new__(CocoCaptions).read_items(Path(named) if named else folder, "train")

    @cached_property
    def _cider_of(self) -> dict[str, CiderD]:
        by_domain: dict[str, list[Sequence[str]]] = defaultdict(list)
        for item in (one for one in self.items if one.category):
            by_domain[item.category].append(item.answers)
        return {domain: CiderD(references) for domain, references in by_domain.items()}

    def figures(self, item: TaskItem, answers: Sequence[Answer]) -> dict[str, float]:
        """Return the CIDEr-D with weights of the item's domain."""
        return (
            {OWN: self._cider_of[item.category].score(answers[0].text, item.answers)}
            if item.answers and item.category
            else {}
        )

    def all_figures(self, result: Result) -> dict[str, float]:
        """Return the mean of each domain with its own weights."""
        by_domain: dict[str, list[float]] = defaultdict(list)
        for outcome in (one for one in result.outcomes if one.category):
            by_domain[f"{outcome.category}, {OWN}"].append(outcome.details["figures"][OWN])
        return {name: sum(values) / len(values) for name, values in sorted(by_domain.items())}


TASK = NoCaps
