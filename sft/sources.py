"""Reading published file formats as rows, one at a time and in bounded memory.

Every reader adds two things to a row, for keys, messages and progress bars:
    "__from__"  file and line (or record, or member) it was read from: `train.jsonl:17`
    "__at__"    how much of the file was read by then, 0 to 1
Names like these are ours: what the data have under such a name is dropped.

A bad record is handed over as the reason to skip it (`SkipSample`). A file that is broken as a whole, cut off by a
failed download say, is a `UserError`: what it should have held cannot be counted. Nothing is fetched, nothing is
extracted to disk, and no pickle is ever opened.
"""

from __future__ import annotations

import codecs
import gzip
import json
import mmap
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any, cast

from sft.errors import UserError, printable
from sft.sample import SkipSample

Row = dict[str, Any]

MAX_RECORD_BYTES = 64 * 1024 * 1024
max_record_bytes = ContextVar("max_record_bytes", default=MAX_RECORD_BYTES)
"""Records over this size are skipped; `data.max_record_bytes` in a recipe."""

TOO_LONG = "record too long"
TOO_DEEP = "record nested too deep"
MAX_DEPTH = 100
"""Of lists and objects in a JSON record: where Python's stack ends it can be neither counted nor sent to a process."""

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
    except ValueError:
        return SkipSample("line is not JSON", detail=here)
    except RecursionError:
        return SkipSample(TOO_DEEP, detail=here)
    if not isinstance(row, dict):
        return SkipSample("line is not a JSON object", detail=here)
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _is_deep(row):
        return SkipSample(TOO_DEEP, detail=here)
    return _placed(row, here, at)


def _placed(row: Row, here: str, at: float) -> Row:
    """A raw row with what every reader adds, and without what might be taken for ours."""
    for name in [name for name in row if name.startswith("__") and name.endswith("__")]:
        del row[name]
    row["__from__"], row["__at__"] = here, at
    return row


def read_json_list(path: Path, prefix: str = "item") -> Iterator[Row | SkipSample]:
    """The objects of a JSON list of any size, streamed. `prefix` says where the list is: `item` for a list
    at the top, `annotations.item` for one under a key.

    Raises:
        UserError: missing, a record over the limit, or it stops being JSON somewhere.
    """
    number = 0
    with _opened(path, "a JSON list") as text, text.errors(lambda: f"record {number}"):
        for number, row in enumerate(text.walk(prefix.split(".")[:-1], text.elements), start=1):
            here = f"{path.name}:{number}"
            if isinstance(row, dict):
                yield _placed(row, here, text.share_read)
            else:
                reason = row.reason if isinstance(row, SkipSample) else "record is not a JSON object"
                yield SkipSample(reason, detail=here)
    if not number:
        raise UserError(f"{path}: no JSON list of records at {prefix!r}")


def read_json_items(path: Path, prefix: str) -> Iterator[tuple[str, Any]]:
    """The keys and values of a JSON object of any size, streamed: the object at `prefix`, "" for the top. A value that
    is nested too deep is a SkipSample.

    Raises:
        UserError: missing, a value over the limit, or it stops being JSON somewhere.
    """
    key = None
    with _opened(path, "a JSON object") as text, text.errors(lambda: f"key {_one_line(key)!r}" if key else "no key"):
        for key, value in text.walk(prefix.split(".") if prefix else [], text.items):
            if isinstance(value, dict):
                _placed(value, f"{path.name}:{printable(key)}", text.share_read)
            yield key, value
    if key is None:
        raise UserError(f"{path}: no JSON object at {prefix!r}" if prefix else f"{path}: not a JSON object, or empty")


def first_json_byte(path: Path) -> str:
    """`[` or `{`, to tell a list from an object; "" for a file of blanks."""
    with require_file(path, "a JSON file").open("rb") as file:
        return file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1].decode("latin-1")


@contextmanager
def _opened(path: Path, what: str) -> Iterator[_JsonText]:
    with require_file(path, what).open("rb") as file:
        yield _JsonText(file, path)


