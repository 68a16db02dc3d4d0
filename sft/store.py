"""Prepared datasets on disk: samples, and their distinct images, as memory-mapped Arrow tables.

    STORE/<dataset>/samples/     key, messages [{role, content: [{type, text, image}]}]; image = row in images/
                    images/      sha256, bytes, path, width, height: each distinct image once, verified by decoding
                    encoded/     token ids by tokenizer and template, see sft.encoding
                    skips.jsonl  every record that was left out, with its reason
                    manifest.json  what was asked, counts, filtered and skipped by reason; written last

A store without a manifest is unfinished and is made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import datasets
from datasets.arrow_writer import ArrowWriter

from sft.errors import RunError, UserError
from sft.images import decode_rgb, read_bytes
from sft.sample import ImageRef, Message, Sample, SkipSample
from sft.sources import Row

datasets.disable_progress_bars()  # progress is shown once, by the command line

VERSION = 2
"""Raised when adapters or this layout change what is written; stores of another version are refused."""

SAMPLES = datasets.Features(
    {
        "key": datasets.Value("string"),
        "messages": [
            {
                "role": datasets.Value("string"),
                "content": [
                    {
                        "type": datasets.Value("string"),
                        "text": datasets.Value("string"),
                        "image": datasets.Value("int64"),
                    }
                ],
            }
        ],
    }
)
IMAGES = datasets.Features(
    {
        "sha256": datasets.Value("string"),
        "bytes": datasets.Value("binary"),
        "path": datasets.Value("string"),
        "width": datasets.Value("int32"),
        "height": datasets.Value("int32"),
    }
)


class RawDataset(Protocol):
    """What a store is made from; `sft.datasets.Adapter` is one."""

    name: str

    def stamp(self) -> str:
        """Changes when a raw file does."""

    def rows(self) -> Iterable[Row | SkipSample]:
        """The raw records."""

    def to_sample(self, row: Row) -> Sample:
        """One record as a sample."""


@dataclass
class _Counts:
    """What became of the raw records."""

    records: int = 0
    samples: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def leave_out(self, skip: SkipSample, key: str) -> None:
        (self.filtered if skip.filtered else self.skipped)[skip.reason] += 1
        self.examples.setdefault(skip.reason, key)

    @property
    def skip_share(self) -> float:
        return self.skipped.total() / max(self.records, 1)


class Store:
    """A prepared dataset, open for reading. Random access, nothing in memory."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            UserError: there is no finished store at `path`, or it is of another version.
        """
        self.path = path
        manifest = path / "manifest.json"
        if not manifest.is_file():
            raise UserError(f"{path}: no prepared dataset here; run `idefics-sft prepare` first")
        self.manifest: dict[str, Any] = json.loads(manifest.read_text())
        if self.manifest["version"] != VERSION:
            raise UserError(
                f"{path}: prepared by version {self.manifest['version']} of the store, this is {VERSION}; "
                "delete the folder and prepare again"
            )
        self._samples = datasets.load_from_disk(str(path / "samples"))
        self._images = datasets.load_from_disk(str(path / "images"))

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def num_images(self) -> int:
        """Distinct images."""
        return len(self._images)

    @property
    def image_hashes(self) -> list[str]:
        """sha256 of each image, in row order."""
        return list(self._images["sha256"])

    def image_bytes(self, row: int) -> bytes:
        """The encoded bytes of an image."""
        content: bytes = self._images[row]["bytes"]
        return content

    def sample(self, row: int) -> Sample:
        """A sample with its image bytes."""
        return self._to_sample(self._samples[row])

    def stored_samples(self) -> Iterator[tuple[Sample, tuple[int, ...]]]:
        """All samples with the rows of their images in reading order; image bytes are not loaded."""
        for record in self._samples:
            rows = tuple(
                item["image"]
                for message in record["messages"]
                for item in message["content"]
                if item["type"] == "image"
            )
            yield self._to_sample(record, with_bytes=False), rows

    def _to_sample(self, record: dict[str, Any], *, with_bytes: bool = True) -> Sample:
        def content(item: dict[str, Any]) -> str | ImageRef:
            if item["type"] == "text":
                text: str = item["text"]
                return text
            return ImageRef(source=self.image_bytes(item["image"]) if with_bytes else b"")

        messages = tuple(
            Message(role=message["role"], content=tuple(content(item) for item in message["content"]))
            for message in record["messages"]
        )
        return Sample(key=record["key"], messages=messages)


def prepare_store(
    adapter: RawDataset,
    path: Path,
    *,
    asked: dict[str, Any],
    max_skip_share: float,
    on_progress: Callable[[int], None] = lambda records: None,
) -> Store:
    """Run an adapter over its raw records and write the store.

    A finished store is opened as it is, as long as the raw files are those it was made from.

    `asked` is written into the manifest. `on_progress` is called with the number of records read so far.

    Raises:
        RunError: more than `max_skip_share` of the records are bad, or none is left.
    """
    stamp = adapter.stamp()
    if (path / "manifest.json").is_file():
        store = Store(path)
        if store.manifest["raw"] == stamp:
            return store
    staging = path.with_name(f".{path.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    counts = _write_tables(adapter, staging, on_progress)
    if counts.skip_share > max_skip_share:
        reasons = ", ".join(
            f"{n} {reason} (as {counts.examples[reason]})" for reason, n in counts.skipped.most_common()
        )
        raise RunError(
            f"{path.name}: {counts.skip_share:.1%} of {counts.records} records bad (allowed: {max_skip_share:.1%}): "
            f"{reasons}"
        )
    if not counts.samples:
        raise RunError(f"{path.name}: none of {counts.records} records is left: {dict(counts.filtered)}")
    manifest = {
        "version": VERSION,
        "asked": asked,
        "raw": stamp,
        "records": counts.records,
        "samples": counts.samples,
        "filtered": dict(counts.filtered),
        "skipped": dict(counts.skipped),
        "examples": counts.examples,
    }
    (staging / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    shutil.rmtree(path, ignore_errors=True)
    staging.rename(path)
    return Store(path)


def _write_tables(adapter: RawDataset, directory: Path, on_progress: Callable[[int], None]) -> _Counts:
    counts = _Counts()
    image_rows: dict[str, int] = {}
    samples_file, images_file = directory / "samples.arrow", directory / "images.arrow"
    with (
        (directory / "skips.jsonl").open("w", encoding="utf-8") as skips,
        ArrowWriter(features=SAMPLES, path=str(samples_file)) as samples,
        ArrowWriter(features=IMAGES, path=str(images_file)) as images,
    ):
        for number, row in enumerate(adapter.rows()):
            counts.records += 1
            key = f"{adapter.name}/{number}"
            try:
                if isinstance(row, SkipSample):
                    raise row
                sample = adapter.to_sample(row)
                key = sample.key
                _check_text(sample)
                contents = {image: _verified(image, image_rows) for image in sample.images}
            except SkipSample as skip:
                counts.leave_out(skip, key)
                skips.write(json.dumps({"key": key, "reason": skip.reason, "filtered": skip.filtered}) + "\n")
                continue
            for content in contents.values():
                if content["sha256"] not in image_rows:
                    image_rows[content["sha256"]] = len(image_rows)
                    images.write(content)
            rows = {image: image_rows[content["sha256"]] for image, content in contents.items()}
            samples.write(_record(sample, rows))
            counts.samples += 1
            if counts.records % 500 == 0:
                on_progress(counts.records)
        on_progress(counts.records)
        samples.finalize()
        images.finalize()
    for file in (samples_file, images_file):
        datasets.Dataset.from_file(str(file)).save_to_disk(
            str(file.with_suffix("")), num_shards=1
        )  # an empty table too
        file.unlink()
    return counts


def _check_text(sample: Sample) -> None:
    """Half a surrogate pair, which JSON can spell, is no text: it has no bytes to write."""
    for message in sample.messages:
        for item in message.content:
            if isinstance(item, str) and not item.isascii():
                try:
                    item.encode()
                except UnicodeEncodeError as error:
                    raise SkipSample("text is not Unicode") from error


def _verified(image: ImageRef, known: dict[str, int]) -> dict[str, Any]:
    """The row of images/ for an image; decoded once to be sure that it can be."""
    content = read_bytes(image)
    sha256 = hashlib.sha256(content).hexdigest()
    width, height = (0, 0) if sha256 in known else decode_rgb(content).size
    return {"sha256": sha256, "bytes": content, "path": None, "width": width, "height": height}


def _record(sample: Sample, image_rows: dict[ImageRef, int]) -> dict[str, Any]:
    def item(part: str | ImageRef) -> dict[str, Any]:
        if isinstance(part, str):
            return {"type": "text", "text": part, "image": None}
        return {"type": "image", "text": None, "image": image_rows[part]}

    return {
        "key": sample.key,
        "messages": [{"role": m.role, "content": [item(part) for part in m.content]} for m in sample.messages],
    }
