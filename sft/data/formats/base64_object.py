"""A JSON object of base64 strings, as MIMIC-IT keeps its images: where each stands, and its bytes."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

from sft.data.formats.rows import require_file

_BASE64_MEMBER = re.compile(rb'"(?<!\\")([^"\\]{1,256})"\s*:\s*(?:\[\s*)?"([^"\\]*)"')

ByteRange = tuple[int, int]
"""Offset and length in a file."""


def index_base64_object(path: Path) -> dict[str, ByteRange]:
    """Return where each value of a JSON object `{"name": "base64", …}` stands; a value may be a list of one such
    string.

    The file may have any size (CGD.json: 118,287 images): it is scanned once, and only names and places are kept. This
    works since base64 has neither quotes nor escapes; a member that has some is left out of the index.
    """
    if not require_file(path, "a JSON object of base64 strings").stat().st_size:
        return {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return {
            found[1].decode("utf-8", "replace"): (found.start(2), found.end(2) - found.start(2))
            for found in _BASE64_MEMBER.finditer(content)
        }


def read_range(path: Path, place: ByteRange) -> bytes:
    """Return the bytes at a place in a file."""
    offset, length = place
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)