class _JsonText:
    """A JSON text of any size, of which one value at a time is in memory."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.file, self.path = file, path
        self.size = max(path.stat().st_size, 1)
        self.num_read = 0
        self.limit = max_record_bytes.get()
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at = "", 0

    @property
    def share_read(self) -> float:
        return self.num_read / self.size

    @contextmanager
    def errors(self, last: Callable[[], str]) -> Iterator[None]:
        """Tell after what the text stops being JSON."""
        try:
            yield
        except ValueError as error:
            raise UserError(f"{self.path}: not readable as JSON after {last()}: {_one_line(error)}") from error

    def walk(self, keys: list[str], read: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """What `read` reads below the keys, and on to the end of the text."""
        yield from self._below(keys, read)
        if rest := self.peek():
            raise ValueError(f"it goes on behind its end with {rest!r}")

    def _below(self, keys: list[str], read: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        if not keys:
            yield from read()
        elif self.peek() != "{":
            self.value()
        else:
            for key in self._keys():
                if key == keys[0]:
                    yield from self._below(keys[1:], read)
                else:
                    self.value()

    def elements(self) -> Iterator[Any]:
        """The elements of the list that stands here; none where something else does."""
        if self.peek() != "[":
            self.value()
        elif self._opens("[", "]"):
            yield self.value()
            while self._takes(",", "]") == ",":
                yield self.value()

    def items(self) -> Iterator[tuple[str, Any]]:
        """The members of the object that stands here; none where something else does."""
        if self.peek() != "{":
            self.value()
        else:
            for key in self._keys():
                yield key, self.value()

    def _keys(self) -> Iterator[str]:
        """The keys of an object; whoever asks for the next one has read the value."""
        if self._opens("{", "}"):
            yield self._key()
            while self._takes(",", "}") == ",":
                yield self._key()

    def _key(self) -> str:
        if (found := self.peek()) != '"':
            raise ValueError(f"expected a key, found {found!r}" if found else CUT_OFF)
        key: str = self.value()
        self._takes(":")
        return key

    def _opens(self, start: str, end: str) -> bool:
        """Go into a list or object, if only to leave it at once."""
        self._takes(start)
        is_empty = self.peek() == end
        self.at += is_empty
        return not is_empty

    def _takes(self, *expected: str) -> str:
        found = self.peek()
        if found not in expected:
            raise ValueError(f"expected {' or '.join(expected)}, found {found!r}" if found else CUT_OFF)
        self.at += 1
        return found

    def peek(self) -> str:
        """The next character that is no blank, "" at the end."""
        while True:
            self.at = _BLANKS.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._reads_on():
                return ""

    def value(self) -> Any:
        """The value that stands here; where it is nested too deep, that."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                problem, is_whole = "", end < len(self.text) - _SURROUNDINGS  # else a number may go on
            except json.JSONDecodeError as error:
                near = self.text[error.pos : error.pos + 20]
                problem, is_whole = f"{error.msg.removesuffix(' at')} at {near!r}" if near else CUT_OFF, False
                if error.pos < len(self.text) - _SURROUNDINGS and not error.msg.startswith("Unterminated string"):
                    raise ValueError(problem) from error
            except RecursionError:
                problem, is_whole, value, end = "", True, SkipSample(TOO_DEEP), self._end_of_brackets()
            if is_whole or not self._reads_on():
                break
        if problem:
            raise ValueError(problem)
        if end - self.at > self.limit:
            raise self._too_long()
        num_brackets = self.text.count("[", self.at, end) + self.text.count("{", self.at, end)
        self.at = end
        return SkipSample(TOO_DEEP) if num_brackets > MAX_DEPTH and _is_deep(value) else value

    def _end_of_brackets(self) -> int:
        """Where the list or object that stands here ends, by its brackets alone."""
        while True:
            depth = 0
            for found in _BRACKET_OR_STRING.finditer(self.text, self.at):
                depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
                if not depth:
                    return found.end()
            if not self._reads_on():
                raise ValueError(CUT_OFF)

    def _reads_on(self) -> bool:
        """Read more of the text; at its end there is none."""
        left = self.text[self.at :]
        if len(left) > self.limit + _SURROUNDINGS:
            raise self._too_long()
        block = self.file.read(max(_BLOCK, len(left)))  # twice as much each time, so that a long record is quick
        more = self.decoder.decode(block, final=not block)
        if block:
            self.num_read += len(block)
            self.text, self.at = left + more, 0
        return bool(block)

    def _too_long(self) -> UserError:
        return UserError(
            f"{self.path}: a record of over {self.limit:,} bytes (data.max_record_bytes); "
            "a JSON list cannot be read on behind it"
        )


CUT_OFF = "it is cut off"
_DECODER = json.JSONDecoder()
_BRACKET_OR_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
_BLANKS = re.compile(r"[ \t\r\n]*")
_SURROUNDINGS = 64
"""What stands closer to the end of a text may mean something else when there is more of it."""


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for one in level for child in _children(one)]
        if not level:
            return False
    return True


