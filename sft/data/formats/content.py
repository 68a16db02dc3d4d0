"""What a file holds, told by its first bytes and not by its name; and its bytes, unpacked."""

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, islice, repeat
from pathlib import Path
from typing import IO, Any, Literal

from sft.core.errors import UserError
from sft.data.formats.rows import BLOCK_BYTES, one_line, require_file

Kind = Literal["parquet", "arrow", "tar", "csv", "list", "object", "lines", "empty"]
"""`object`: one JSON object, or several of more than one line each. `lines`: any other text."""

READ = "JSON lines, a JSON list or object, CSV, one of these packed by gzip or zstd, parquet or Arrow"
NOT_UTF8 = "is not UTF-8, maybe latin-1, cp1252 or gb18030"
_HEAD_BYTES = 4096
_BLANKS = b" \t\r\n"
_PACKINGS = ((rb"\x1f\x8b", "gzip"), (rb"(\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)", "zstd"))
_TABLES = ((rb"PAR1", "parquet"), (rb"ARROW1|\xff\xff\xff\xff", "arrow"))
"""Arrow as a file, and as the stream that `datasets` caches."""
_BY_NAME: dict[str, Kind] = {"csv|tsv": "csv", "parquet": "parquet", "arrow": "arrow", "tar|tgz": "tar"}
"""CSV has no first bytes of its own; what lost its own is refused by its reader."""
_REFUSED = (
    (rb"PK[\3\5\7]", "is a zip archive; unpack it"),
    (rb"\xfd7zXZ\0|BZh[1-9]|\x04\x22\x4d\x18|7z\xbc\xaf|Rar!", "is packed by xz, bzip2, lz4, 7z or rar; unpack it"),
    (rb"version https://git-lfs", "is a pointer of Git LFS and not the data; run `git lfs pull`"),
    (rb"(?i)\s*<(!doctype html|html)", "is a web page, as a failed download leaves it; get the file again"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP", "is an image"),
    (rb"%PDF|\x89HDF|SQLite format 3|\x80[\2-\5]", "is PDF, HDF5, SQLite or a pickle, which are not read"),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32"),  # by its mark, else by the zeros between letters
    (rb"[\t-~]\0\0\0[\t-~]", "UTF-32LE"),
    (rb"\0\0\0[\t-~]\0", "UTF-32BE"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16"),
    (rb"[\t-~]\0[\t-~]\0", "UTF-16LE"),
    (rb"\0[\t-~]\0[\t-~]", "UTF-16BE"),
)


class Content:
    """The bytes of a file, unpacked where it is gzip or zstd; in memory is a block of them."""

    def __init__(self, path: Path, raw: IO[bytes]) -> None:
        self.packing = _match(_PACKINGS, raw.read(4)) or ""
        raw.seek(0)
        self._raw, self._size = raw, max(path.stat().st_size, 1)
        self.file = io.BufferedReader(self._unpacked(), BLOCK_BYTES) if self.packing else raw

    def _unpacked(self) -> Any:
        if self.packing == "gzip":
            return gzip.GzipFile(fileobj=self._raw)
        import pyarrow as pa

        return pa.CompressedInputStream(self._raw, "zstd")

    @property
    def share_read(self) -> float:
        """How much of the file was read, 0 to 1."""
        return self._raw.tell() / self._size


@contextmanager
def opened(path: Path, what: str) -> Iterator[Content]:
    """Yield the content of a file; raise UserError where it is missing, `what` was expected, or packed and damaged."""
    with require_file(path, what).open("rb", buffering=BLOCK_BYTES) as raw:
        content = Content(path, raw)
        try:
            yield content
        except (EOFError, OSError, zlib.error) as error:
            if not content.packing:
                raise
            after = f"{content.packing} after {content.share_read:.0%} of it"
            raise UserError(f"{path}: not readable as {after}: {one_line(error)}; get it again") from error


def kind_of(path: Path) -> Kind:
    """Return what a file holds, unpacked; raise UserError for none, for damage, and for what is known and not read."""
    with opened(path, READ) as content:
        head = content.file.read(_HEAD_BYTES)
        kind: Kind | None = _match(_TABLES, head) or ("tar" if _is_tar_header(head) else None)
        is_twice = kind in ("parquet", "arrow") or (content.packing, kind) == ("zstd", "tar") or _match(_PACKINGS, head)
        if content.packing and is_twice:
            raise UserError(f"{path}: is {kind or 'packed'} inside {content.packing}; unpack it")
        if kind is not None:
            return kind
        if found := _match(_REFUSED, head):
            unpacked = f"<({content.packing} -dc {path.name})" if content.packing else path.name
            encoding = f"is text in {found}; `iconv -f {found} -t UTF-8 {unpacked}` makes UTF-8 of it"
            raise UserError(f"{path}: {encoding if found.startswith('UTF') else found}; expected {READ}")
        start = head.removeprefix(b"\xef\xbb\xbf").lstrip(_BLANKS)
        while not start and (block := content.file.read(BLOCK_BYTES)):
            start = block.lstrip(_BLANKS)
    if start[:1] == b"{":
        return "object" if _is_object(path) else "lines"
    if start[:1] == b"[":
        return "list"
    by_name = (kind for end, kind in _BY_NAME.items() if re.search(rf"\.({end})(\.\w+)?$", path.name, re.IGNORECASE))
    return next(by_name, "lines" if start else "empty")


def _match(patterns: tuple[tuple[bytes, Any], ...], head: bytes) -> Any:
    return next((what for pattern, what in patterns if re.match(pattern, head, re.DOTALL)), None)


def _is_tar_header(head: bytes) -> bool:
    with suppress(tarfile.HeaderError):
        return bool(tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape"))
    return False


def _is_object(path: Path) -> bool:
    """Return whether a text that begins with { is one object, and not one a line: its first line is its only one, or
    ends where no object does and the next one goes on with it."""
    with opened(path, READ) as content:
        (_, end), (start, next_end), (third, _) = islice(chain(_ends_of_lines(content.file), repeat(("", ""))), 3)
    is_list = start == "{" and end in ("[", ":") and (next_end in (",", "{", "[", ":") or third in ("]", "}"))
    return not start or (end in ("{", "[", ":", ",") and (start in ('"', "}", "]") or is_list))


def _ends_of_lines(file: IO[bytes]) -> Iterator[tuple[str, str]]:
    """Yield the first and the last character of each line that is not blank, however long it is."""
    ends = ""
    while block := file.readline(BLOCK_BYTES):
        text = block.removeprefix(b"\xef\xbb\xbf").strip(_BLANKS)
        ends = ends[:1] + (text[:1] + text[-1:]).decode("latin-1") if text else ends
        if ends and (block.endswith(b"\n") or len(block) < BLOCK_BYTES):
            yield ends[0], ends[-1]
            ends = ""
