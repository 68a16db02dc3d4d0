"""Arrow files and streams, as `datasets` caches and saves them, mapped into memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.core.sample import SkipSample
from sft.data.formats.parquet import rows_of
from sft.data.formats.rows import Row, require_file


def read_arrow(path: Path) -> Iterator[Row | SkipSample]:
    """Yield the rows of an Arrow file or stream; the limit on records is that of `read_parquet`.

    Raises:
        UserError: missing, cut off, or not Arrow.
    """
    return rows_of(require_file(path, "an Arrow file"), "Arrow", _batches(path))


def _batches(path: Path) -> Iterator[tuple[Any, float]]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
            batch.validate(full=True)  # else its offsets and texts are taken as they are
            yield batch, file.tell() / file.size()