def _children(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


# ------------------------------------------------------------------------------- an object of base64 strings


_BASE64_MEMBER = re.compile(rb'"(?<!\\")([^"\\]{1,256})"\s*:\s*(?:\[\s*)?"([^"\\]*)"')

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


IMAGES_A_ROW = 4
"""A row of a parquet file may hold so many images of the size of a record, since it holds them as they are."""
BATCH_BYTES = 64 * 1024 * 1024
BATCH_ROWS = 64
"""So much of a parquet file is unpacked at a time, about."""
MAX_UNPACKED_BYTES = 256 * 1024 * 1024
MAX_UNPACKED_TIMES = 1000
"""A column of more bytes than that many times what it is packed into is a bomb: a page of it is unpacked as a whole."""


def read_parquet(path: Path, *, columns: Sequence[str] | None = None) -> Iterator[Row | SkipSample]:
    """The rows of a parquet file, a few at a time; only some `columns`, where that spares reading.

    The limit on records is one on the text of a row, and on each of its images by itself.

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
            for group in range(file.num_row_groups):
                num_rows = batch_rows(path, file.metadata.row_group(group), columns)
                for batch in file.iter_batches(batch_size=num_rows, row_groups=[group], columns=columns):
                    for place in range(batch.num_rows):
                        number += 1
                        here = f"{path.name}:{number}"
                        one = batch.slice(place, 1)
                        if one.nbytes > limit and _is_too_long(one, limit):
                            yield SkipSample(TOO_LONG, detail=here)
                        else:
                            yield _converted(one, here, number / total)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as parquet after row {number}: {_one_line(error)}") from error


def batch_rows(path: Path, group: Any, columns: Sequence[str] | None = None) -> int:
    """How many rows of a row group make up BATCH_BYTES, at the most; its metadata tell how large they are unpacked.

    Raises:
        UserError: they are a bomb.
    """
    num_rows, num_bytes = int(group.num_rows), 0
    for number in range(group.num_columns):
        column = group.column(number)
        if columns is not None and column.path_in_schema.partition(".")[0] not in columns:
            continue
        unpacked, packed = int(column.total_uncompressed_size), int(column.total_compressed_size)
        if column.physical_type == "BYTE_ARRAY" and unpacked > max(MAX_UNPACKED_BYTES, MAX_UNPACKED_TIMES * packed):
            name = printable(column.path_in_schema)
            raise UserError(f"{path}: column {name} unpacks {packed:,} bytes into {unpacked:,}, as no data do")
        num_bytes += unpacked
        if column.physical_type == "BYTE_ARRAY" and column.dictionary_page_offset:  # any value may be all of it
            num_bytes += int(column.num_values) * _dictionary_bytes(path, column)
    return min(max(BATCH_BYTES * num_rows // max(num_bytes, 1), 1), BATCH_ROWS)


def _dictionary_bytes(path: Path, column: Any) -> int:
    """Unpacked size of the values that a column names by number: the second number in the header of their page."""
    with path.open("rb") as file:
        file.seek(max(column.dictionary_page_offset, 0))
        found = _PAGE_HEADER.match(file.read(16))
    if not found:
        return int(column.total_uncompressed_size)
    varint: bytes = found[1]
    return sum((byte & 127) << 7 * place for place, byte in enumerate(varint)) // 2  # a zigzag varint


_PAGE_HEADER = re.compile(rb"\x15[\x00-\x7f]\x15([\x80-\xff]{0,4}[\x00-\x7f])", re.DOTALL)
"""How Thrift writes a page's kind and size."""


def _is_too_long(one: Any, limit: int) -> bool:
    """Whether the text of a row is over the limit, or one of its images, or all of them together by far."""
    num_bytes = [size for column in one.columns for size in _binary_sizes(column)]
    return max(num_bytes, default=0) > limit or one.nbytes - sum(num_bytes) > limit or one.nbytes > IMAGES_A_ROW * limit


def _binary_sizes(values: Any) -> list[int]:
    """Sizes of the bytes anywhere in an Arrow array."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type):
        return [size or 0 for size in pc.binary_length(values).to_pylist()]
    if pa.types.is_struct(values.type):
        return [size for field in values.flatten() for size in _binary_sizes(field)]
    return _binary_sizes(values.flatten()) if pa.types.is_list(values.type) else []


def _converted(one: Any, here: str, at: float) -> Row | SkipSample:
    try:
        row: Row = one.to_pylist()[0]
    except (ValueError, OverflowError):  # text that is not UTF-8, a date in the year 60000
        return SkipSample("row has a value that cannot be read", detail=here)
    return _placed(row, here, at)


# --------------------------------------------------------------------------------------------- WebDataset tars


MAX_HEADER_BYTES = 64 * 1024
"""Of one tar member: its header, its long name, its attributes."""


def read_tar(path: Path, extensions: Sequence[str]) -> Iterator[Row | SkipSample]:
    """The samples of a WebDataset shard (.tar, .tar.gz): members that share a name up to its first dot, as
    {"__key__": name, extension: bytes}. A number may stand before an extension (`000.3.image.jpeg`). Members with other
    extensions are not even read; nothing is ever unpickled.

    Raises:
        UserError: missing, not a tar, or cut off. One cut between two members reads without an error of its own but
            lacks the two blocks of zeros that end every tar, so that is looked for.
    """
    limit, size = max_record_bytes.get(), max(require_file(path, "a tar").stat().st_size, 1)
    sample: Row = {}
    num_bytes = 0
    try:
        with path.open("rb") as raw:
            tar = _Tar(raw)
            for member in tar.members():
                key, extension = _split_name(member.name)
                if sample and sample["__key__"] != key:
                    yield _whole(sample)
                    sample, num_bytes = {}, 0
                sample = sample or {"__key__": key, "__from__": f"{path.name}:{printable(key)}"}
                sample["__at__"] = raw.tell() / size
                if not member.isreg() or member.issparse():
                    sample["__skip__"] = "tar member is not a plain file"
                elif extension in sample:
                    sample["__skip__"] = "tar member stands there twice"
                elif extension.lstrip("0123456789.") in extensions:  # 3.image.jpeg of interleaved documents
                    num_bytes += tarfile.BLOCKSIZE + member.size
                    if num_bytes > limit + tarfile.BLOCKSIZE:
                        sample["__skip__"] = TOO_LONG
                    if "__skip__" not in sample:
                        sample[extension] = tar.content(member)
            tar.check_end()
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError, OverflowError, RecursionError) as error:
        where = f"after {printable(sample['__key__'])}" if sample else "at its beginning"
        raise UserError(f"{path}: not readable as a tar {where}: {_one_line(error)}") from error
    if sample:
        yield _whole(sample)


class _Tar:
    """What `tarfile` does, within bounds: its memory stays small and it does not run in circles."""

    def __init__(self, raw: IO[bytes]) -> None:
        is_packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        self.file = _Bounded(gzip.GzipFile(fileobj=raw) if is_packed else raw)
        self.tar = tarfile.open(fileobj=cast(IO[bytes], self.file), mode="r:")  # noqa: SIM115  (`raw` is its caller's)

    def members(self) -> Iterator[tarfile.TarInfo]:
        """All but folders."""
        while True:
            self.file.left = MAX_HEADER_BYTES
            member = self.tar.next()
            if member is None:
                return
            if self.tar.offset <= member.offset:  # and the next member would be this one again
                raise tarfile.ReadError(f"{printable(member.name)} has a negative size")
            vars(self.tar).update(members=[], pax_headers={})  # it would keep them all
            if not member.isdir():
                yield member

    def content(self, member: tarfile.TarInfo) -> bytes:
        """The whole of a plain file."""
        self.file.seek(member.offset_data)
        self.file.left = member.size
        content = self.file.read(member.size)
        if len(content) < member.size:
            raise EOFError(f"member {printable(member.name)} is cut off")
        return content

    def check_end(self) -> None:
        """Read on behind the last member, to the end, where gzip has its checksum.

        Raises:
            ReadError: what stands there is not two blocks of zeros, or not zeros alone.
        """
        self.file.left = tarfile.BLOCKSIZE
        if self.file.last + self.file.read(tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
            raise tarfile.ReadError("the tar breaks off; get it again")
        while content := self.file.file.read(_BLOCK):
            if content.strip(b"\0"):
                raise tarfile.ReadError("the tar goes on behind its end, as two in one file would")


class _Bounded:
    """A file that gives no more than `left` bytes: the headers of a tar may ask for any number of them."""

    def __init__(self, file: Any) -> None:
        self.file, self.left = file, MAX_HEADER_BYTES
        self.last = b""
        """What was read last."""
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.left:
            raise tarfile.ReadError(f"a header asks for {size:,} bytes")
        self.left -= size
        self.last = self.file.read(size)
        return self.last


def _split_name(name: str) -> tuple[str, str]:
    """`a/000.image.jpg` -> (`a/000`, `image.jpg`), as webdataset does."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _whole(sample: Row) -> Row | SkipSample:
    if "__skip__" in sample:
        return SkipSample(sample["__skip__"], detail=sample["__from__"])
    return sample


def _one_line(error: object) -> str:
    return printable(" ".join(str(error).split())[:200])
