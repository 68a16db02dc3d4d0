"""Spot the Difference: what differs between two frames of a surveillance camera. Two forms, told apart by the file:

MIMIC-IT's SD, 15,989 questions and answers made from the sentences below: see `_mimic_it.py` for layout and source.

The original (https://github.com/harsh19/spot-the-diff), `data/annotations/{train,val,test}.json`, 9,524 + 1,634 + 1,404
records without questions; no licence is stated:

    [{"img_id": "42", "sentences": ["the man near the door is missing", …]}, …]

and images `resized_images/<img_id>.png`, `<img_id>_2.png`, from a Google Drive. A pair has up to three records. All is
in lower case without a final period; some sentences are empty, and in 47 + 6 + 7 records all are.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path

from sft.core.errors import UserError
from sft.core.images import local_image
from sft.core.sample import Sample, SkipSample, question_and_answer
from sft.data.datasets._meaning import Keys
from sft.data.datasets._mimic_it import beside as beside
from sft.data.datasets._mimic_it import patterns, read_instructions, to_messages, two_images
from sft.data.formats import Row, find_files, folder_of, is_table, read_records

LICENCE = "original: not stated; MIMIC-IT: tagged MIT, the agreement on the hub allows research use only"
KEYS = Keys.of("img_id sentences instruction answer images image_ids rel_ins_ids")
IMAGE_FOLDERS = ("resized_images", "data/resized_images", "../resized_images")
PROMPTS = (
    "What has changed from the first picture to the second?",
    "Compare the two images and say how they differ.",
    "These two frames were taken by the same camera. What is different?",
    "Tell me every difference you can see between these images.",
    "How does the second image differ from the first?",
    "Spot the difference!",
    "Look at both pictures closely. Which things are not the same?",
    "Write down what differs between the two scenes.",
    "Something may have moved, appeared or gone. What is it?",
    "List the changes between this pair of images.",
    "Can you see what is not the same in these two pictures?",
    "Please describe in short sentences how these two images differ.",
)


def files(path: Path, split: str, *, image_folder: str | None = None) -> list[Path]:
    """Return the instructions of MIMIC-IT, else the annotations of the original."""
    original = [f"{folder}{split}.json" for folder in ("", "annotations/", "data/annotations/")]
    what = "SD of MIMIC-IT, published as train only, or annotations of Spot-the-Diff"
    found = find_files(path, *patterns("SD", split), *original, what=what)
    if _is_original(found[0]):
        if not (folder := _image_folder(path, image_folder)).is_dir():
            raise UserError(f"{folder}: folder not found; expected the images of Spot-the-Diff (option image_folder)")
    elif image_folder is not None:
        raise UserError(f"{found[0]}: image_folder is for the original Spot-the-Diff; MIMIC-IT brings its images")
    return found


def rows(file: Path, split: str, *, multi_turn: bool = False) -> Iterator[Row | SkipSample]:
    """Yield a row for each record. `multi_turn`: related instructions on the same two images are one dialogue."""
    if not _is_original(file):
        return read_instructions(file, multi_turn=multi_turn)
    if multi_turn:
        raise UserError(f"{file}: multi_turn is for MIMIC-IT; the original Spot-the-Diff has no related records")
    return read_records(file)


def to_sample(
    row: Row, path: Path, *, image_folder: str | None = None, correct_casing: bool = True, seed: int = 0
) -> Sample:
    """Return one record as a sample. The other options are for the original: where its images lie (`resized_images`
    when not given), whether sentences get a capital and a final period, as HuggingFaceM4 gave them (the answers of
    other datasets have both), and what draws the prompt."""
    key = f"spot_the_difference/{row['__from__']}"
    if row.keys() & {"instruction", "answer", "image_ids"}:
        return Sample(key=key, messages=to_messages(row, two_images(row)))
    image, folder = row.get("img_id"), _image_folder(path, image_folder)
    if not isinstance(image, str) or not re.fullmatch("[0-9A-Za-z_-]{1,64}", image):
        found = "found " + ", ".join(name for name in row if not name.startswith("__"))
        raise SkipSample("img_id is not an id", detail=(image if isinstance(image, str) else found)[:200])
    images = (local_image(folder, f"{image}.png"), local_image(folder, f"{image}_2.png"))
    prompt = random.Random(f"{seed}/{key}").choice(PROMPTS)
    answer = _answer(row.get("sentences"), correct_casing)
    return Sample(key=key, messages=question_and_answer((*images, prompt), answer))


def _answer(sentences: object, correct_casing: bool) -> str:
    """Return the sentences that are not empty: in one line, or one a line where no periods part them."""
    if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
        raise SkipSample("sentences are not a list of text")
    said = [sentence.strip() for sentence in sentences if sentence.strip()]
    if not said:
        raise SkipSample("no sentence, or only empty ones")
    return " ".join(map(_corrected, said)) if correct_casing else "\n".join(said)


def _corrected(sentence: str) -> str:
    """Return a sentence with a capital first letter and a final period."""
    return sentence[0].upper() + sentence[1:] + ("" if sentence.endswith((".", "!", "?")) else ".")


def _is_original(file: Path) -> bool:
    """Return whether a file holds annotations; MIMIC-IT's are instructions by name, or a parquet."""
    return "_instructions" not in file.name and not is_table(file)


def _image_folder(path: Path, image_folder: str | None) -> Path:
    folders = [folder_of(path) / name for name in (IMAGE_FOLDERS if image_folder is None else [image_folder])]
    return next((folder for folder in folders if folder.is_dir()), folders[0])
