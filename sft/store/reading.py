"""A finished store, open for reading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sft.errors import UserError
from sft.files import hash_file
from sft.image_keys import KEYS, ORDER, read_numbers
from sft.images import read_bytes
from sft.sample import ImageRef, Sample
from sft.store.tables import Table, image_rows_of, to_messages

VERSION = 3
"""Raised when the layout changes; stores of another version are refused."""
MANIFEST = "manifest.json"

_SHA256, _BYTES, _PATH = 0, 1, 2
_KEY, _MESSAGES = 0, 1


class Store:
    """A prepared dataset. Random access, nothing in memory."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            UserError: there is no finished store at `path`, or it is of another version.
        """
        self.path = path
        if not (path / MANIFEST).is_file():
            raise UserError(f"{path}: no prepared dataset here; run `idefics-sft prepare` first")
        self.manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        if self.manifest["version"] != VERSION:
            raise UserError(
                f"{path}: prepared by version {self.manifest['version']} of the store, this is {VERSION}; "
                "prepare with --fresh to make it anew"
            )
        self._samples = Table(path / "samples")
        self._images = Table(path / "images")

    def __reduce__(self) -> tuple[object, ...]:
        return Store, (self.path,)

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def num_images(self) -> int:
        """Distinct images."""
        return len(self._images)

    @property
    def image_hashes(self) -> list[str]:
        """sha256 of each image, in row order."""
        return list(self._images.column("sha256"))

    @cached_property
    def image_keys(self) -> NDArray[np.int64]:
        """The key of each image, in row order; equal images have equal keys in every store."""
        return read_numbers(self.path / KEYS)

    def find_image(self, key: int) -> int | None:
        """The row of the image with a key, None where it is not in this store."""
        place = int(np.searchsorted(self.image_keys, key, sorter=self._image_order))
        if place == len(self.image_keys) or self.image_keys[self._image_order[place]] != key:
            return None
        return int(self._image_order[place])

    @cached_property
    def _image_order(self) -> NDArray[np.int64]:
        return read_numbers(self.path / ORDER)

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """Width and height of each image, in row order."""
        return list(zip(self._images.column("width"), self._images.column("height"), strict=True))

    @property
    def keys(self) -> Iterator[str]:
        """Key of each sample, in row order."""
        return self._samples.column("key")

    def image(self, row: int) -> ImageRef:
        """An image: its bytes, or the file it was left in."""
        content = self._images.value(row, _BYTES)
        return ImageRef(source=content if content is not None else Path(self._images.value(row, _PATH)))

    def image_bytes(self, row: int) -> bytes:
        """The encoded bytes of an image.

        Raises:
            SkipSample: the file it was left in cannot be read any more.
        """
        return read_bytes(self.image(row))

    def sample(self, row: int) -> Sample:
        """A sample with its images."""
        record = self._samples.value(row, _MESSAGES)
        images = {image_row: self.image(image_row) for image_row in image_rows_of(record)}
        return Sample(key=self._samples.value(row, _KEY), messages=to_messages(record, images))

    def sample_batches(self) -> list[pa.RecordBatch]:
        """The Arrow batches of samples/."""
        return self._samples.batches

    def stored_samples(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[Sample, tuple[int, ...]]]:
        """Samples with the rows of their images in reading order; the images themselves are left out."""
        nothing = ImageRef(source=b"")
        for key, record in self._samples.rows(start, len(self) if stop is None else stop):
            rows = image_rows_of(record)
            yield Sample(key=key, messages=to_messages(record, dict.fromkeys(rows, nothing))), rows

    def changed_files(self, files: Sequence[Path]) -> list[Path]:
        """What is no longer as it was when the store was made: raw files, and image files that records name.

        A file is read again only where its time of change tells that it may be another; what was deleted since is no
        change, since the store has what it needs of it.
        """
        known = {entry["path"]: entry for entry in self.manifest["files"]}
        changed = [file for file in files if _is_other(file, known.get(str(file.absolute())))]
        changed += [Path(path) for path in known.keys() - {str(file.absolute()) for file in files}]
        return changed + list(self._changed_images())

    def _changed_images(self) -> Iterator[Path]:
        prepared_ns = (self.path / MANIFEST).stat().st_mtime_ns
        for sha256, name in zip(self._images.column("sha256"), self._images.column("path"), strict=True):
            file = Path(name) if name else None
            if file and file.is_file() and file.stat().st_mtime_ns > prepared_ns:
                with file.open("rb") as content:
                    if hashlib.file_digest(content, "sha256").hexdigest() != sha256:
                        yield file


def _is_other(file: Path, known: dict[str, Any] | None) -> bool:
    if known is None or not file.is_file():
        return known is None
    stat = file.stat()
    if stat.st_size != known["bytes"]:
        return True
    return bool(stat.st_mtime_ns != known["mtime_ns"] and hash_file(file) != known["xxh3"])
