"""JSON: a small file whole, lines one at a time, a list or an object of any size value by value."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sft.core.errors import UserError, printable
from sft.core.sample import SkipSample
from sft.data.formats.rows import (
    BLOCK_BYTES,
    MAX_DEPTH,
    MAX_RECORD_BYTES,
    TOO_DEEP,
    TOO_LONG,
    Row,
    max_record_bytes,
    one_line,
    placed,
    require_file,
)


def read_json(path: Path) -> Any:
    """Return a whole JSON file; for files of megabytes.

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
    """Yield the objects of a JSON-lines file. A line that is none, or is too long, is a reason to skip it."""
    limit, size = max_record_bytes.get(), require_file(path, "a JSON-lines file").stat().st_size
    at = number = 0
    with path.open("rb", buffering=BLOCK_BYTES) as file:
        while line := file.readline(limit + 1):
            number += 1
            at += len(line)
            here = f"{path.name}:{number}"
            if len(line) > limit:
                while line and not line.endswith(b"\n"):
                    line = file.readline(BLOCK_BYTES)
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
    return placed(row, here, at)


def read_json_list(path: Path, prefix: str = "item") -> Iterator[Row | SkipSample]:
    """Yield the objects of a JSON list of any size, streamed. `prefix` says where the list is: `item` for a list at the
    top, `annotations.item` for one under a key.

    Raises:
        UserError: missing, a record over the limit, or it stops being JSON somewhere.
    """
    number = 0
    with _opened(path, "a JSON list") as text, text.errors(lambda: f"record {number}"):
        for number, row in enumerate(text.walk(prefix.split(".")[:-1], text.elements), start=1):
            here = f"{path.name}:{number}"
            if isinstance(row, dict):
                yield placed(row, here, text.share_read)
            else:
                reason = row.reason if isinstance(row, SkipSample) else "record is not a JSON object"
                yield SkipSample(reason, detail=here)
    if not number:
        raise UserError(f"{path}: no JSON list of records at {prefix!r}")


def read_json_items(path: Path, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of a JSON object of any size, streamed: the object at `prefix`, "" for the top. A value
    that is nested too deep is a SkipSample.

    Raises:
        UserError: missing, a value over the limit, or it stops being JSON somewhere.
    """
    key = None
    with _opened(path, "a JSON object") as text, text.errors(lambda: f"key {one_line(key)!r}" if key else "no key"):
        for key, value in text.walk(prefix.split(".") if prefix else [], text.items):
            if isinstance(value, dict):
                placed(value, f"{path.name}:{printable(key)}", text.share_read)
            yield key, value
    if key is None:
        raise UserError(f"{path}: no JSON object at {prefix!r}" if prefix else f"{path}: not a JSON object, or empty")


def first_json_byte(path: Path) -> str:
    """Return `[` or `{`, to tell a list from an object; "" for a file of blanks."""
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
            raise UserError(f"{self.path}: not readable as JSON after {last()}: {one_line(error)}") from error

    def walk(self, keys: list[str], read: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """Yield what `read` reads below the keys, and on to the end of the text."""
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
        """Yield the elements of the list that stands here; none where something else does."""
        if self.peek() != "[":
            self.value()
        elif self._opens("[", "]"):
            yield self.value()
            while self._takes(",", "]") == ",":
                yield self.value()

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yield the members of the object that stands here; none where something else does."""
        if self.peek() != "{":
            self.value()
        else:
            for key in self._keys():
                yield key, self.value()

    def _keys(self) -> Iterator[str]:
        """Yield the keys of an object; whoever asks for the next one has read the value."""
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
        """Return the next character that is no blank, "" at the end."""
        while True:
            self.at = _BLANKS.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._reads_on():
                return ""

    def value(self) -> Any:
        """Return the value that stands here, or a SkipSample where it is nested too deep."""
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
        """Return where the list or object that stands here ends, by its brackets alone."""
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
        block = self.file.read(max(BLOCK_BYTES, len(left)))  # twice as much each time, so that a long record is quick
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
