"""A JSON object of base64 strings, as MIMIC-IT keeps its images: where each stands, and its bytes."""

import mmap
import re
from pathlib import Path
from typing import NamedTuple

from sft.data.formats.rows import require_file

_BASE64_MEMBER = re.compile(rb'"(?<!\\")([^"\\]{1,256})"\s*:\s*(?:\[\s*)?"([^"\\]*)"')


class FileRange(NamedTuple):
    """Where some bytes stand."""

    file: Path
    offset: int
    length: int

    def read(self) -> bytes:
        """Return the bytes."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)


def index_base64_object(path: Path) -> dict[str, FileRange]:
    """Return where each value of a JSON object `{"name": "base64", …}` stands; a value may be a list of one such
    string. The file may have any size (CGD.json: 118,287 images): it is scanned once, and only names and places are
    kept. This works since base64 has neither quotes nor escapes; a member that has some is left out of the index."""
    if not require_file(path, "a JSON object of base64 strings").stat().st_size:
        return {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return {
            found[1].decode("utf-8", "replace"): FileRange(path, found.start(2), found.end(2) - found.start(2))
            for found in _BASE64_MEMBER.finditer(content)
        }
