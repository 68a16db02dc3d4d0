"""Files that are written whole or not at all: under a hidden name in the same folder, synced, and renamed once."""

import hashlib
import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from sft.core.contain import on_error
from sft.core.errors import RunError


def hash_file(path: Path) -> str:
    """Return the xxh3 hash of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def text_lines(file: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 text with their ends. A line ends at \\n alone: `str.splitlines` also ends one at
    U+2028, U+0085 and others, which JSON allows inside a string."""
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        yield from lines


def location(path: str | Path) -> Path:
    """Return a path by which a file or folder is known however it was spelled: absolute, without links to folders. A
    link to a file stays: what is beside it, and its name, are its own."""
    path = Path(path)
    return path.resolve() if path.is_dir() or path.name == ".." else path.parent.resolve() / path.name


@contextmanager
def explain_full_disk(path: Path, then: str = "checkpoints before it are whole") -> Iterator[None]:
    """Raise RunError where disk or quota is full. What stood there before is whole; `then` says what follows."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors says so in words only
        if getattr(error, "errno", None) not in (ENOSPC, EDQUOT) and os.strerror(ENOSPC) not in str(error):
            raise
        raise RunError(f"{path}: the disk is full; {then}") from error


def write_atomically(path: Path, text: str) -> None:
    """Write a whole text file, or nothing and raise an OSError that names it; the folder is made if need be."""
    with _renamed(path) as staging:
        staging.write_text(text, encoding="utf-8", newline="")


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that gets its name when the block ends without an error, else as `write_atomically`."""
    with _renamed(path) as staging:
        with staging.open("wb") as file:
            yield file
        _sync(staging)


@contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    """Yield a hidden name for a file that becomes `path` when the block ends without an error, else is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = staging_of(path)

    def remove(error: BaseException) -> None:
        with suppress(OSError):
            staging.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(staging)):  # a full disk comes without a name
            error.filename = str(path)

    with on_error(remove):
        yield staging
        os.replace(staging, path)


def discard(folder: Path) -> None:
    """Remove a folder, if it is there. It is gone at once: a kill never leaves half of it under its name."""
    old = _discarded(folder)
    shutil.rmtree(old, ignore_errors=True)
    with suppress(FileNotFoundError):
        folder.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(path: Path) -> None:
    """Remove what a kill has left that came while `path` was staged or discarded."""
    for folder in (staging_of(path), _discarded(path)):
        shutil.rmtree(folder, ignore_errors=True)


def staging_of(path: Path) -> Path:
    """Return the hidden folder that becomes `path`."""
    return path.with_name(f".{path.name}.staging")


def _discarded(path: Path) -> Path:
    return path.with_name(f".{path.name.lstrip('.')}.old")


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a hidden folder that becomes `path` when the block ends without an error."""
    staging = staging_of(path)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    readable = staging.stat().st_mode & 0o666  # what the umask leaves; safetensors writes files for their owner only
    for file in staging.rglob("*"):
        if file.is_file():
            if file.stat().st_nlink == 1:  # not another's, by a second name
                file.chmod(readable)
            _sync(file)
    discard(path)
    staging.rename(path)
    _sync(path.parent)


def mapped(file: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return a file of numbers, mapped into memory to be read here and there; an empty file cannot be mapped. Without
    advice the system reads ahead around every number that is looked at."""
    if not file.stat().st_size:
        return np.empty(0, dtype)
    numbers = np.memmap(file, dtype, "r")
    _advise(numbers, "MADV_RANDOM")
    return np.asarray(numbers)  # numpy's own class for it takes four times as long to look something up


def read_ahead(numbers: NDArray[Any]) -> None:
    """Let the system read ahead after all in a file that is `mapped`: all of it is about to be looked at."""
    of: Any = numbers
    while isinstance(of, np.ndarray) and not isinstance(of, np.memmap):
        of = of.base
    if isinstance(of, np.memmap):
        _advise(of, "MADV_NORMAL")


def _advise(numbers: np.memmap[Any, Any], advice: str) -> None:
    if hasattr(mmap, advice):  # not on Windows
        numbers._mmap.madvise(getattr(mmap, advice))  # type: ignore[attr-defined]


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
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
