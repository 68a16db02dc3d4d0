"""LLaVA-Instruct: conversations about COCO images, written by GPT from captions and boxes (so from memory); CC BY 4.0.

https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K, where each file is one list of

    {"id": "000000000001", "image": "000000000001.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat …?"}, {"from": "gpt", "value": "…"}, …]}

`llava_instruct_150k.json` is the merge of `conversation_58k.json`, `detail_23k.json` and `complex_reasoning_77k.json`;
a folder is read as the one or as the three, never as both. Any other list of this form is read when the path names it:
`llava_instruct_80k.json`, `llava_v1_5_mix665k.json`, or your own.

Images are those of COCO train2017, though the captions are of COCO 2014: `train2017/<name>` below `image_folder`, or
`<name>` itself. The mix names its images with folders: `coco/train2017/…`, `gqa/images/…`, `vg/VG_100K/…`.

Known defects: `<image>` stands before the question or after it; ids are not unique; in the mix some ids are integers,
40,688 records have no image, texts have blanks around them, and some dialogues open with an answer. An empty system
text, as tools that copy such lists write, is none; any other is an unknown role.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from sft.core.images import local_image
from sft.core.sample import ImageRef, Message, Role, Sample, SkipSample
from sft.data.datasets._system import without_empty_system
from sft.data.formats import Row, read_records, require_file

LICENCE = "CC-BY-4.0"
READS_HUB = True
VERSION = 2
MERGED = "llava_instruct_150k.json"
PARTS = ("conversation_58k.json", "detail_23k.json", "complex_reasoning_77k.json")
MARKER = "<image>"
ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant"}

Turn = tuple[Role, str]


def files(path: Path, split: str) -> list[Path]:
    """Return the file, or in a folder the merged list, or its three parts."""
    if path.is_file():
        return [path]
    if (path / MERGED).is_file():
        return [path / MERGED]
    return [require_file(path / part, f"{MERGED} or all of {', '.join(PARTS)}") for part in PARTS]


def rows(file: Path, split: str) -> Iterator[Row | SkipSample]:
    """Yield the records of one list."""
    return read_records(file)


def to_sample(row: Row, path: Path, *, image_folder: str | None = None) -> Sample:
    """Return one conversation. `image_folder` is relative to the data's folder, which it is when not given."""
    name = row.get("image")
    image = None if name is None else image_of(name, folder_of(path) / (image_folder or ""))
    return Sample(key=f"llava_instruct/{row['__from__']}", messages=to_messages(row.get("conversations"), image))


def folder_of(path: Path) -> Path:
    """Return the data's folder, where the path is the folder or its file."""
    return path if path.is_dir() else path.parent


def image_of(name: object, folder: Path) -> ImageRef:
    """Return the image with this name, in the folder itself or where COCO is unpacked below it."""
    if isinstance(name, str) and not name.isprintable():  # half of a surrogate pair cannot be looked for
        raise SkipSample("image is not a local path", detail=repr(name)[:200])
    for place in (name, f"train2017/{name}", f"coco/train2017/{name}"):
        image = local_image(folder, place)
        if os.path.isfile(image.source):  # Path.is_file raises where a name is too long
            return image
    return local_image(folder, name)  # is missed when it is read


def to_messages(conversations: object, image: ImageRef | None) -> tuple[Message, ...]:
    """Return LLaVA's turns as messages, the image where its marker stands, or first where there is none.

    Raises:
        SkipSample: the turns are not a conversation, or do not match the image.
    """
    turns = _question_first(conversations)
    num_markers = sum(text.count(MARKER) for _, text in turns)
    if num_markers and image is None:
        raise SkipSample("image marker without an image")
    if num_markers > 1:
        raise SkipSample("more than one image marker")
    if any(role == "assistant" and MARKER in text for role, text in turns):
        raise SkipSample("image marker in an answer")
    if image and not num_markers:
        turns[0] = ("user", MARKER + turns[0][1])
    return tuple(_message(role, text, image) for role, text in turns)


def _question_first(conversations: object) -> list[Turn]:
    """Return turns from a question to an answer: LLaVA itself drops a leading answer, and a last question trains
    nothing."""
    if not isinstance(conversations, list):
        raise SkipSample("conversations is not a list")
    turns = [_turn(turn) for turn in without_empty_system(conversations)]
    if turns and turns[0][0] == "assistant":
        del turns[0]
    if any(role != expected for (role, _), expected in zip(turns, cycle(("user", "assistant")), strict=False)):
        raise SkipSample("turns do not alternate")
    if len(turns) < 2:
        raise SkipSample("no question with an answer")
    return turns[: len(turns) // 2 * 2]


def _turn(turn: Any) -> Turn:
    said_by = turn.get("from") if isinstance(turn, dict) else None
    if not isinstance(said_by, str) or said_by not in ROLES:
        raise SkipSample("unknown role", detail=repr(said_by)[:200])
    if not isinstance(turn.get("value"), str):
        raise SkipSample("message is not text")
    return ROLES[said_by], turn["value"]


def _message(role: Role, text: str, image: ImageRef | None) -> Message:
    before, marker, after = (part.strip() for part in text.partition(MARKER))
    items: tuple[str | ImageRef | None, ...] = (before, image if marker else None, after)
    content = tuple(item for item in items if item)
    if not content:
        raise SkipSample("empty message")
    return Message(role=role, content=content)
