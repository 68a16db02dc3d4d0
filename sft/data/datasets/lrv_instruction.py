"""LRV-Instruction: questions about Visual Genome images with answers by GPT-4, some about things not there.

https://github.com/FuxiaoLiu/LRV-Instruction; its download.txt lists the files, on Google Drive. `filter_cap.json` is

    {"image_id": "1000001", "question": "Is there …?", "answer": "There is no …", "task": "negative"}

many times over, as a list or under {"annotations": […]} (the latter as its MiniGPT-4 code reads it; that Drive has bare
lists is from memory). There are two releases, of 150k and 180k records, each also without coordinates. The folder is
that of the authors' README, `filter_cap.json` beside `image/<id>.jpg`; folders VG_100K and VG_100K_2 will do as well.
No licence of the data is stated; that of the code is BSD-3-Clause.

Known defects: GPT-4's coordinates ("X:10 Y:20 Width:30 Height:40", in pixels) are not accurate, in the authors' words;
negative answers speak of what is not "mentioned", as if the image were its caption; some questions are statements.
"""

import re
from pathlib import Path

from sft.core.sample import Sample, SkipSample, question_and_answer
from sft.data.datasets._meaning import Keys
from sft.data.datasets._visual_genome import image_of
from sft.data.formats import Row, find_files, folder_of
from sft.data.formats.records import rows as rows

LICENCE = "not stated (code BSD-3-Clause)"
KEYS = Keys.of("image_id question answer task")
NUMBER = r"\W{1,3}[\d.]+"
COORDINATES = re.compile(rf"\b(X{NUMBER}\W{{0,3}}Y{NUMBER}|Width{NUMBER}\W{{0,3}}Height{NUMBER})", re.IGNORECASE)


def files(path: Path, split: str) -> list[Path]:
    """Return the file, or `filter_cap.json` of the folder."""
    return find_files(path, "filter_cap.json", what="a list of LRV-Instruction; one of another name is named in `path`")


def to_sample(row: Row, path: Path, *, image_folder: str = "image", with_coordinates: bool = True) -> Sample:
    """Return one question with its answer. `image_folder` is relative to the data's folder, or absolute."""
    question, answer = _text(row, "question"), _text(row, "answer")
    if not with_coordinates and (COORDINATES.search(question) or COORDINATES.search(answer)):
        raise SkipSample("coordinates in the text", filtered=True)
    image = image_of(row.get("image_id"), folder_of(path) / image_folder)
    return Sample(key=f"lrv_instruction/{row['__from__']}", messages=question_and_answer((image, question), answer))


def _text(row: Row, field: str) -> str:
    text = row.get(field)
    if not isinstance(text, str) or not text.strip():
        raise SkipSample(f"no {field}")
    return text.strip()
