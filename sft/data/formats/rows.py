"""What all readers share: the rows they make, limits, and how files are found and named."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from sft.core.errors import UserError, printable

Row = dict[str, Any]

MAX_RECORD_BYTES = 64 * 1024 * 1024
max_record_bytes = ContextVar("max_record_bytes", default=MAX_RECORD_BYTES)
"""Records over this size are skipped; `data.max_record_bytes` in a recipe."""

TOO_LONG = "record too long"

BLOCK_BYTES = 1024 * 1024


@contextmanager
def record_limit(limit: int) -> Iterator[None]:
    """Read with another limit on the size of a record."""
    token = max_record_bytes.set(limit)
    try:
        yield
    finally:
        max_record_bytes.reset(token)


def require_file(path: Path, what: str) -> Path:
    """Return the path itself when it is a file, else raise a UserError by which `what` was expected."""
    if not path.is_file():
        raise UserError(f"{path}: file not found; expected {what}")
    return path


def folder_of(path: Path) -> Path:
    """Return the data's folder, where the path is the folder or its file."""
    return path if path.is_dir() else path.parent


def find_files(path: Path, *patterns: str, what: str) -> list[Path]:
    """Return the path itself when it is a file, else the files below it that match the first pattern that any file
    matches. Without any raise a UserError by which `what` was expected."""
    if path.is_file():
        return [path]
    for pattern in patterns:
        if found := sorted(file for file in path.glob(pattern) if file.is_file()):
            return found
    raise UserError(f"{path}: no {' or '.join(patterns)} found; expected {what}")


def placed(row: Row, here: str, at: float) -> Row:
    """Return a raw row with what every reader adds, and without names that only our own keys may have."""
    for name in [name for name in row if name.startswith("__") and name.endswith("__")]:
        del row[name]
    row["__from__"], row["__at__"] = here, at
    return row


def one_line(error: object) -> str:
    return printable(" ".join(str(error).split())[:200])
