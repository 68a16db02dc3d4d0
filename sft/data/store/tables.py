"""The two Arrow tables of a store, as files: written in batches, read by memory map.

A table is a folder of IPC streams beside the two JSON files that make it loadable by `datasets.load_from_disk`.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sft.core.sample import ImageRef, Message, Sample

_CONTENT = pa.struct([("type", pa.string()), ("text", pa.string()), ("image", pa.int64())])
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.list_(_CONTENT)), ("is_trained", pa.bool_())])
SAMPLES = pa.schema([("key", pa.string()), ("messages", pa.list_(_MESSAGE))])
IMAGES = pa.schema(
    {"sha256": pa.string(), "bytes": pa.binary(), "path": pa.string(), "width": pa.int32(), "height": pa.int32()}
)
_BATCH_BYTES = 4 * 1024 * 1024
_BATCH_ROWS = 1000
_READ_ROWS = 100


class TableWriter:
    """Writes rows to one IPC stream, a batch at a time."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.schema = schema
        self._file = path.open("wb")
        self._stream = pa.ipc.new_stream(self._file, schema)
        self._rows: list[dict[str, Any]] = []
        self._num_bytes = 0

    def write(self, row: dict[str, Any], num_bytes: int) -> None:
        """Add a row; `num_bytes` is about its size, so that batches stay small."""
        self._rows.append(row)
        self._num_bytes += num_bytes
        if self._num_bytes >= _BATCH_BYTES or len(self._rows) >= _BATCH_ROWS:
            self._flush()

    def write_batch(self, batch: pa.RecordBatch) -> None:
        """Add a batch as it is."""
        if batch.num_rows:
            self._stream.write_batch(batch)

    def _flush(self) -> None:
        if self._rows:
            self._stream.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=self.schema))
            self._rows, self._num_bytes = [], 0

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            self._flush()
        self._stream.close()
        self._file.close()


def batches_of(file: Path) -> list[pa.RecordBatch]:
    """Return the batches of an IPC stream, mapped into memory."""
    batches: list[pa.RecordBatch] = pa.ipc.open_stream(pa.memory_map(str(file))).read_all().to_batches()
    return batches


def finish_table(folder: Path, schema: pa.Schema) -> None:
    """Name the files of a folder as parts of one table, and describe them as `datasets` does."""
    import datasets

    files = sorted(folder.glob("*.arrow"))
    if not files:
        with TableWriter(folder / "none.arrow", schema):
            files = [folder / "none.arrow"]
    names = [f"data-{number:05d}-of-{len(files):05d}.arrow" for number in range(len(files))]
    for file, name in zip(files, names, strict=True):
        file.rename(folder / name)
    features = datasets.Features.from_arrow_schema(schema).to_dict()
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": folder.parent.name,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))
    (folder / "state.json").write_text(json.dumps(state, indent=2))


class Table:
    """A table open for reading: random access, nothing in memory."""

    def __init__(self, folder: Path) -> None:
        self.batches = [batch for file in sorted(folder.glob("data-*.arrow")) for batch in batches_of(file)]
        self._starts: list[int] = [0, *accumulate(batch.num_rows for batch in self.batches)]

    def __len__(self) -> int:
        return self._starts[-1]

    def value(self, row: int, column: int) -> Any:
        """Return one value of a row, or raise IndexError where there is no such row."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        batch = bisect_right(self._starts, row) - 1
        return self.batches[batch].column(column)[row - self._starts[batch]].as_py()

    def rows(self, start: int, stop: int) -> Iterator[tuple[Any, ...]]:
        """Yield the values of rows `start` to `stop`, some at a time."""
        for first, batch in zip(self._starts, self.batches, strict=False):
            begin, end = max(start - first, 0), min(stop - first, batch.num_rows)
            for piece in range(begin, end, _READ_ROWS):
                columns = batch.slice(piece, min(_READ_ROWS, end - piece)).columns
                yield from zip(*(column.to_pylist() for column in columns), strict=True)

    def column(self, name: str) -> Iterator[Any]:
        """Yield all values of a column."""
        for batch in self.batches:
            yield from batch.column(name).to_pylist()


def to_record(sample: Sample, image_rows: Sequence[int]) -> dict[str, Any]:
    """Return a sample as a row of samples/, with the rows of its images in reading order, without empty texts."""
    remaining = iter(image_rows)

    def item(part: str | ImageRef) -> dict[str, Any]:
        if isinstance(part, str):
            return {"type": "text", "text": part, "image": None}
        return {"type": "image", "text": None, "image": next(remaining)}

    return {
        "key": sample.key,
        "messages": [
            {"role": m.role, "content": [item(part) for part in m.content if part != ""], "is_trained": m.is_trained}
            for m in sample.messages
        ],
    }


def to_messages(record: Sequence[dict[str, Any]], images: dict[int, ImageRef]) -> tuple[Message, ...]:
    """Return the `messages` of a row of samples/ as messages, with the image of each row of images/."""
    return tuple(
        Message(
            role=message["role"],
            content=tuple(
                item["text"] if item["type"] == "text" else images[item["image"]] for item in message["content"]
            ),
            is_trained=message["is_trained"],
        )
        for message in record
    )


def image_rows_of(record: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    """Return the rows in images/ of the images in `messages`, in reading order."""
    return tuple(i["image"] for message in record for i in message["content"] if i["type"] == "image")


def renumber_images(batch: pa.RecordBatch, new_rows: NDArray[np.int64]) -> pa.RecordBatch:
    """Return a batch of samples whose image row i becomes `new_rows[i]`."""
    messages = batch.column(1)
    content = messages.values.field("content")
    items = content.values
    image = items.field("image")
    is_text = image.is_null().to_numpy(zero_copy_only=False)
    rows = new_rows[np.where(is_text, 0, image.fill_null(0).to_numpy())] if len(new_rows) else np.zeros(len(image))
    image = pa.array(rows, pa.int64(), mask=is_text)
    items = pa.StructArray.from_arrays([items.field("type"), items.field("text"), image], fields=list(_CONTENT))
    content = pa.ListArray.from_arrays(content.offsets, items)
    columns = [messages.values.field("role"), content, messages.values.field("is_trained")]
    values = pa.StructArray.from_arrays(columns, fields=list(_MESSAGE))
    return pa.RecordBatch.from_arrays(
        [batch.column(0), pa.ListArray.from_arrays(messages.offsets, values)], schema=SAMPLES
    )
