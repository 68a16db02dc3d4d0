"""CSV and TSV with a header, row by row."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sft.core.errors import UserError
from sft.core.sample import SkipSample
from sft.data.formats.content import NOT_UTF8, opened
from sft.data.formats.rows import Row, max_record_bytes, one_line, placed


def read_csv(path: Path) -> Iterator[Row | SkipSample]:
    """Yield the rows below the header as {column: text}. A tab, else a semicolon without a comma, in the header parts
    the columns, else a comma does.

    Raises:
        UserError: missing, not UTF-8, a column without a name or with another's, or a row over the limit.
    """
    with opened(path, "CSV with a header") as content:
        lines = _Lines(content.file, path)
        header = next(lines, "")
        names = next(csv.reader([header], delimiter=(by := _delimiter(header))), [])
        if not all(names) or len(set(names)) < len(names):
            raise UserError(
                f"{path}: the columns are {', '.join(map(repr, names))}; expected a name for each, each once"
            )
        csv.field_size_limit(lines.limit)
        rows, first = csv.reader(lines, delimiter=by), 2
        try:
            for values in rows:
                here, first, lines.num_bytes = f"{path.name}:{first}", lines.number + 1, 0
                if len(values) == len(names):
                    yield placed(dict(zip(names, values, strict=True)), here, content.share_read)
                elif values:
                    found = f"{len(values)} in place of {len(names)}"
                    yield SkipSample("row has other columns than the header", detail=found, where=here)
        except csv.Error as error:
            raise UserError(f"{path}:{first}: not readable as CSV: {one_line(error)}") from error


def _delimiter(header: str) -> str:
    return "\t" if "\t" in header else ";" if ";" in header and "," not in header else ","


class _Lines:
    """The lines of a text, which may not get longer than a record until `num_bytes` is set to 0."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.file, self.path = file, path
        self.limit = max_record_bytes.get()
        self.number = self.num_bytes = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.file.readline(self.limit + 1)
        self.number, self.num_bytes = self.number + 1, self.num_bytes + len(line)
        here = f"{self.path}:{self.number}"
        if self.num_bytes > self.limit:
            raise UserError(
                f"{here}: a row of over {self.limit:,} bytes (data.max_record_bytes); is a quote not closed?"
            )
        if not line:
            raise StopIteration
        try:
            return line.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{here}: byte 0x{line[error.start]:02x} {NOT_UTF8}; save it as UTF-8") from error
