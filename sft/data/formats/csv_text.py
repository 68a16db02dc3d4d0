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
    the columns, else a comma does. The limit on records is one on a line and on a field.

    Raises:
        UserError: missing, not UTF-8, a column without a name or with another's, or something over the limit.
    """
    with opened(path, "CSV with a header") as content:
        lines = _lines(content.file, path)
        header = next(lines, "")
        by = "\t" if "\t" in header else ";" if ";" in header and "," not in header else ","
        names = next(csv.reader([header], delimiter=by), [])
        if not all(names) or len(set(names)) < len(names):
            raise UserError(
                f"{path}: the columns are {', '.join(map(repr, names))}; expected a name for each, each once"
            )
        csv.field_size_limit(max_record_bytes.get())
        rows, first = csv.reader(lines, delimiter=by), 2
        try:
            for values in rows:
                here, first = f"{path.name}:{first}", rows.line_num + 2
                if len(values) == len(names):
                    yield placed(dict(zip(names, values, strict=True)), here, content.share_read)
                elif values:
                    found = f"{len(values)} in place of {len(names)}"
                    yield SkipSample("row has other columns than the header", detail=found, where=here)
        except csv.Error as error:
            raise UserError(f"{path}:{first}: {one_line(error)}; is a quote not closed?") from error


def _lines(file: IO[bytes], path: Path) -> Iterator[str]:
    limit, number = max_record_bytes.get(), 0
    while line := file.readline(limit + 1):
        number += 1
        if len(line) > limit:
            raise UserError(f"{path}:{number}: a line of over {limit:,} bytes (data.max_record_bytes)")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = line[error.start]
            raise UserError(f"{path}:{number}: byte 0x{byte:02x} {NOT_UTF8}; save it as UTF-8") from error
