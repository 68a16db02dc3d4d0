"""Copies of a benchmark that are not its official files: parquet files of the hub, and tables of VLMEvalKit.

Images inside are written once, to files of the user's cache named by their content, so that few are in memory.
"""

import hashlib
import re
from ast import literal_eval
from functools import lru_cache
from pathlib import Path
from typing import Any

from sft.core.errors import UserError
from sft.core.files import explain_full_disk, whole_file
from sft.core.images import base64_image
from sft.core.sample import SkipSample
from sft.core.shipped import user_cache
from sft.data.formats import Row, read_parquet
from sft.data.formats.csv_text import read_csv

TABLES = {
    "textvqa_val": "TextVQA_VAL.tsv",
    "vizwiz_val": "VizWiz.tsv",
    "coco_captions_val": "COCO_VAL.tsv",
    "scienceqa_val": "ScienceQA_VAL.tsv",
    "scienceqa_test": "ScienceQA_TEST.tsv",
}
"""Benchmark -> VLMEvalKit's table of it."""
PARTS = {"val": ("validation", "val2014"), "train": ("train2014",), "test-dev": ("testdev",)}
"""Split -> what else parquet files of it are called."""


def find_copy(folder: Path, split: str, table: str) -> tuple[Path, ...]:
    """Return the files of a split: its table, or parquet files that are named by it or whose folder is. `folder` may be
    one of them. Raise UserError where several folders have it, or some files are missing."""
    names = {split, *PARTS.get(split, ()), *([Path(table).stem] if table else [])}
    files = [folder] if folder.is_file() else sorted([*folder.glob("*.tsv"), *folder.rglob("*.parquet")])
    found = [file for file in files if {re.sub(r"-\d+-of-\d.*", "", file.stem), file.parent.name} & names]
    if len(folders := sorted({str(file.parent) for file in found})) > 1:
        raise UserError(f"{folder}: {split} is in {' and '.join(folders)}; name one of these folders")
    of = re.search(r"-of-(\d+)", found[0].stem) if found else None
    if of and len(found) != int(of[1]):
        raise UserError(f"{folders[0]}: {len(found)} of {int(of[1])} files of {split} are there; expected all")
    return tuple(found)


@lru_cache(maxsize=4)
def copied_rows(files: tuple[Path, ...], folder: Path) -> list[Row]:
    """Return the rows of a copy, `image` a path: one below `folder` where the copy has no more than a name, and one
    where nothing is for a row without an image. Raise UserError for damage, or a cache that cannot be written."""
    found: list[Row] = []
    of_index: dict[str, Path] = {}
    for file in files:
        for place, row in enumerate(read_parquet(file) if file.suffix == ".parquet" else read_csv(file), start=1):
            try:
                if isinstance(row, SkipSample):
                    raise row
                held = row.get("image")
                written = (isinstance(held, str) and of_index.get(held)) or _written(held)
            except SkipSample as skip:
                raise UserError(f"{file}: row {place}: {skip.explained}") from skip
            named = folder / (row.get("filepath") or "") / (row.get("filename") or f"image of row {place}")
            # A later row of a table may name this one.
            row["image"] = of_index[str(row.get("index"))] = written or named
            found.append(row)
    return found


def _written(held: Any) -> Path | None:
    """Return the file of an image that is base64, bytes, or a struct of bytes; None where there is none."""
    held = held.get("bytes") if isinstance(held, dict) else held
    content = base64_image(held).source if isinstance(held, str) and held else held
    if not isinstance(content, bytes):
        return None
    digest = hashlib.sha256(content).hexdigest()
    file = user_cache() / "benchmark_images" / digest[:2] / digest
    try:
        if not file.is_file():
            with explain_full_disk(file, "name another folder in IDEFICS_SFT_CACHE"), whole_file(file) as written:
                written.write(content)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; name a folder of yours in IDEFICS_SFT_CACHE") from error
    return file


def first(row: Row, *names: str) -> Any:
    """Return the value of the first of these columns that the row has; of a list in a table, which is Python's, the
    list. Raise KeyError where it has none of them."""
    found = row[next((name for name in names if name in row), names[0])]
    return literal_eval(found) if isinstance(found, str) and found.startswith("[") else found


def texts(row: Row, *names: str) -> list[Any]:
    """Return the same as a list, also of a single text; an empty one where there is nothing."""
    found = first(row, *names)
    return [found] if isinstance(found, str) and found else list(found or ())
