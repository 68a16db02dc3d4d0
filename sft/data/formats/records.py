"""Files of records: the one place where a file's reader is chosen, by what it holds."""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from sft.core.errors import UserError
from sft.core.sample import SkipSample
from sft.data.formats.content import READ, Kind, kind_of
from sft.data.formats.csv_text import read_csv
from sft.data.formats.json_text import read_json_list, read_json_object, read_jsonl
from sft.data.formats.parquet import read_arrow, read_parquet
from sft.data.formats.rows import Row
from sft.data.formats.tar import read_tar

Reader = Callable[[Path], Iterator[Row | SkipSample]]

READERS: dict[Kind, Reader] = {
    "lines": read_jsonl,
    "list": read_json_list,
    "object": read_json_object,
    "csv": read_csv,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
"""Readers by what a file holds, whatever it is called."""
_ENDING = r"\.(jsonl|ndjson|json|parquet|arrow|csv|tsv)(\.(gz|zst))?"


def read_records(
    file: Path, *, columns: Sequence[str] | None = None, members: Sequence[str] = ()
) -> Iterator[Row | SkipSample]:
    """Yield the records of a file; of parquet only `columns`, of a tar the members whose extensions are `members`.
    Raise UserError where it is missing, empty, damaged or no file of records, or a tar without `members`."""
    kind = kind_of(file)
    if kind == "tar" and members:
        return read_tar(file, members)
    if kind in ("tar", "empty"):
        what = "is a tar; unpack it" if kind == "tar" else "the file is empty"
        raise UserError(f"{file}: {what}; expected {READ}")
    return (partial(read_parquet, columns=columns) if kind == "parquet" else READERS[kind])(file)


def rows(file: Path, split: str) -> Iterator[Row | SkipSample]:
    """Yield the records of a file, as an adapter's `rows` does that changes none."""
    return read_records(file)


def is_table(file: Path) -> bool:
    """Return whether a file is parquet or Arrow."""
    return kind_of(file) in ("parquet", "arrow")


def record_files(folder: Path, stem: str) -> list[Path]:
    """Return the files of a folder that are named by `stem`, a regular expression, and an ending: `train.jsonl.gz`."""
    pattern = re.compile(stem + _ENDING)
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(file for file in files if pattern.fullmatch(file.name) and file.is_file())
