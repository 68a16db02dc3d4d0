"""Parquet files, a few rows at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sft.core.errors import UserError, printable
from sft.core.sample import SkipSample
from sft.data.formats.parquet_footer import BYTE_ARRAY, ColumnSizes, column_sizes
from sft.data.formats.rows import TOO_LONG, Row, max_record_bytes, one_line, placed, require_file

IMAGES_A_ROW = 4
"""A row of a parquet file may hold so many images of the size of a record, since it holds them as they are."""
BATCH_BYTES = 64 * 1024 * 1024
BATCH_ROWS = 64
"""So much of a parquet file is unpacked at a time, about."""
MAX_UNPACKED_BYTES = 256 * 1024 * 1024
MAX_UNPACKED_TIMES = 1000
"""A column of more bytes than that many times what it is packed into is a bomb: a page of it is unpacked as a whole."""


def read_parquet(path: Path, *, columns: Sequence[str] | None = None) -> Iterator[Row | SkipSample]:
    """Yield the rows of a parquet file, a few at a time; only some `columns`, where that spares reading.

    The limit on records is one on the text of a row, and on each of its images by itself.

    Raises:
        UserError: missing, cut off, or not parquet.
    """
    return rows_of(require_file(path, "a parquet file"), "parquet", _with_shares(path, columns))


def _with_shares(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[Any, float]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, memory_map=True) as file:
        num_rows = 0
        for batch in batches(path, file, columns):
            num_rows += batch.num_rows
            yield batch, num_rows / file.metadata.num_rows


def rows_of(path: Path, kind: str, batches: Iterator[tuple[Any, float]]) -> Iterator[Row | SkipSample]:
    """Yield the rows of Arrow batches, which come with how much of the file was read.

    Raises:
        UserError: the file is damaged.
    """
    import pyarrow as pa

    limit, number = max_record_bytes.get(), 0
    try:
        for batch, share in batches:
            for place in range(batch.num_rows):
                number += 1
                here = f"{path.name}:{number}"
                one = batch.slice(place, 1)
                if one.nbytes > limit and _is_too_long(one, limit):
                    yield SkipSample(TOO_LONG, where=here)
                else:
                    yield _converted(one, here, share)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as {kind} after row {number}: {one_line(error)}") from error


def batches(path: Path, file: Any, columns: Sequence[str] | None = None) -> Iterator[Any]:
    """Yield an open parquet file, or only some `columns` of it, in Arrow batches of about BATCH_BYTES.

    Raises:
        UserError: a column is a bomb.
        OSError, pyarrow.ArrowException, UnicodeDecodeError: the file is damaged.
    """
    for group, sizes in enumerate(column_sizes(path)):
        wanted = [one for one in sizes if columns is None or one.name.partition(".")[0] in columns]
        num_rows = _batch_rows(path, int(file.metadata.row_group(group).num_rows), wanted)
        yield from file.iter_batches(batch_size=num_rows, row_groups=[group], columns=columns)


def _batch_rows(path: Path, num_rows: int, columns: Sequence[ColumnSizes]) -> int:
    """Return how many rows of a row group make up BATCH_BYTES, at the most; `columns` tell how large they are
    unpacked.

    Raises:
        UserError: they are a bomb.
    """
    num_bytes = 0
    for one in columns:
        if one.kind == BYTE_ARRAY and one.unpacked > max(MAX_UNPACKED_BYTES, MAX_UNPACKED_TIMES * one.packed):
            name = printable(one.name)
            raise UserError(f"{path}: column {name} unpacks {one.packed:,} bytes into {one.unpacked:,}, as no data do")
        num_bytes += one.unpacked
        if one.kind == BYTE_ARRAY and one.dictionary_at:  # any value may be all of it
            num_bytes += one.num_values * _dictionary_bytes(path, one)
    return min(max(BATCH_BYTES * num_rows // max(num_bytes, 1), 1), BATCH_ROWS)


def _dictionary_bytes(path: Path, column: ColumnSizes) -> int:
    """Return the unpacked size of a column's dictionary: the second number in the header of its page."""
    with path.open("rb") as file:
        file.seek(max(column.dictionary_at, 0))
        found = _PAGE_HEADER.match(file.read(16))
    if not found:
        return column.unpacked
    varint: bytes = found[1]
    return sum((byte & 127) << 7 * place for place, byte in enumerate(varint)) // 2  # a zigzag varint


_PAGE_HEADER = re.compile(rb"\x15[\x00-\x7f]\x15([\x80-\xff]{0,4}[\x00-\x7f])", re.DOTALL)
"""How Thrift writes a page's kind and size."""


def _is_too_long(one: Any, limit: int) -> bool:
    """Return whether the text of a row is over the limit, or one of its images, or all of them together by far."""
    num_bytes = [size for column in one.columns for size in _binary_sizes(column)]
    return max(num_bytes, default=0) > limit or one.nbytes - sum(num_bytes) > limit or one.nbytes > IMAGES_A_ROW * limit


def _binary_sizes(values: Any) -> list[int]:
    """Return the sizes of the bytes anywhere in an Arrow array."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type):
        return [size or 0 for size in pc.binary_length(values).to_pylist()]
    if pa.types.is_struct(values.type):
        return [size for field in values.flatten() for size in _binary_sizes(field)]
    return _binary_sizes(values.flatten()) if pa.types.is_list(values.type) else []


def _converted(one: Any, here: str, at: float) -> Row | SkipSample:
    try:
        row: Row = one.to_pylist()[0]
    except (ValueError, OverflowError):  # text that is not UTF-8, a date in the year 60000
        return SkipSample("row has a value that cannot be read", where=here)
    return placed(row, here, at)
