"""ImageNet-1k: which of 1,000 classes an image shows, by the likelihood of each class name.

Needs the files of https://image-net.org or Kaggle (for research), in one folder:

    LOC_synset_mapping.txt            the classes; their sorted numbers are the order of labels
    val/ILSVRC2012_val_*.JPEG         with LOC_val_solution.csv; or val/n01440764/*.JPEG
    train/n01440764/*.JPEG            for shots
    imagenet-simple-labels.json       if it is there: 1,000 short names in the order of labels, all different
                                      (github.com/anishathalye/imagenet-simple-labels, public domain)

Without short names a class is called by its first synonym. Names that two classes share count for both: HuggingFaceM4's
list has `missile` and `sunglasses` twice, which cost it 100 images. Shots come from 5 images of each class of `train`,
the larger of the card's support sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from sft.core.errors import UserError
from sft.core.sample import ImageRef
from sft.evaluation.draw_images import in_random_order
from sft.evaluation.official_files import official_layout, read_csv, read_json
from sft.evaluation.prompts import Prompt, TaskItem
from sft.evaluation.questions import RankedQuestions
from sft.evaluation.task import Typical

SHOTS_PER_CLASS = 5
NAMES = "imagenet-simple-labels.json"


class ImageNet(RankedQuestions):
    """Accuracy on ImageNet-1k."""

    name = "imagenet"
    splits = ("val", "train")
    typical = Typical(items={"val": 50_000}, query=8, shot=11, options=1_000, option=3, tree=2_676, shots=(16, 16))
    prompts: ClassVar[Mapping[str, Prompt]] = {
        "instruct": Prompt(
            question="{image}What is represented in this image?", answer="This is a photo of a {answer}."
        ),
        "base": Prompt(question="{image}a photo of a", answer=" {answer}.", is_document=True),
    }

    def read(self, folder: Path, split: str) -> list[TaskItem]:
        """Return the images of a split; of `train` 5 of each class."""
        names = class_names(folder)
        options = tuple(names.values())
        return [
            TaskItem(
                id=file.stem,
                options=options,
                answers=(names[wnid],),
                images=(ImageRef(source=file),),
                cluster=file.stem,
            )
            for file, wnid in _files(folder, split, list(names))
        ]


def class_names(folder: Path) -> dict[str, str]:
    """Return the name of each class by its WordNet number, in the order of labels."""
    mapping = folder / "LOC_synset_mapping.txt"
    with official_layout(mapping):
        lines = mapping.read_text(encoding="utf-8").splitlines()
        synonyms = dict(sorted(line.split(maxsplit=1) for line in lines if line.strip()))
        names = {wnid: text.split(",")[0].strip() for wnid, text in synonyms.items()}
    if (folder / NAMES).is_file():
        short = read_json(folder / NAMES)
        if not isinstance(short, list) or len(short) != len(names):
            raise UserError(f"{folder / NAMES}: expected a list of {len(names)} names, one for each class of {mapping}")
        names = dict(zip(names, map(str, short), strict=True))
    return names


def _files(folder: Path, split: str, wnids: list[str]) -> list[tuple[Path, str]]:
    """Return the images of a split with their classes."""
    solution = folder / "LOC_val_solution.csv"
    if split == "val" and solution.is_file():
        with official_layout(solution):
            rows = read_csv(solution)
            found = [(folder / split / f"{row['ImageId']}.JPEG", row["PredictionString"].split()[0]) for row in rows]
            if strange := [wnid for _, wnid in found if wnid not in wnids]:
                raise KeyError(f"class {strange[0]} in LOC_synset_mapping.txt")
            return sorted(found)
    found = []
    for wnid in wnids:
        names = sorted(file.name for file in (folder / split / wnid).glob("*.JPEG"))
        if split == "train":
            names = in_random_order(names, seed=0)[:SHOTS_PER_CLASS]
        found += [(folder / split / wnid / name, wnid) for name in names]
    if not found:
        raise UserError(f"{folder / split}: no images found; expected folders of classes like {wnids[0]}/*.JPEG")
    return found


TASK = ImageNet
