"""The states that a frozen tower and what follows it make of each image, kept on disk: an image is encoded once, not
once an epoch.

    STORE/<dataset>/features/<fingerprint>.f16    float16: the states (S, E) of each image, in the order of images/
                             <fingerprint>.xxh3   a checksum of each image's states and of its key; 0: not there yet

The fingerprint is of everything that bears on the states besides the image: weights, settings, precision. Training
rounds what it has just encoded as what it reads, and encodes images one by one, so that the states of an image depend
on nothing else: an empty, a full and a half-filled cache give the same loss to the bit.

Nobody locks, syncs or waits. States count if their checksum says so; those that were torn by a kill, by a full disk or
by two processes at once do not, and are encoded again. Both files have holes where nothing is written yet.

Shape letters: S states of an image, E size of a state.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from sft.batches.source_stream import sums_before
from sft.core.files import mapped
from sft.core.sample import Batch, Tiling
from sft.data.store import Store
from sft.models.family import Images
from sft.models.packed_model import PackedModel

VERSION = 1
"""Raised when the same image and weights could give other features."""
FOLDER = "features"

Features = NDArray[np.float16]
"""(S, E)"""


def fingerprint(weights: Iterable[tuple[str, Tensor]], settings: Mapping[str, Any]) -> str:
    """Changes with any weight, its type, or a setting; `settings` are JSON."""
    digest = xxhash.xxh3_128(json.dumps([VERSION, settings], sort_keys=True).encode())
    for name, weight in weights:
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


class _FeatureFile:
    """The states of the images of one store."""

    def __init__(self, store: Store, name: str, images: Images) -> None:
        self.store = store
        self.error: OSError | None = None
        """Why nothing can be written, if so."""
        self.sums = np.zeros(store.num_images, np.uint64)
        self._state_size = images.state_size
        self._starts = _starts_of_images(store, images)
        files = (store.path / FOLDER / f"{name}.f16", store.path / FOLDER / f"{name}.xxh3")
        sizes = (self.num_bytes, 8 * store.num_images)
        try:
            files[0].parent.mkdir(exist_ok=True)
            self._features, self._checksums = (
                _opened(self, file, size) for file, size in zip(files, sizes, strict=True)
            )
        except OSError as error:  # a read-only file system, say
            self.error = error
            if not all(file.is_file() for file in files):
                return
            self._features = _opened(self, files[0])
        self.sums = mapped(files[1], np.dtype(np.uint64))

    @property
    def num_bytes(self) -> int:
        """Bytes of the states of all images."""
        return 2 * self._state_size * int(self._starts[-1])

    def read(self, key: int) -> Features | None:
        """Return the states of an image, None where they are not there."""
        row = self.store.find_image(key)
        if row is None or not self.sums[row]:
            return None
        start, stop = self._starts[row : row + 2].tolist()
        features_SE = np.empty((stop - start, self._state_size), np.float16)
        # In one piece, and not through a map, which would fetch forty pages one by one.
        size = os.preadv(self._features, [features_SE.data], 2 * self._state_size * start)
        is_whole = size == features_SE.nbytes and int(self.sums[row]) == _checksum(features_SE, key)
        return features_SE if is_whole else None

    def write(self, key: int, features_SE: Features) -> bool:
        """Keep the states of an image; return whether it is of this store.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        row = self.store.find_image(key)
        if row is None:
            return False
        if self.error:
            raise self.error
        _write(self._features, features_SE.tobytes(), 2 * self._state_size * int(self._starts[row]))
        _write(self._checksums, np.uint64(_checksum(features_SE, key)).tobytes(), row * 8)
        return True


def _starts_of_images(store: Store, images: Images) -> NDArray[np.int64]:
    """Return the number of states before each image of a store, and of all."""
    if images.depends_on_size:
        numbers = np.array([images.num_states(images.tiling(*size)) for size in store.image_sizes], np.int64)
    else:
        numbers = np.full(store.num_images, images.num_states(images.one_tile), np.int64)
    return sums_before(numbers)


def _checksum(features: Features, key: int) -> int:
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(features).data, seed=key) or 1


