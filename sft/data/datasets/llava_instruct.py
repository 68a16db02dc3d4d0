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
40,688 records have no image, texts have blanks around them, and some dialogues open with an answer. LLaVA itself drops
a leading answer; a last question trains nothing, and is dropped too. Turns are otherwise read as those of `messages`.
"""

import os
from functools import partial
from pathlib import Path

from sft.core.images import local_image
from sft.core.sample import ImageRef, Sample, SkipSample
from sft.data.datasets._conversation import LLAVA, listed_images, to_messages
from sft.data.formats import Row, folder_of, require_file
from sft.data.formats.records import rows as rows

LICENCE = "CC-BY-4.0"
READS_HUB = True
VERSION = 3
KEYS = LLAVA
MERGED = "llava_instruct_150k.json"
PARTS = ("conversation_58k.json", "detail_23k.json", "complex_reasoning_77k.json")


def files(path: Path, split: str) -> list[Path]:
    """Return the file, or in a folder the merged list, or its three parts."""
    if path.is_file():
        return [path]
    if (path / MERGED).is_file():
        return [path / MERGED]
    return [require_file(path / part, f"{MERGED} or all of {', '.join(PARTS)}") for part in PARTS]


def to_sample(row: Row, path: Path, *, image_folder: str | None = None) -> Sample:
    """Return one conversation. `image_folder` is relative to the data's folder, which it is when not given."""
    find = partial(image_of, folder=folder_of(path) / (image_folder or ""))
    images = listed_images(row)
    messages = to_messages(row, row.get("conversations"), images, find, trims=True)
    return Sample(key=f"llava_instruct/{row['__from__']}", messages=messages)


def image_of(name: object, folder: Path) -> ImageRef:
    """Return the image with this name, in the folder itself or where COCO is unpacked below it."""
    if isinstance(name, str) and not name.isprintable():  # half of a surrogate pair cannot be looked for
        raise SkipSample("image is not a local path", detail=repr(name)[:200])
    for place in (name, f"train2017/{name}", f"coco/train2017/{name}"):
        image = local_image(folder, place)
        if os.path.isfile(image.source):  # Path.is_file raises where a name is too long
            return image
    return local_image(folder, name)  # is missed when it is read
