"""A finished store, open for reading."""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sft.core.errors import UserError
from sft.core.files import hash_file, location, mapped
from sft.core.images import read_bytes
from sft.core.sample import Decoding, ImageRef, Sample
from sft.data.store.image_files import IMAGE_FILES, changed_image_files, stamp_of
from sft.data.store.image_keys import KEYS, ORDER
from sft.data.store.pieces import Counts
from sft.data.store.tables import IMAGES, SAMPLES, Table, image_rows_of, to_messages
from sft.runs.names import find_recipe

VERSION = 5  # raised when the layout changes; stores of another version are refused
MANIFEST = "manifest.json"
_IN_MANIFEST = {
    *("adapter", "asked", "verify", "images", "limit", "max_record_bytes", "orientation", "max_pixels"),
    *("files", "licence", "image_notes", *vars(Counts())),
}
_LAYOUT = {"samples", "images", "encoded", "features", KEYS, ORDER, IMAGE_FILES, "skips.jsonl", MANIFEST}

_SHA256, _BYTES, _PATH, _WIDTH, _HEIGHT = range(5)
_KEY, _MESSAGES = 0, 1


class Store:
    """A prepared dataset. Random access, nothing in memory."""

    def __init__(self, path: Path) -> None:
        """Raise UserError where there is no finished store at `path`, it is of another version, or it is damaged."""
        self.path = path
        if not (path / MANIFEST).is_file():
            if (path / "recipe.yaml").is_file():
                data = find_recipe(str(path)).data
                stores = (part.store_in(data.store) for source in data.mixture for part in source.datasets)
                raise UserError(f"{path}: a run; its stores are: {', '.join(map(str, stores))}")
            raw, output = (path, Path("stores", path.stem)) if path.exists() else (Path("RAW"), path)
            make = f"idefics-sft prepare --dataset messages --path {raw} --output {output}"
            raise UserError(f"{path}: no prepared dataset here; `{make}` makes one")
        self.manifest = self._read_manifest()
        if self.manifest["version"] != VERSION:
            found = f"prepared by version {self.manifest['version']} of the store, this is {VERSION}"
            raise UserError(f"{path}: {found}; prepare with --fresh to make it anew")
        if missing := sorted(_IN_MANIFEST - self.manifest.keys()):
            raise self._damaged(f"{MANIFEST} does not say {missing[0]!r}")
        self._samples = self._table("samples", SAMPLES, self.manifest["samples"])
        self._images = self._table("images", IMAGES, self.manifest["distinct_images"])
        for name, num_bytes in ((KEYS, 8 * len(self._images)), (ORDER, 8 * len(self._images)), (IMAGE_FILES, None)):
            if not (path / name).is_file():
                raise self._damaged(f"{name} is missing")
            if num_bytes not in (None, (path / name).stat().st_size):
                raise self._damaged(f"{name} is not of {num_bytes:,} bytes")

    def _read_manifest(self) -> dict[str, Any]:
        try:
            manifest = json.loads((self.path / MANIFEST).read_text())
        except ValueError as error:
            raise self._damaged(f"{MANIFEST} is not readable as JSON") from error
        if not isinstance(manifest, dict) or "version" not in manifest:
            raise self._damaged(f"{MANIFEST} does not say 'version'")
        return manifest

    def _table(self, name: str, schema: pa.Schema, num_rows: int) -> Table:
        try:
            table = Table(self.path / name)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(f"{name}/ is not readable") from error
        if len(table) != num_rows:
            raise self._damaged(f"{name}/ has {len(table)} of {num_rows} rows")
        if any(batch.schema != schema for batch in table.batches):
            raise self._damaged(f"{name}/ has other columns")
        return table

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.path}: this store is damaged ({what}); prepare with --fresh to make it anew")

    def __reduce__(self) -> tuple[object, ...]:
        return Store, (self.path,)

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def num_images(self) -> int:
        """Distinct images."""
        return len(self._images)

    @cached_property
    def image_keys(self) -> NDArray[np.int64]:
        """The key of each image, in row order; equal images have equal keys in every store."""
        return mapped(self.path / KEYS, np.dtype(np.int64))

    def find_image(self, key: int) -> int | None:
        """Return the row of the image with a key, None where it is not in this store."""
        place = int(np.searchsorted(self.image_keys, key, sorter=self._image_order))
        if place == len(self.image_keys) or self.image_keys[self._image_order[place]] != key:
            return None
        return int(self._image_order[place])

    @cached_property
    def _image_order(self) -> NDArray[np.int64]:
        return mapped(self.path / ORDER, np.dtype(np.int64))

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """Width and height of each image, in row order."""
        return list(zip(self._images.column("width"), self._images.column("height"), strict=True))

    def image_size(self, row: int) -> tuple[int, int]:
        """Return the width and height of an image."""
        return self._images.value(row, _WIDTH), self._images.value(row, _HEIGHT)

    @property
    def keys(self) -> Iterator[str]:
        """Yield the key of each sample, in row order."""
        return self._samples.column("key")

    @cached_property
    def decoding(self) -> Decoding:
        """How its images were looked at when it was made, and are to be looked at."""
        return Decoding(orientation=self.manifest["orientation"], max_pixels=self.manifest["max_pixels"])

    def image(self, row: int) -> ImageRef:
        """Return an image: its bytes, or the file it was left in."""
        content = self._images.value(row, _BYTES)
        source = content if content is not None else Path(self._images.value(row, _PATH))
        return ImageRef(source=source, decoding=self.decoding)

    def image_bytes(self, row: int) -> bytes:
        """Return the encoded bytes of an image; raise SkipSample where the file it was left in is not readable now."""
        return read_bytes(self.image(row))

    def sample(self, row: int) -> Sample:
        """Return a sample with its images."""
        record = self._samples.value(row, _MESSAGES)
        images = {image_row: self.image(image_row) for image_row in image_rows_of(record)}
        return Sample(key=self._samples.value(row, _KEY), messages=to_messages(record, images))

    def sample_batches(self) -> list[pa.RecordBatch]:
        """Return the Arrow batches of samples/."""
        return self._samples.batches

    def stored_samples(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[Sample, tuple[int, ...]]]:
        """Yield samples with the rows of their images in reading order; of the images only the sizes are given."""
        for key, record in self._samples.rows(start, len(self) if stop is None else stop):
            rows = image_rows_of(record)
            images = {row: ImageRef(source=b"", size=self.image_size(row)) for row in rows}
            yield Sample(key=key, messages=to_messages(record, images)), rows

    def changed_files(self, files: Sequence[Path]) -> list[Path]:
        """Return what is no longer as it was when the store was made: raw files, and image files that records name. A
        file is read again only where its time of change says that it may be another; what was deleted since is no
        change, since the store has what it needs of it."""
        known = {Path(entry["path"]): entry for entry in self.manifest["files"]}
        changed = [file for file in files if _is_other(file, known.get(location(file)))]
        changed += known.keys() - set(map(location, files))
        try:
            return changed + list(changed_image_files(self.path / IMAGE_FILES))
        except (ValueError, TypeError, KeyError) as error:
            raise self._damaged(f"{IMAGE_FILES} is not readable") from error


def is_store_folder(path: Path) -> bool:
    """Return whether a folder is a store, finished or not, and nothing else, so that its writer may remove it."""
    names = {file.name for file in path.iterdir()} if path.is_dir() else set()
    return names <= _LAYOUT and (KEYS in names or {"samples", "images"} <= names)


def _is_other(file: Path, known: dict[str, Any] | None) -> bool:
    if known is None or not file.is_file():
        return known is None
    if (stamp := stamp_of(file)) == (known["bytes"], known["mtime_ns"]):
        return False
    return stamp is None or stamp[0] != known["bytes"] or hash_file(file) != known["xxh3"]
