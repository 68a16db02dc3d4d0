"""CSV and TSV with a header, row by row."""

import csv
import io
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO

from sft.core.errors import UserError
from sft.core.sample import SkipSample
from sft.data.formats.content import NOT_UTF8, opened
from sft.data.formats.rows import Row, max_record_bytes, one_line, placed


def read_csv(path: Path) -> Iterator[Row | SkipSample]:
    """Yield the rows below the header as {column: text}. A line `sep=;`, as Excel writes it, else a tab, else a
    semicolon without a comma, in the header parts the columns, else a comma does. A column without a name, such as the
    index that pandas writes, is `column 1`. The limit on records is one on a line and on a field. Raise UserError where
    it is missing, not UTF-8, or over the limit, has no header or one that has a name twice, or an open quote."""
    with opened(path, "CSV with a header") as content:
        rows = _parsed(_lines(content.file, path), path)
        header = next(rows, (1, [], ""))[1]
        names = [name or f"column {place}" for place, name in enumerate(header, 1)]
        if not any(header) or len(set(names)) < len(names):
            found = ", ".join(map(repr, header)) or "none"
            raise UserError(f"{path}: the columns are {found}; expected a name for each, each once")
        for number, values, fault in rows:
            here = f"{path.name}:{number}"
            if len(values) == len(names):
                yield placed(dict(zip(names, values, strict=True)), here, content.share_read)
            elif values or fault:
                reason = "row has a stray quote" if fault else "row has other columns than the header"
                yield SkipSample(reason, detail=fault or f"{len(values)} in place of {len(names)}", where=here)


def _parsed(lines: Iterator[str], path: Path) -> Iterator[tuple[int, list[str], str]]:
    """Yield the number of the line of each row, its values, and what is wrong with its quotes."""
    header = next(lines, "")
    stated = re.fullmatch(r"sep=(.)\s*", header)
    by = "\t" if "\t" in header else ";" if ";" in header and "," not in header else ","
    by = stated[1] if stated else by
    rows = csv.reader(lines if stated else chain([header], lines), delimiter=by, strict=True)
    column = re.compile(f"{re.escape(by)}(?! )")  # a comma of a text has a blank behind it
    while True:
        start, number = rows.line_num, rows.line_num + (2 if stated else 1)
        try:
            if (values := _next(rows)) is None:
                return
        except csv.Error as error:
            if " expected after " not in str(error):
                raise UserError(f"{path}:{number}: {one_line(error)}; is a quote not closed?") from error
            yield number, [], f"{one_line(error)}; expected each quote of a quoted text twice"
            continue
        inside = re.split(r"\r\n?|\n", by.join(values)) if rows.line_num > start + 1 else []
        if inside and len(values) > 1 and all(len(column.findall(line)) == len(values) - 1 for line in inside):
            fault = f"it joins lines {number} to {number + len(inside) - 1}, each of which is a row by itself"
            yield from ((number + place, [], fault) for place in range(len(inside)))
        else:
            yield number, values, ""


def _next(rows: Iterator[list[str]]) -> list[str] | None:
    """Return the next row under the limit on records; csv has one limit for all of its readers, which is set back."""
    before = csv.field_size_limit(max_record_bytes.get())
    try:
        return next(rows, None)
    finally:
        csv.field_size_limit(before)


def _lines(file: IO[bytes], path: Path) -> Iterator[str]:
    limit, number = max_record_bytes.get(), 0
    while line := file.readline(limit + 1):
        number += 1
        if len(line) > limit:
            raise UserError(f"{path}:{number}: a line of over {limit:,} bytes (data.max_record_bytes)")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = line[error.start]
            raise UserError(f"{path}:{number}: byte 0x{byte:02x} {NOT_UTF8}; save it as UTF-8") from error
        yield from io.StringIO(text, newline="")  # of old Macs a line ends at \r
