"""Samples and images of prepared datasets, read by their place."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sft.core.sample import Decoding, PlacedSample
from sft.data.encoded_arrays import EncodedSamples
from sft.data.prepared_source import PreparedDataset
from sft.data.store import Store
from sft.recipe import DataConfig


class Location(NamedTuple):
    """Where a sample of a pack is read: which source, which of its datasets, which row there."""

    source: int
    part: int
    row: int


class Reader:
    """Reads samples and images. To another process it goes as the paths of the stores, which are opened anew there."""

    def __init__(self, parts: Sequence[Sequence[PreparedDataset]], data: DataConfig) -> None:
        self.parts = parts
        self.data = data
        self._stores = list(dict.fromkeys(part.store for own in parts for part in own))

    def __reduce__(self) -> tuple[object, ...]:
        return _open_reader, ([[(part.store.path, part.encoded.path) for part in own] for own in self.parts], self.data)

    def sample(self, place: Location) -> PlacedSample:
        """Return the encoded sample at a location, with the keys of its images."""
        part = self.parts[place.source][place.part]
        keys = part.store.image_keys
        images = tuple(int(keys[image_row]) for image_row in part.encoded.image_rows(place.row))
        return PlacedSample(part.encoded[place.row], images, place.source)

    def image_bytes(self, key: int) -> bytes:
        """Return the encoded bytes of an image, from whichever store has it; raise SkipSample as that does."""
        store, row = self._find_image(key)
        return store.image_bytes(row)

    def image_size(self, key: int) -> tuple[int, int]:
        """Return the width and height of an image, which its store noted when it was prepared."""
        store, row = self._find_image(key)
        return store.image_size(row)

    def decoding(self, key: int) -> Decoding:
        """Return how the store that has an image decodes it."""
        return self._find_image(key)[0].decoding

    def _find_image(self, key: int) -> tuple[Store, int]:
        """Return the first store that has an image, and its row there."""
        for store in self._stores:
            if (row := store.find_image(key)) is not None:
                return store, row
        raise KeyError(key)


def _open_reader(paths: Sequence[Sequence[tuple[Path, Path]]], data: DataConfig) -> Reader:
    parts = [[PreparedDataset(Store(store), EncodedSamples(encoded)) for store, encoded in own] for own in paths]
    return Reader(parts, data)
