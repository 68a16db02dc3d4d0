"""Reading published file formats as rows, one at a time and in bounded memory.

Every reader adds two things to a row, for keys, messages and progress bars:
    "__from__"  file and line (or record, or member) it was read from: `train.jsonl:17`
    "__at__"    how much of the file was read by then, 0 to 1

A bad record is handed over as the reason to skip it (`SkipSample`). A file that is broken as a whole, cut off by a
failed download say, is a `UserError`: what it should have held cannot be counted. Nothing is fetched, nothing is
extracted to disk, and no pickle is ever opened.
"""

from __future__ import annotations

import json
import mmap
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

from sft.errors import UserError
from sft.sample import SkipSample

Row = dict[str, Any]

MAX_RECORD_BYTES = 64 * 1024 * 1024
max_record_bytes = ContextVar("max_record_bytes", default=MAX_RECORD_BYTES)
"""Records over this size are skipped; `data.max_record_bytes` in a recipe."""

TOO_LONG = "record too long"
_BLOCK = 1024 * 1024


@contextmanager
def record_limit(limit: int) -> Iterator[None]:
    """Read with another limit on the size of a record."""
    token = max_record_bytes.set(limit)
    try:
        yield
    finally:
        max_record_bytes.reset(token)


def require_file(path: Path, what: str) -> Path:
    """The path itself, when it is a file.

    Raises:
        UserError: it is not there; `what` says what was expected.
    """
    if not path.is_file():
        raise UserError(f"{path}: file not found; expected {what}")
    return path


def find_files(path: Path, *patterns: str, what: str) -> list[Path]:
    """The path itself when it is a file, else the files below it that match the first pattern that any file matches.

    Raises:
        UserError: there are none; `what` says what was expected.
    """
    if path.is_file():
        return [path]
    for pattern in patterns:
        if found := sorted(file for file in path.glob(pattern) if file.is_file()):
            return found
    raise UserError(f"{path}: no {' or '.join(patterns)} found; expected {what}")


# --------------------------------------------------------------------------------------------------------- JSON


def read_json(path: Path) -> Any:
    """A whole JSON file; for files of megabytes.

    Raises:
        UserError: missing, over MAX_RECORD_BYTES, or not JSON.
    """
    if require_file(path, "a JSON file").stat().st_size > MAX_RECORD_BYTES:
        raise UserError(f"{path}: larger than {MAX_RECORD_BYTES:,} bytes; expected a small JSON file")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error


def read_jsonl(path: Path) -> Iterator[Row | SkipSample]:
    """The objects of a JSON-lines file. A line that is none, or is too long, is a reason to skip it."""
    limit, size = max_record_bytes.get(), require_file(path, "a JSON-lines file").stat().st_size
    at = number = 0
    with path.open("rb", buffering=_BLOCK) as file:
        while line := file.readline(limit + 1):
            number += 1
            at += len(line)
            here = f"{path.name}:{number}"
            if len(line) > limit:
                while line and not line.endswith(b"\n"):
                    line = file.readline(_BLOCK)
                    at += len(line)
                yield SkipSample(TOO_LONG, detail=here)
            elif line.strip():
                yield _parsed(line, here, at / size)


def _parsed(line: bytes, here: str, at: float) -> Row | SkipSample:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return SkipSample("line is not JSON", detail=here)
    if not isinstance(row, dict):
        return SkipSample("line is not a JSON object", detail=here)
    row["__from__"], row["__at__"] = here, at
    return row


