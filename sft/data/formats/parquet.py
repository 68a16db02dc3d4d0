"""Parquet files, a few rows at a time, and Arrow files and streams, as `datasets` caches and saves them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sft.core.errors import UserError
from sft.core.sample import SkipSample
from sft.data.formats.rows import TOO_LONG, Row, max_record_bytes, one_line, placed, require_file

IMAGES_A_ROW = 4
"""A row of a parquet file may hold so many images of the size of a record, since it holds them as they are."""
BATCH_BYTES = 64 * 1024 * 1024
BATCH_ROWS = 8
"""So much of a parquet file is unpacked at a time, about. Equal values may be written once, so that each row can be as
large as the largest: the few rows bound these too, and one row at a time would take 30 us more for each."""
MAX_UNPACKED_BYTES = 256 * 1024 * 1024
MAX_UNPACKED_TIMES = 1000
"""A row group of more bytes than that many times its whole file is a bomb: a page of it is unpacked as a whole."""


def read_parquet(path: Path, *, columns: Sequence[str] | None = None) -> Iterator[Row | SkipSample]:
    """Yield the rows of a parquet file, or only some `columns`, a few at a time. The limit on records is one on the
    text of a row, and on each of its images by itself. Raise UserError where it is missing, cut off or not parquet."""
    return _rows_of(require_file(path, "a parquet file"), "parquet", _with_shares(path, columns))


def _with_shares(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[Any, float]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, memory_map=True) as file:
        num_rows = 0
        for batch in batches(path, file, columns):
            num_rows += batch.num_rows
            yield batch, num_rows / file.metadata.num_rows


def read_arrow(path: Path) -> Iterator[Row | SkipSample]:
    """Yield the rows of an Arrow file or stream, mapped into memory; limit and errors are those of `read_parquet`."""
    return _rows_of(require_file(path, "an Arrow file"), "Arrow", _arrow_batches(path))


def _arrow_batches(path: Path) -> Iterator[tuple[Any, float]]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
            batch.validate(full=True)  # else its offsets and texts are taken as they are
            yield batch, file.tell() / file.size()


def _rows_of(path: Path, kind: str, batches: Iterator[tuple[Any, float]]) -> Iterator[Row | SkipSample]:
    """Yield the rows of Arrow batches, which come with how much of the file was read; raise UserError for damage."""
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
    """Yield an open parquet file, or only some `columns` of it, in Arrow batches of about BATCH_BYTES. What the file
    says of single columns is not asked for: pyarrow ends the process where that is damaged (pyarrow 26:
    `RowGroupMetaData.column()`). Raise UserError where a row group is a bomb; OSError, pyarrow.ArrowException or
    UnicodeDecodeError where the file is damaged."""
    packed = path.stat().st_size
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        unpacked = max(group.total_byte_size, 1)
        if unpacked > max(MAX_UNPACKED_BYTES, MAX_UNPACKED_TIMES * packed):
            raise UserError(f"{path}: a row group unpacks {packed:,} bytes into {unpacked:,}, as no data do")
        num_rows = min(max(BATCH_BYTES * group.num_rows // unpacked, 1), BATCH_ROWS)
        yield from file.iter_batches(batch_size=num_rows, row_groups=[number], columns=columns)


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
