"""Which reader reads a file of records: the one place where a file's format is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from sft.core.sample import SkipSample
from sft.data.formats.json_text import read_json_list, read_jsonl
from sft.data.formats.parquet import read_parquet
from sft.data.formats.rows import Row

Reader = Callable[[Path], Iterator[Row | SkipSample]]

READERS: dict[str, Reader] = {".jsonl": read_jsonl, ".json": read_json_list, ".parquet": read_parquet}
"""Readers of files of records by suffix, in the order in which a folder is searched."""


def is_parquet(file: Path) -> bool:
    """Return whether a file is read as parquet."""
    return file.suffix.lower() == ".parquet"


def read_records(file: Path, otherwise: Reader = read_jsonl) -> Iterator[Row | SkipSample]:
    """Yield the records of a parquet file, or those of another file as `otherwise` reads it."""
    return (read_parquet if is_parquet(file) else otherwise)(file)
