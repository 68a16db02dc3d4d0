"""Raw records -> one finished piece of a store: what a single process does.

<piece>/samples.arrow   image rows count within the piece
        images.arrow    the piece's distinct images
        image_files.jsonl  the image files that were read
        skips.jsonl     what was left out and why
        piece.json      counts; the folder gets its name only when all of this is written
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from sft.core.files import staged
from sft.core.images import size_of, verified_size
from sft.core.sample import ImageRef, Sample, SkipSample
from sft.data.formats import Row
from sft.data.store.image_files import IMAGE_FILES, ImageReader
from sft.data.store.tables import IMAGES, SAMPLES, TableWriter, to_record

Images = Literal["embed", "reference"]
Verify = Literal["decode", "header"]


class ToSample(Protocol):
    """What makes a sample of a record."""

    name: str

    def to_sample(self, row: Row) -> Sample:
        """Return the sample of a record, or raise SkipSample."""


@dataclass
class Counts:
    """What became of raw records."""

    records: int = 0
    samples: int = 0
    distinct_images: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """For each reason the first record that was left out for it."""

    def leave_out(self, skip: SkipSample, key: str) -> None:
        """Count a record that is left out."""
        (self.filtered if skip.filtered else self.skipped)[skip.reason] += 1
        self.examples.setdefault(skip.reason, f"{key}: {skip.detail}" if skip.detail not in key else key)

    def add(self, other: Counts) -> None:
        """Count what another piece counted."""
        self.records += other.records
        self.samples += other.samples
        self.distinct_images += other.distinct_images
        self.filtered += other.filtered
        self.skipped += other.skipped
        self.examples = other.examples | self.examples

    def to_json(self) -> dict[str, Any]:
        """Return the counts as a JSON object; `dataclasses.asdict` would count the items of a Counter anew."""
        return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(self).items()}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Counts:
        """Return counts from an object that holds what `to_json` gave, among other things."""
        own = {name: type(value)(values[name]) for name, value in vars(Counts()).items()}
        return Counts(**own)

    @property
    def skip_share(self) -> float:
        """Share of bad records."""
        return self.skipped.total() / max(self.records, 1)


@dataclass(frozen=True, kw_only=True)
class PieceTask:
    """A piece that a process is to write."""

    adapter: ToSample
    rows: list[Row | SkipSample]
    first: int
    """Number of the first record in its file, for the keys of records that never became samples."""
    is_last: bool
    """Whether the raw file ends here."""
    share_read: float
    """How much of all raw files was read by its end, for progress bars."""
    path: Path
    images: Images
    verify: Verify


def write_piece(task: PieceTask) -> Counts:
    """Write a piece and return its counts."""
    with staged(task.path) as folder:
        counts = _write_tables(task, folder)
        (folder / "piece.json").write_text(json.dumps(counts.to_json() | {"is_last": task.is_last}))
    return counts


def read_piece(path: Path) -> tuple[Counts, bool]:
    """Return the counts of a finished piece, and whether its raw file ends with it."""
    values = json.loads((path / "piece.json").read_text())
    return Counts.from_json(values), values["is_last"]


def _write_tables(task: PieceTask, folder: Path) -> Counts:
    counts = Counts()
    seen: dict[str, int] = {}  # sha256 -> row, within the piece
    with (
        (folder / "skips.jsonl").open("w", encoding="utf-8") as skips,
        (folder / IMAGE_FILES).open("w", encoding="utf-8") as image_files,
        TableWriter(folder / "samples.arrow", SAMPLES) as samples,
        TableWriter(folder / "images.arrow", IMAGES) as images,
    ):
        reader = ImageReader(image_files)
        for number, row in enumerate(task.rows, start=task.first):
            counts.records += 1
            here = str(row.get("__from__", "") if isinstance(row, dict) else row.where)
            key = f"{task.adapter.name}/{here or number}"
            try:
                if isinstance(row, SkipSample):
                    raise row
                sample = task.adapter.to_sample(row)
                key = sample.key
                _check_text(sample)
                loaded = [_load(image, reader, seen, task) for image in sample.images]
            except SkipSample as skip:
                counts.leave_out(skip, key)
                line = {"key": key, "reason": skip.reason, "detail": skip.detail or here, "filtered": skip.filtered}
                skips.write(json.dumps(line) + "\n")
                continue
            except Exception as error:
                error.add_note(f"while reading the record {key}")
                raise
            for image in loaded:
                if image["sha256"] not in seen:
                    seen[image["sha256"]] = len(seen)
                    images.write(image, len(image["bytes"] or b""))
            record = to_record(sample, [seen[image["sha256"]] for image in loaded])
            samples.write(record, sum(len(i) for m in sample.messages for i in m.content if isinstance(i, str)))
            counts.samples += 1
    counts.distinct_images = len(seen)
    return counts


def _check_text(sample: Sample) -> None:
    """Skip a sample whose text holds half a surrogate pair, which JSON can spell and which has no bytes to write."""
    for text in (sample.key, *(i for m in sample.messages for i in m.content if isinstance(i, str))):
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise SkipSample("text is not Unicode") from error


def _load(image: ImageRef, reader: ImageReader, seen: dict[str, int], task: PieceTask) -> dict[str, Any]:
    """Return the row of images/ for an image; verified unless it was before."""
    path = str(image.source.absolute()) if isinstance(image.source, Path) else None
    content, sha256 = reader.read(image, seen)
    if sha256 in seen:
        return {"sha256": sha256}
    try:
        width, height = verified_size(content) if task.verify == "decode" else size_of(content)
    except SkipSample as skip:
        skip.detail = skip.detail or path or ""
        raise
    is_kept = task.images == "embed" or path is None
    return {
        "sha256": sha256,
        "bytes": content if is_kept else None,
        "path": path,
        "width": width,
        "height": height,
    }
