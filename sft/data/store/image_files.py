"""What the image files that records name were like when they were read: a line of JSON for each of a piece.

A file that is changed, or there at last, makes other samples. A file deleted since is no change: the store has what it
needs of it.
"""

import hashlib
import json
from collections.abc import Container, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from sft.core.files import text_lines
from sft.core.images import read_bytes
from sft.core.sample import ImageRef

IMAGE_FILES = "image_files.jsonl"

Stamp = tuple[int, int]  # size and time of change


class ImageReader:
    """Reads images and writes down their files, each once."""

    def __init__(self, listed: IO[str]) -> None:
        self._listed = listed
        self._known: dict[str, tuple[Stamp | None, str | None]] = {}

    def read(self, image: ImageRef, seen: Container[str] = ()) -> tuple[bytes, str]:
        """Return the bytes of an image and their sha256; a file that is as it was, and whose hash was `seen`, is not
        read again and has no bytes. Raise SkipSample as `read_bytes`; that file is written down too."""
        stamp = stamp_of(image.source) if isinstance(image.source, Path) else None
        then, sha256 = self._known.get(str(image.source), (None, None)) if stamp else (None, None)
        if sha256 is not None and then == stamp and sha256 in seen:
            return b"", sha256
        sha256 = None
        try:
            content = read_bytes(image)
            sha256 = hashlib.sha256(content).hexdigest()
        finally:
            if isinstance(image.source, Path):
                self._note(image.source, stamp, sha256)
        return content, sha256

    def _note(self, file: Path, stamp: Stamp | None, sha256: str | None) -> None:
        if str(file) not in self._known:
            self._known[str(file)] = stamp, sha256
            num_bytes, mtime_ns = stamp or (None, None)
            line = {"path": str(file.absolute()), "bytes": num_bytes, "mtime_ns": mtime_ns, "sha256": sha256}
            self._listed.write(json.dumps(line) + "\n")


def changed_image_files(listed: Path) -> Iterator[Path]:
    """Yield the files of a list that have changed; one is read again only where its size or time of change tell so."""
    for line in text_lines(listed):
        entry = json.loads(line)
        file = Path(entry["path"])
        stamp = stamp_of(file)
        if stamp not in (None, (entry["bytes"], entry["mtime_ns"])) and _sha256(file) != entry["sha256"]:
            yield file


def stamp_of(file: Path) -> Stamp | None:
    """Return the size and time of change of a file; None where there is none."""
    try:
        stat = file.stat()
    except (OSError, ValueError):  # ValueError: a zero byte in its name
        return None
    return stat.st_size, stat.st_mtime_ns


def _sha256(file: Path) -> str | None:
    with suppress(OSError), file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
    return None
