"""SVIT: 4.2M questions and answers about the 108,077 images of Visual Genome, by GPT-4 from annotations; CC BY 4.0.

https://huggingface.co/datasets/BAAI/SVIT (gated), where each file of `data/` is one list of

    {"image_id": 7, "conversations": [{"topic": "…", "content": [{"from": "user", "value": "What …?"},
                                                                 {"from": "gpt", "value": "…"}, …]}, …]}

    conversation.json        1.6M questions: three topics an image, five questions a topic
    complex_reasoning.json   1.6M questions: about fifteen an image, each with a content of its own
    detail_description.json  106K descriptions, asked for in one of 34 ways
    referring_qa.json        1.0M questions that point at things: `<st>man<ed> [x1, y1, x2, y2]`, as shares of the
                             image's sides, so that they hold at any size; they stay in the text as published
That layout is known from the authors' repository and two public converters; no published record was at hand.
By default the first two are read, whose 3.2M questions are what IDEFICS-instruct counted. A sample is a conversation;
with `unit: question` it is a question with its answer.

The authors' selections in LLaVA's form, `format/llava-v1.5/SVIT_core_150K…` and `SVIT_mix_665K…`, are read when the
path names one; their images are found by name below `image_folder`.

`test_image_ids.txt` of the authors' repository, laid beside the files or a folder up, names 10,808 held-out images.
They are left out of the tasks; the lists in LLaVA's form are taken as they are.
Known defects: no marker says where the image goes; 21 descriptions answer an empty message; boxes may be malformed.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from sft.core.errors import UserError
from sft.core.sample import Sample, SkipSample
from sft.data.datasets import _visual_genome, llava_instruct
from sft.data.datasets._conversation import LLAVA, listed_images, to_messages
from sft.data.formats import Row, find_files, folder_of, read_records

LICENCE = "CC-BY-4.0"
KEYS = LLAVA._replace(record=LLAVA.record | {"image_id", "turns", "held_out", "task", "place"})
Task = Literal["conversation", "complex_reasoning", "detail_description", "referring_qa"]
Unit = Literal["conversation", "question"]


def files(path: Path, split: str, *, tasks: list[Task] | None = None) -> list[Path]:
    """Return the file, or in a folder those of the tasks; there is no split but train."""
    if path.is_file():
        return [path]
    wanted = dict.fromkeys(tasks or ("conversation", "complex_reasoning"))
    found = [find_files(path, f"data/{task}.json", f"{task}.json", what="a file of SVIT, unzipped") for task in wanted]
    return [file for of_task in found for file in of_task]


def rows(
    file: Path, split: str, *, unit: Unit = "conversation", keep_held_out: bool = False
) -> Iterator[Row | SkipSample]:
    """Yield a row for each conversation, or for each question with its answer; one for each record in LLaVA's form."""
    held_out = frozenset() if keep_held_out else _held_out_ids(file)
    for record in read_records(file):
        if isinstance(record, SkipSample) or ("id" in record and "image_id" not in record):
            yield record
        else:
            image_id = record.get("image_id")
            record |= {"image_id": image_id, "held_out": str(image_id) in held_out, "task": file.stem}
            yield from _conversations(record, unit)


def beside(file: Path) -> list[Path]:
    """Return the list of the test images."""
    folders = (file.parent, file.parent / "data", file.parent.parent)
    return [path for folder in folders if (path := folder / "test_image_ids.txt").is_file()][:1]


def _held_out_ids(file: Path) -> frozenset[str]:
    """Return the ids of the test images; none without their list."""
    for listed in beside(file):
        ids = listed.read_text(encoding="utf-8-sig", errors="replace").split()
        if not ids or not all(image_id.isdecimal() for image_id in ids):
            raise UserError(f"{listed}: is not a list of numbers; expected an image id a line")
        return frozenset(ids)
    return frozenset()


def _conversations(record: Row, unit: Unit) -> Iterator[Row | SkipSample]:
    """Yield the conversations of an image, each with its place among them."""
    blocks = record.pop("conversations", None)
    if not isinstance(blocks, list) or not blocks:
        yield SkipSample("no conversations", detail=record["__from__"])
        return
    whole = record
    for number, block in enumerate(blocks):
        turns = block.get("content") if isinstance(block, dict) else None
        if isinstance(block, dict):  # its other keys are judged and counted as the record's
            record = whole | {key: block[key] for key in block if key not in KEYS.record | {"content", "topic"}}
        if unit == "question" and isinstance(turns, list) and turns:
            for start in range(0, len(turns), 2):
                yield record | {"turns": turns[start : start + 2], "place": f"{number}/{start // 2}"}
        else:
            yield record | {"turns": turns, "place": f"{number}"}


def to_sample(row: Row, path: Path, *, image_folder: str | None = None) -> Sample:
    """Return one conversation. `image_folder`, which holds VG_100K and VG_100K_2, is relative to the data's folder."""
    folder = folder_of(path) / (image_folder or "")
    if "image_id" not in row:  # LLaVA's form
        images, find = listed_images(row), partial(llava_instruct.image_of, folder=folder)
        messages = to_messages(row, row.get("conversations"), images, find, trims=True)
        return Sample(key=f"svit/{row['__from__']}", messages=messages)
    if row["held_out"]:
        raise SkipSample("held-out test image", filtered=True)
    find = partial(_visual_genome.image_of, folder=folder)
    messages = to_messages(row, row["turns"], [find(row["image_id"])], find, trims=True)
    texts = [item for message in messages for item in message.content if isinstance(item, str)]
    if len(texts) < len(messages):
        raise SkipSample("empty message")
    if any("message is empty" in text for text in texts[1::2]):  # how the authors found them, their issue 5
        raise SkipSample("error text for an answer", filtered=True)
    if row["task"] == "referring_qa" and not all(map(_boxes_are_sound, texts)):
        raise SkipSample("malformed box")
    return Sample(key=f"svit/{row['__from__']}/{row['image_id']}/{row['place']}", messages=messages)


def _boxes_are_sound(text: str) -> bool:
    """Return whether every bracket is a box and every name has both its marks; a name may stand without a box."""
    boxes = re.findall(r"\[([^\[\]]*)\]", text)
    names = re.findall(r"<st>[^<>]*<ed>", text)
    return (
        len(boxes) == text.count("[") == text.count("]")
        and len(names) == text.count("<st>") == text.count("<ed>")
        and all(map(_is_box, boxes))
    )


def _is_box(numbers: str) -> bool:
    """Return whether a text is `x1, y1, x2, y2` with 0 ≤ x1 < x2 ≤ 1 and the same for y."""
    try:
        x1, y1, x2, y2 = map(float, numbers.split(","))
    except ValueError:
        return False
    return 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