def read_json_list(path: Path, prefix: str = "item") -> Iterator[Row | SkipSample]:
    """The objects of a JSON list of any size, streamed. `prefix` says where the list is, as ijson does: `item` for a
    list at the top, `annotations.item` for one under a key.

    Raises:
        UserError: missing, or it stops being JSON somewhere.
    """
    import ijson

    with require_file(path, "a JSON list").open("rb") as file:
        counted = _Counted(file, path)
        number = 0
        try:
            for number, row in enumerate(ijson.items(counted, prefix, use_float=True), start=1):
                counted.start_record()
                here = f"{path.name}:{number}"
                if isinstance(row, dict):
                    yield row | {"__from__": here, "__at__": counted.share_read}
                else:
                    yield SkipSample("record is not a JSON object", detail=here)
        except (ijson.JSONError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not readable as JSON after record {number}: {_one_line(error)}") from error
    if not number:
        raise UserError(f"{path}: no JSON list of records at {prefix!r}")


def read_json_items(path: Path, prefix: str) -> Iterator[tuple[str, Any]]:
    """The keys and values of a JSON object of any size, streamed: the object at `prefix`, "" for the top.

    Raises:
        UserError: missing, or it stops being JSON somewhere.
    """
    import ijson

    with require_file(path, "a JSON object").open("rb") as file:
        counted = _Counted(file, path)
        key = None
        try:
            for key, value in ijson.kvitems(counted, prefix, use_float=True):
                counted.start_record()
                if isinstance(value, dict):
                    value |= {"__from__": f"{path.name}:{key}", "__at__": counted.share_read}
                yield key, value
        except (ijson.JSONError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not readable as JSON after key {key!r}: {_one_line(error)}") from error
    if key is None:
        raise UserError(f"{path}: no JSON object at {prefix!r}" if prefix else f"{path}: not a JSON object, or empty")


def first_json_byte(path: Path) -> str:
    """`[` or `{`, to tell a list from an object; "" for a file of blanks."""
    with require_file(path, "a JSON file").open("rb") as file:
        return file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1].decode("latin-1")


class _Counted:
    """A file that knows how much of it was read, and stops where one record would not end."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.file, self.path = file, path
        self.size = max(path.stat().st_size, 1)
        self.read_bytes = self.record_start = 0
        self.limit = max_record_bytes.get()

    def read(self, size: int = -1) -> bytes:
        if self.read_bytes - self.record_start > self.limit + 2 * _BLOCK:
            raise UserError(
                f"{self.path}: a record of over {self.limit:,} bytes (data.max_record_bytes); "
                "a JSON list cannot be read on behind it"
            )
        content = self.file.read(size)
        self.read_bytes += len(content)
        return content

    def start_record(self) -> None:
        self.record_start = self.read_bytes

    @property
    def share_read(self) -> float:
        return self.read_bytes / self.size


# ------------------------------------------------------------------------------- an object of base64 strings


_BASE64_MEMBER = re.compile(rb'"([^"\\]{1,256})"\s*:\s*(?:\[\s*)?"([^"\\]*)"')

BytesPlace = tuple[int, int]
"""Offset and length in a file."""


def index_base64_object(path: Path) -> dict[str, BytesPlace]:
    """Where each value of a JSON object `{"name": "base64", …}` stands; a value may be a list of one such string.

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


def read_place(path: Path, place: BytesPlace) -> bytes:
    """The bytes at a place in a file."""
    offset, length = place
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


# ------------------------------------------------------------------------------------------------------ parquet


def read_parquet(
    path: Path, *, columns: Sequence[str] | None = None, batch_rows: int = 64
) -> Iterator[Row | SkipSample]:
    """The rows of a parquet file, a few at a time; only some `columns`, where that spares reading.

    Raises:
        UserError: missing, cut off, or not parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    require_file(path, "a parquet file")
    limit, number = max_record_bytes.get(), 0
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            total = max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=batch_rows, columns=columns):
                for place in range(batch.num_rows):
                    number += 1
                    here = f"{path.name}:{number}"
                    one = batch.slice(place, 1)
                    if one.nbytes > limit:
                        yield SkipSample(TOO_LONG, detail=here)
                    else:
                        yield one.to_pylist()[0] | {"__from__": here, "__at__": number / total}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as parquet after row {number}: {_one_line(error)}") from error


# --------------------------------------------------------------------------------------------- WebDataset tars


def read_tar(path: Path, extensions: Sequence[str]) -> Iterator[Row | SkipSample]:
    """The samples of a WebDataset shard (.tar, .tar.gz): members that share a name up to its first dot, as
    {"__key__": name, extension: bytes}. A number may stand before an extension (`000.3.image.jpeg`). Members with other
    extensions are not even read; nothing is ever unpickled.

    Raises:
        UserError: missing, not a tar, or cut off. One cut between two members reads without an error of its own but
            lacks the two blocks of zeros that end every tar, so that is looked for.
    """
    limit, size = max_record_bytes.get(), require_file(path, "a tar").stat().st_size
    sample: Row = {}
    end = 0
    try:
        with path.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:*") as tar:
            while (member := tar.next()) is not None:
                vars(tar)["members"] = []  # tarfile would keep them all
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if member.isdir():
                    continue
                key, extension = _split_name(member.name)
                if sample and sample["__key__"] != key:
                    yield _whole(sample)
                    sample = {}
                sample = sample or {"__key__": key, "__from__": f"{path.name}:{key}"}
                sample["__at__"] = raw.tell() / max(size, 1)
                if not member.isfile():
                    end = member.offset_data
                    sample["__skip__"] = "tar member is not a plain file"
                elif extension in sample:
                    sample["__skip__"] = "tar member stands there twice"
                elif extension.lstrip("0123456789.") in extensions:  # 3.image.jpeg of interleaved documents
                    if member.size > limit:
                        sample["__skip__"] = TOO_LONG
                    else:
                        sample[extension] = _member_bytes(tar, member)
            tar.fileobj.seek(end)
            if tar.fileobj.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
                raise UserError(f"{path}: the tar breaks off after {sample.get('__key__', 'nothing')}; get it again")
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError) as error:
        where = f"after {sample['__key__']}" if sample else "at its beginning"
        raise UserError(f"{path}: not readable as a tar {where}: {_one_line(error)}") from error
    if sample:
        yield _whole(sample)


def _split_name(name: str) -> tuple[str, str]:
    """`a/000.image.jpg` -> (`a/000`, `image.jpg`), as webdataset does."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    content = file.read() if file else b""
    if len(content) < member.size:
        raise EOFError(f"member {member.name} is cut off")
    return content


def _whole(sample: Row) -> Row | SkipSample:
    if "__skip__" in sample:
        return SkipSample(sample["__skip__"], detail=sample["__from__"])
    return sample


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
