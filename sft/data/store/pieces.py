"""Raw records -> one finished piece of a store: what a single process does.

<piece>/samples.arrow   image rows count within the piece
        images.arrow    the piece's distinct images
        image_files.jsonl  the image files that were read
        skips.jsonl     what was left out and why
        piece.json      counts, and what was noted of images; the folder gets its name only when all of this is written
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sft.core.files import staged
from sft.core.images import open_checked, verified
from sft.core.sample import AS_SHOWN, Decoding, ImageRef, Sample, SkipSample
from sft.data.datasets import Adapter
from sft.data.formats import MAX_RECORD_BYTES, Row
from sft.data.store.image_files import IMAGE_FILES, ImageReader
from sft.data.store.tables import IMAGES, SAMPLES, TableWriter, to_record

Images = Literal["embed", "reference"]
Verify = Literal["decode", "header"]
Noted = dict[str, list[int]]  # what is told of some images, and their rows in images.arrow


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a store is made."""

    images: Images = "embed"  # their bytes are copied into the store; `reference`: image files stay where they are
    decoding: Decoding = AS_SHOWN
    verify: Verify = "decode"  # each distinct image is decoded once; `header`: only its header is read
    limit: int | None = None  # only the first so many records
    max_record_bytes: int = MAX_RECORD_BYTES
    max_skip_share: float = 0.05  # more bad records than this are a failure
    num_proc: int = 1
    fresh: bool = False  # make it anew, whatever is there


@dataclass
class Counts:
    """What became of raw records."""

    records: int = 0
    samples: int = 0
    distinct_images: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    not_read: Counter[str] = field(default_factory=Counter)
    """How often records, turns (`turns: loss`) and parts have keys that the adapter does not read."""
    examples: dict[str, str] = field(default_factory=dict)
    """For each reason the first record that was left out for it; for each key that is not read its first value."""

    def leave_out(self, skip: SkipSample, key: str) -> None:
        """Count a record that is left out."""
        (self.filtered if skip.filtered else self.skipped)[skip.reason] += 1
        self.examples.setdefault(skip.reason, f"{key}: {skip.detail}" if skip.detail not in key else key)

    def pass_over(self, keys: Iterable[tuple[str, Any]]) -> None:
        """Count keys of a record that are not read."""
        for key, value in keys:
            if key not in self.not_read:
                self.examples[f"not read: {key}"] = repr(value)[:200]
            self.not_read[key] += 1

    def add(self, other: Counts) -> None:
        """Count what another piece counted."""
        self.records += other.records
        self.samples += other.samples
        self.distinct_images += other.distinct_images
        self.filtered += other.filtered
        self.skipped += other.skipped
        self.not_read += other.not_read
        self.examples = other.examples | self.examples

    @staticmethod
    def total(some: Iterable[Counts]) -> Counts:
        """Return the counts of several pieces together."""
        total = Counts()
        for counts in some:
            total.add(counts)
        return total

    def to_json(self) -> dict[str, Any]:
        """Return the counts as a JSON object; `dataclasses.asdict` would count the items of a Counter anew."""
        return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(self).items()}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Counts:
        """Return counts from an object that holds what `to_json` gave, among other things."""
        own = {name: type(value)(values.get(name, value)) for name, value in vars(Counts()).items()}
        return Counts(**own)

    @property
    def skip_share(self) -> float:
        """Share of bad records."""
        return self.skipped.total() / max(self.records, 1)


@dataclass(frozen=True, kw_only=True)
class PieceTask:
    """A piece that a process is to write."""

    adapter: Adapter
    rows: list[Row | SkipSample]
    first: int  # number of the first record in its file, for the keys of records that never became samples
    is_last: bool  # whether the raw file ends here
    share_read: float  # how much of all raw files was read by its end, for progress bars
    path: Path
    settings: Settings


def write_piece(task: PieceTask) -> tuple[Counts, float]:
    """Write a piece; return its counts, and how much of all raw files was read by its end."""
    with staged(task.path) as folder:
        counts, noted = _write_tables(task, folder)
        ending = {"is_last": task.is_last, "noted": noted}
        (folder / "piece.json").write_text(json.dumps(counts.to_json() | ending))
    return counts, task.share_read


def read_piece(path: Path) -> tuple[Counts, bool, Noted]:
    """Return the counts of a finished piece, whether its raw file ends with it, and what was noted of its images."""
    values = json.loads((path / "piece.json").read_text())
    return Counts.from_json(values), values["is_last"], values["noted"]


def _write_tables(task: PieceTask, folder: Path) -> tuple[Counts, Noted]:
    counts = Counts()
    noted: Noted = {"orientation": [], "no_end_marker": []}
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
                counts.pass_over(task.adapter.not_read(row, sample))
                key = sample.key
                _check_text(sample)
                loaded = [_load(image, number, reader, seen, task) for number, image in enumerate(sample.images, 1)]
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
                    for note in filter(image["notes"].get, noted):
                        noted[note].append(len(seen))
                    seen[image["sha256"]] = len(seen)
                    images.write(image, len(image["bytes"] or b""))
            record = to_record(sample, [seen[image["sha256"]] for image in loaded])
            samples.write(record, sum(len(i) for m in sample.messages for i in m.content if isinstance(i, str)))
            counts.samples += 1
    counts.distinct_images = len(seen)
    return counts, noted


def _check_text(sample: Sample) -> None:
    """Skip a sample whose text holds half a surrogate pair, which JSON can spell and which has no bytes to write."""
    for text in (sample.key, *(i for m in sample.messages for i in m.content if isinstance(i, str))):
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise SkipSample("text is not Unicode") from error


def _load(image: ImageRef, number: int, reader: ImageReader, seen: dict[str, int], task: PieceTask) -> dict[str, Any]:
    """Return the row of images/ for an image, the `number`th of its sample, with `notes`; verified unless it was
    before. Raise SkipSample where it is not fit, with its file, or its number where it is none."""
    path = str(image.source.absolute()) if isinstance(image.source, Path) else None
    try:
        content, sha256 = reader.read(image, seen)
        if sha256 in seen:
            return {"sha256": sha256}
        header = (verified if task.settings.verify == "decode" else open_checked)(content, task.settings.decoding)
    except SkipSample as skip:
        name = path or f"image {number} of the record"
        skip.detail = skip.detail if name in skip.detail else ": ".join(filter(None, (name, skip.detail)))
        raise
    is_kept = task.settings.images == "embed" or path is None
    return {
        "sha256": sha256,
        "bytes": content if is_kept else None,
        "path": path,
        "width": header.size[0],
        "height": header.size[1],
        "notes": {"orientation": header.exif_orientation != 1, "no_end_marker": header.lacks_end},
    }
