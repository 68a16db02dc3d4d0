"""General Scene Difference: MIMIC-IT's CGD, 141,869 questions on what differs between two similar photographs of COCO.

Layout and source: see `_mimic_it.py`. Images come from the data, as PNG that Otter's converter made 224 pixels wide and
high, or at full size from COCO train2017, where `image_folder` says where that is: `CGD_IMG_000000328270` is
`000000328270.jpg`. An id of 16 digits was quoted in Otter#329, so the number counts, not its zeros.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from sft.core.errors import UserError
from sft.core.sample import ImageRef, Sample, SkipSample
from sft.data.datasets import _mimic_it
from sft.data.datasets._meaning import Keys
from sft.data.datasets._mimic_it import patterns, read_instructions, to_messages, two_images, two_of
from sft.data.datasets.llava_instruct import image_of
from sft.data.formats import Row, find_files, folder_of

LICENCE = "tagged MIT; the agreement on the hub allows scientific or research use only"
KEYS = Keys.of("instruction answer images image_ids rel_ins_ids")


def files(path: Path, split: str, *, image_folder: str | None = None) -> list[Path]:
    """Return the instructions, or the parquet files of the hub."""
    if image_folder is not None and not (folder := folder_of(path) / image_folder).is_dir():
        raise UserError(f"{folder}: folder not found; expected image_folder, the JPEG files of COCO train2017")
    return find_files(path, *patterns("CGD", split), what="CGD of MIMIC-IT, published as train only")


def beside(file: Path, *, image_folder: str | None = None) -> list[Path]:
    """Return the files of the images, unless they are COCO's."""
    return _mimic_it.beside(file) if image_folder is None else []


def rows(
    file: Path, split: str, *, image_folder: str | None = None, multi_turn: bool = False
) -> Iterator[Row | SkipSample]:
    """Yield a row for each instruction. `multi_turn`: related instructions on the same two images are one dialogue."""
    return read_instructions(file, multi_turn=multi_turn, with_images=image_folder is None)


def to_sample(row: Row, path: Path, *, image_folder: str | None = None) -> Sample:
    """Return one dialogue. `image_folder`, relative to the data's or absolute, has COCO's files or its `train2017`."""
    if image_folder is None:
        images = two_images(row)
    else:
        images = tuple(_coco_image(image, folder_of(path) / image_folder) for image in two_of(row.get("image_ids")))
    return Sample(key=f"general_scene_difference/{row['__from__']}", messages=to_messages(row, images))


def _coco_image(image: object, folder: Path) -> ImageRef:
    found = re.fullmatch("CGD_IMG_([0-9]{1,16})", image) if isinstance(image, str) else None
    if not found:
        raise SkipSample("image id is not one of COCO", detail=image[:200] if isinstance(image, str) else "")
    return image_of(f"{int(found[1]):012d}.jpg", folder)
