"""What a frozen tower and resampler make of each image, kept on disk: an image is encoded once, not once an epoch.

    STORE/<dataset>/features/<fingerprint>.f16    float16 (images, S, E): row i belongs to row i of images/
                             <fingerprint>.xxh3   a checksum of each row and of its image's key; 0: not there yet

The fingerprint is of everything that bears on a row besides the image: weights, settings, precision. Training rounds
what it has just encoded as what it reads, and encodes images one by one, so that a row depends on nothing else: an
empty, a full and a half-filled cache give the same loss to the bit.

Nobody locks, syncs or waits. A row counts if its checksum says so; one that was torn by a kill, by a full disk or by
two processes at once does not, and is encoded again. Both files have holes where nothing is written yet.

Shape letters: S states of an image (latents of the resampler, or patches), E size of the vision tower.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from sft.core.files import mapped
from sft.core.sample import Batch
from sft.data.store import Store

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


def bytes_of(shape: tuple[int, int]) -> int:
    """What an image takes."""
    return 2 * shape[0] * shape[1]


class _FeatureFile:
    """The features of the images of one store."""

    def __init__(self, store: Store, name: str, shape: tuple[int, int]) -> None:
        self.store = store
        self.error: OSError | None = None
        """Why nothing can be written, if so."""
        self.sums = np.zeros(store.num_images, np.uint64)
        self._bytes = bytes_of(shape)
        files = (store.path / FOLDER / f"{name}.f16", store.path / FOLDER / f"{name}.xxh3")
        try:
            files[0].parent.mkdir(exist_ok=True)
            self._features, self._checksums = (
                _opened(self, file, size * store.num_images) for file, size in zip(files, (self._bytes, 8), strict=True)
            )
        except OSError as error:  # a read-only file system, say
            self.error = error
            if not all(file.is_file() for file in files):
                return
            self._features = _opened(self, files[0])
        self.sums = mapped(files[1], np.dtype(np.uint64))

    def read(self, key: int, out: Features) -> bool:
        """Copy the features of an image into `out`; false where they are not there, and `out` is then of no use."""
        row = self.store.find_image(key)
        if row is None or not self.sums[row]:
            return False
        # In one piece, and not through a map, which would fetch forty pages one by one.
        size = os.preadv(self._features, [out.data], row * self._bytes)
        return size == self._bytes and int(self.sums[row]) == _checksum(out, key)

    def write(self, key: int, features: Features) -> bool:
        """Keep the features of an image; false where it is not of this store.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        row = self.store.find_image(key)
        if row is None:
            return False
        if self.error:
            raise self.error
        _write(self._features, features.tobytes(), row * self._bytes)
        _write(self._checksums, np.uint64(_checksum(features, key)).tobytes(), row * 8)
        return True


def _checksum(features: Features, key: int) -> int:
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(features).data, seed=key) or 1


def _opened(owner: object, file: Path, size: int | None = None) -> int:
    """The descriptor of a file, which is closed with its owner. With a `size` the file is made if need be, and can be
    written; what is not there is a hole. Several processes may do so at once."""
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
    """The features of the images of some stores. It can be sent to another process."""

    def __init__(self, stores: Sequence[Store], name: str, shape: tuple[int, int]) -> None:
        """`name` is the fingerprint, `shape` is (S, E)."""
        self.stores, self.name, self.shape = list(stores), name, shape
        self._files = [_FeatureFile(store, name, shape) for store in stores]

    def __reduce__(self) -> tuple[object, ...]:
        return FeatureCache, (self.stores, self.name, self.shape)

    def read(self, key: int, out: Features) -> bool:
        """Copy the features of an image into `out`; false where they are not there, and `out` is then of no use."""
        return any(file.read(key, out) for file in self._files)

    def write(self, key: int, features: Features) -> None:
        """Keep the features of an image, in the first store that has it.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        any(file.write(key, features) for file in self._files)

    def count(self) -> tuple[int, int]:
        """Distinct images whose features are there, and distinct images."""
        there = [file.store.image_keys[file.sums != 0] for file in self._files]
        keys = [store.image_keys for store in self.stores]
        return _distinct(there), _distinct(keys)


def _distinct(keys: Sequence[NDArray[np.int64]]) -> int:
    return len(np.unique(np.concatenate([np.empty(0, np.int64), *keys])))


class Encoder:
    """Completes batches: encodes the images whose features are not there yet, and keeps these."""

    def __init__(
        self,
        model: Any,
        cache: FeatureCache,
        autocast: Callable[[], AbstractContextManager[Any]],
        warn: Callable[[str], None],
    ) -> None:
        """`model.encode_images` makes features (images, S, E) of uint8 pixels, under `autocast`. `warn` is told once
        what is wrong with the cache; training goes on without it."""
        self.model = model
        self.cache = cache
        self.autocast = autocast
        self._warn = warn
        self._is_writing = True
        self._overflows = 0

    def __call__(self, batch: Batch) -> Batch:
        """The batch with the features of all its images, and no pixels."""
        features_NSE = batch.features_NSE
        if features_NSE is None or not batch.to_encode:
            return batch
        features_NSE = features_NSE.clone()
        was_training = self.model.training
        self.model.eval()
        for (row, key), pixels_CHW in zip(batch.to_encode.items(), batch.pixel_values_NCHW, strict=True):
            features_SE = self._features(key, pixels_CHW)
            if features_SE.dtype != features_NSE.dtype:
                features_NSE = features_NSE.float()
            features_NSE[row] = features_SE
        self.model.train(was_training)
        return replace(batch, features_NSE=features_NSE, to_encode={}, pixel_values_NCHW=batch.pixel_values_NCHW[:0])

    def _features(self, key: int, pixels_CHW: Tensor) -> Tensor:
        """float16; what that cannot hold stays as it is, and is not kept."""
        known = np.empty(self.cache.shape, np.float16)
        if self.cache.read(key, known):  # since the batch was made
            return torch.from_numpy(known).to(pixels_CHW.device)
        with torch.no_grad(), self.autocast():
            exact_SE: Tensor = self.model.encode_images(pixels_CHW[None])[0]
        features_SE = exact_SE.half()
        if not features_SE.isfinite().all():
            self._overflows += 1
            if self._overflows == 1:
                self._warn("features of an image are over float16's 65,504; such images are encoded each time")
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
            self._warn(f"data.feature_cache: no more features are kept, other images are encoded each time ({error})")
