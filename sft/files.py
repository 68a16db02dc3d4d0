"""Files that are whole or not there: written beside their place, synced, and renamed once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import xxhash


def hash_file(path: Path) -> str:
    """xxh3 of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a whole text file or nothing: beside it first, then renamed. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.staging")
    staging.write_text(text, encoding="utf-8", newline="")
    os.replace(staging, path)


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that gets its name when the block ends without an error. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.staging")
    with staging.open("wb") as file:
        yield file
    _sync(staging)
    os.replace(staging, path)


def discard(folder: Path) -> None:
    """Remove a folder, if it is there. It is gone at once: a kill never leaves half of it under its name."""
    old = _discarded(folder)
    shutil.rmtree(old, ignore_errors=True)
    with suppress(FileNotFoundError):
        folder.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(path: Path) -> None:
    """Remove what a kill while `path` was staged or discarded has left beside it."""
    for folder in (_staging(path), _discarded(path)):
        shutil.rmtree(folder, ignore_errors=True)


def _staging(path: Path) -> Path:
    return path.with_name(f".{path.name}.staging")


def _discarded(path: Path) -> Path:
    return path.with_name(f".{path.name.lstrip('.')}.old")


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A hidden folder that becomes `path` when the block ends without an error."""
    staging = _staging(path)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    for file in staging.rglob("*"):
        if file.is_file():
            _sync(file)
    discard(path)
    staging.rename(path)
    _sync(path.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
