"""A prepared dataset as `messages-parquet`: one file that other toolkits read without any code of ours.

    messages  [{role, content: [{type: text|image, text}], loss}]  in the parts form of TRL and ms-swift, which reads
                                                                `loss`: whether the turn is to be learned
    images    [{bytes, path}]                                   in reading order, one for each part of type image
    key       names the sample, as in our own logs

The schema carries the features of Hugging Face `datasets`: its `load_dataset` gives pictures, not bytes. Our own
`messages` adapter reads the file back to equal messages.

Two things that others take otherwise: documents keep the role `document`, which TRL refuses; and text is written as it
is, so that a literal `<image>` in it, which is text here, counts as an image for processors that know that token.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sft.core.errors import RunError, UserError
from sft.core.files import whole_file
from sft.core.images import read_bytes
from sft.core.sample import ImageRef, Sample, SkipSample
from sft.data.store import Store

ROW_GROUP_BYTES = 32 * 1024 * 1024  # held in memory here, and by readers, which take a row group at a time


class Exported(NamedTuple):
    """What was written, and where."""

    path: Path
    samples: int
    images: int
    documents: int


def export_messages(
    samples: Store, path: Path, *, on_progress: Callable[[int], None] = lambda samples: None
) -> Exported:
    """Write `path`, or `path/train.parquet` where it does not end in .parquet; whole or not at all. `on_progress` is
    called with the number of samples written so far. Raise UserError where there is such a file already, RunError where
    an image that the store only refers to is gone."""
    path = path if path.suffix == ".parquet" else path / "train.parquet"
    if path.exists():
        raise UserError(f"{path}: exists already; remove it or name another")
    num_samples = num_images = num_documents = 0
    # Encoded images neither compress nor repeat: no dictionaries and no smallest and largest of them.
    options = {"use_dictionary": False, "write_statistics": False}
    with whole_file(path) as file, pq.ParquetWriter(file, _schema(), **options) as writer:
        for rows in _row_groups(samples):
            writer.write_table(pa.Table.from_pylist(rows, schema=_schema()), row_group_size=len(rows))
            num_samples += len(rows)
            num_images += sum(len(row["images"]) for row in rows)
            num_documents += sum(row["messages"][0]["role"] == "document" for row in rows)
            on_progress(num_samples)
    return Exported(path, num_samples, num_images, num_documents)


def _schema() -> pa.Schema:
    import datasets

    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    features = datasets.Features(
        {
            "messages": [{"role": datasets.Value("string"), "content": [part], "loss": datasets.Value("bool")}],
            "images": [datasets.Image()],
            "key": datasets.Value("string"),
        }
    )
    return features.arrow_schema


def _row_groups(samples: Store) -> Iterator[list[dict[str, Any]]]:
    """Yield rows in runs of about ROW_GROUP_BYTES."""
    rows: list[dict[str, Any]] = []
    size = 0
    for number in range(len(samples)):
        row = _row(samples.sample(number))
        rows.append(row)
        size += _size(row)
        if size >= ROW_GROUP_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _row(sample: Sample) -> dict[str, Any]:
    return {
        "messages": [
            {"role": m.role, "content": [_part(item) for item in m.content], "loss": m.is_trained}
            for m in sample.messages
        ],
        "images": [{"bytes": _bytes(image, sample.key), "path": None} for image in sample.images],
        "key": sample.key,
    }


def _part(item: str | ImageRef) -> dict[str, str | None]:
    return {"type": "text", "text": item} if isinstance(item, str) else {"type": "image", "text": None}


def _bytes(image: ImageRef, key: str) -> bytes:
    try:
        return read_bytes(image)
    except SkipSample as skip:
        raise RunError(f"{key}: {skip.reason}: {skip.detail}; it was there when the data were prepared") from skip


def _size(row: dict[str, Any]) -> int:
    texts = (part["text"] or "" for message in row["messages"] for part in message["content"])
    return sum(len(image["bytes"]) for image in row["images"]) + sum(map(len, texts))
