"""Reading published file formats as rows, one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.errors import UserError
from sft.sample import SkipSample

Row = dict[str, Any]
MAX_RECORD_BYTES = 64 * 1024 * 1024


def require_file(path: Path, what: str) -> Path:
    """The path itself, when it is a file.

    Raises:
        UserError: it is not there; `what` says what was expected.
    """
    if not path.is_file():
        raise UserError(f"{path}: file not found; expected {what}")
    return path


def read_json(path: Path) -> Any:
    """A whole JSON file; for files of megabytes.

    Raises:
        UserError: missing, or not JSON.
    """
    try:
        return json.loads(require_file(path, "a JSON file").read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error


def read_jsonl(path: Path) -> Iterator[Row | SkipSample]:
    """The rows of a JSON-lines file. A line that is no JSON object is handed over as a reason to skip it.

    Each row gets `"__line__"`, its line number from 1, for messages.
    """
    with require_file(path, "a JSON-lines file").open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if len(line) > MAX_RECORD_BYTES:
                yield SkipSample("record too long")
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                yield SkipSample("line is not JSON")
                continue
            yield row | {"__line__": number} if isinstance(row, dict) else SkipSample("line is not a JSON object")
