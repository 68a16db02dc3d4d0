"""LLaVAR: conversations about text-rich LAION images, by GPT-4 from OCR and captions (so from memory); CC BY-NC 4.0.

https://huggingface.co/datasets/SALT-NLP/LLaVAR: `llava_instruct_150k_llavar_16k.json` is one list in the form of
LLaVA-Instruct that begins with all of LLaVA-Instruct-150K; only its last 15,500 records are LLaVAR's own (so M4's
create_llavar.py). `llava_instruct_150k_llavar_20k.json` has 19,800 of its own, with image ids that begin with 1000;
that they too come last is assumed. A list of any other name is taken whole, as one of LLaVAR's own records only.

Images come in `finetune.zip`, unpacked to `finetune/<image>`. Their names look like COCO's but are made up.
"""

from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from sft.core.sample import Sample, SkipSample
from sft.data.datasets._conversation import LLAVA, to_messages
from sft.data.datasets.llava_instruct import image_of
from sft.data.formats import Row, find_files, folder_of, read_records

LICENCE = "CC-BY-NC-4.0"
KEYS = LLAVA
SMALL, LARGE = "llava_instruct_150k_llavar_16k.json", "llava_instruct_150k_llavar_20k.json"
OWN_RECORDS = {SMALL: 15_500, LARGE: 19_800}


def files(path: Path, split: str) -> list[Path]:
    """Return the file, or the 16k list of a folder (15.5K is what IDEFICS was trained on), or its 20k list."""
    return find_files(path, SMALL, LARGE, what="a list of LLaVAR; one of another name is named in `path`")


def rows(file: Path, split: str, *, own_records: int | None = None) -> Iterator[Row | SkipSample]:
    """Yield the last `own_records` of the list; left out, as many as the published file of this name has, else all."""
    own = OWN_RECORDS.get(file.name) if own_records is None else own_records
    if own is None:
        yield from read_records(file)
        return
    last: deque[Row | SkipSample] = deque()
    for row in read_records(file):
        last.append(row)
        if len(last) > own:
            last.popleft()
            yield SkipSample("record of LLaVA-Instruct", filtered=True)
    yield from last


def to_sample(row: Row, path: Path, *, image_folder: str = "finetune") -> Sample:
    """Return one conversation. `image_folder` is relative to the data's folder, or absolute."""
    find = partial(image_of, folder=folder_of(path) / image_folder)
    messages = to_messages(row, row.get("conversations"), [find(row.get("image"))], find, trims=True)
    return Sample(key=f"llavar/{row['__from__']}", messages=messages)