def _opened(owner: object, file: Path, size: int | None = None) -> int:
    """Open a file and return its descriptor, which is closed with its owner. With a `size` the file is made if need be,
    and can be written; what is not there is a hole. Several processes may do so at once."""
    descriptor = os.open(file, os.O_RDONLY if size is None else os.O_RDWR | os.O_CREAT, 0o666)
    weakref.finalize(owner, os.close, descriptor)
    if size is not None and os.fstat(descriptor).st_size < size:
        os.ftruncate(descriptor, size)
    return descriptor


def _write(descriptor: int, content: bytes, offset: int) -> None:
    left = memoryview(content)
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written


class FeatureCache:
    """The states of the images of some stores. It can be sent to another process."""

    def __init__(self, stores: Sequence[Store], name: str, images: Images) -> None:
        """`name` is the fingerprint."""
        self.stores, self.name, self.images = list(stores), name, images
        self._files = [_FeatureFile(store, name, images) for store in stores]

    def __reduce__(self) -> tuple[object, ...]:
        return FeatureCache, (self.stores, self.name, self.images)

    @property
    def num_bytes(self) -> int:
        """Bytes that the states of all images take on disk."""
        return sum(file.num_bytes for file in self._files)

    def read(self, key: int) -> Features | None:
        """Return the states of an image, None where they are not there."""
        found = (file.read(key) for file in self._files)
        return next((features for features in found if features is not None), None)

    def write(self, key: int, features_SE: Features) -> None:
        """Keep the states of an image, in the first store that has it.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        any(file.write(key, features_SE) for file in self._files)

    def count(self) -> tuple[int, int]:
        """Return how many distinct images have their states there, and how many distinct images there are."""
        there = [file.store.image_keys[file.sums != 0] for file in self._files]
        keys = [store.image_keys for store in self.stores]
        return _distinct(there), _distinct(keys)


def _distinct(keys: Sequence[NDArray[np.int64]]) -> int:
    return len(np.unique(np.concatenate([np.empty(0, np.int64), *keys])))


@dataclass(eq=False)
class Encoder:
    """Completes batches: encodes the images whose states are not there yet, and keeps these."""

    model: PackedModel
    cache: FeatureCache
    autocast: Callable[[], AbstractContextManager[Any]]
    """Images are encoded under it."""
    warn: Callable[[str], None]
    """Called once with what is wrong with the cache; training goes on without it."""
    _is_writing: bool = True
    _overflows: int = 0

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with the states of all its images, and no tiles."""
        features_RE = batch.features_RE
        if features_RE is None or not batch.to_encode:
            return batch
        features_RE = features_RE.clone()
        stops = [*accumulate(batch.num_states)]
        was_training = self.model.training
        self.model.eval()
        for number, tiles in batch.tiles_by_image():
            features_SE = self._features(batch.to_encode[number], tiles, batch.tilings[number])
            if features_SE.dtype != features_RE.dtype:
                features_RE = features_RE.float()
            features_RE[stops[number] - batch.num_states[number] : stops[number]] = features_SE
        self.model.train(was_training)
        return replace(batch, features_RE=features_RE, to_encode={}, tiles=())

    def _features(self, key: int, tiles: Tensor, tiling: Tiling) -> Tensor:
        """Return the states of an image in float16, or in float32 where that cannot hold them, which are not kept."""
        known = self.cache.read(key)
        if known is not None:  # since the batch was made
            return torch.from_numpy(known).to(tiles.device)
        with torch.no_grad(), self.autocast():
            exact_SE = self.model.encode_images((tiles,), (tiling,))
        features_SE = exact_SE.half()
        if not features_SE.isfinite().all():
            self._overflows += 1
            if self._overflows == 1:
                self.warn("features of an image are over float16's 65,504; such images are encoded each time")
            return exact_SE.float()
        self._keep(key, features_SE)
        return features_SE

    def _keep(self, key: int, features_SE: Tensor) -> None:
        if not self._is_writing:
            return
        try:
            self.cache.write(key, features_SE.cpu().numpy())
        except OSError as error:
            self._is_writing = False
            self.warn(f"data.feature_cache: no more features are kept, other images are encoded each time ({error})")
