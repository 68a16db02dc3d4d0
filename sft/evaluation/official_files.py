"""Reading the files that a benchmark is published in."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sft.core.errors import UserError
from sft.core.files import text_lines


def read_json(file: Path) -> Any:
    """Return what a file of JSON holds.

    Raises:
        UserError: it is missing or no JSON.
    """
    with official_layout(file):
        return json.loads(file.read_text(encoding="utf-8-sig"))


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one on each line.

    Raises:
        UserError: it is missing, or a line is none.
    """
    with official_layout(file):
        return [dict(json.loads(line)) for line in text_lines(file) if line.strip()]


def read_csv(file: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file by the names of its first line.

    Raises:
        UserError: it is missing or no CSV.
    """
    with official_layout(file), file.open(encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.DictReader(lines))
        if not rows:
            raise ValueError("no rows")
        return rows


@contextmanager
def official_layout(file: Path) -> Iterator[None]:
    """Report what goes wrong while a file is read, or while its records are taken apart.

    Raises:
        UserError: naming the file.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}; expected the benchmark's official file") from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{file}: not of the official layout ({found})") from error
