"""JSON: a small file whole, lines one at a time, a list or an object of any size value by value."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sft.core.errors import UserError, printable
from sft.core.sample import SkipSample
from sft.data.formats.content import NOT_UTF8, Content, opened
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
        return json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error


def read_jsonl(path: Path) -> Iterator[Row | SkipSample]:
    """Yield the objects of a JSON-lines file. A line that is none, or is too long, is a reason to skip it."""
    limit, number = max_record_bytes.get(), 0
    with opened(path, "a JSON-lines file") as content:
        while line := content.file.readline(limit + 1):
            number += 1
            here = f"{path.name}:{number}"
            if len(line) > limit:
                while line and not line.endswith(b"\n"):
                    line = content.file.readline(BLOCK_BYTES)
                yield SkipSample(TOO_LONG, where=here)
            elif line.strip():
                yield _parsed(line, here, content.share_read)


def _parsed(line: bytes, here: str, at: float) -> Row | SkipSample:
    try:
        row = json.loads(line.decode().removeprefix(BYTE_ORDER_MARK))
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode()) + 1
        found = f"column {column}: byte 0x{line[error.start]:02x} {NOT_UTF8}"
        return SkipSample("line is not UTF-8", detail=found, where=here)
    except json.JSONDecodeError as error:
        return SkipSample("line is not JSON", detail=f"column {error.pos + 1}: {_problem(error)}", where=here)
    except ValueError as error:  # digits beyond what Python converts
        return SkipSample("line is not JSON", detail=one_line(error), where=here)
    except RecursionError:
        return SkipSample(TOO_DEEP, where=here)
    if not isinstance(row, dict):
        return SkipSample("line is not a JSON object", where=here)
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _is_deep(row):
        return SkipSample(TOO_DEEP, where=here)
    return placed(row, here, at)


def _problem(error: json.JSONDecodeError) -> str:
    """Return what is wrong, with what stands there."""
    near, before = error.doc[error.pos : error.pos + 20].rstrip(), error.doc[max(error.pos - 20, 0) : error.pos]
    if near[:1] in ("]", "}") and before.rstrip().endswith(","):
        return f"a comma before {near[0]!r}"
    return f"{error.msg.removesuffix(' at')} at {near!r}" if near else CUT_OFF


def read_json_list(path: Path, prefix: str = "item") -> Iterator[Row | SkipSample]:
    """Yield the objects of a JSON list of any size, streamed. `prefix` says where the list is: `item` for a list at the
    top, `annotations.item` for one under a key.

    Raises:
        UserError: missing, a record over the limit, or it stops being JSON somewhere.
    """
    number = 0
    with _opened(path, "a JSON list") as text, text.errors(lambda: f"record {number}"):
        for number, row in enumerate(text.walk(prefix.split(".")[:-1], text.elements), start=1):
            yield _record(row, f"{path.name}:{number}", text.share_read)
    if not number:
        raise UserError(f"{path}: no JSON list of records at {prefix!r}")


def read_json_object(path: Path) -> Iterator[Row | SkipSample]:
    """Yield the records of a list below one of LISTS, else the object itself as a record, and objects behind it.

    Raises:
        UserError: as `read_json_list`; or records stand in two places.
    """
    number = 0
    with _opened(path, "a JSON object") as text, text.errors(lambda: f"record {number}"):
        while text.peek() == "{":
            for row in text.records():
                number += 1
                yield _record(row, f"{path.name}:{number}", text.share_read)
        text.check_end()


def _record(value: Any, here: str, at: float) -> Row | SkipSample:
    if isinstance(value, dict):
        return placed(value, here, at)
    return SkipSample(value.reason if isinstance(value, SkipSample) else "record is not a JSON object", where=here)


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


@contextmanager
def _opened(path: Path, what: str) -> Iterator[_JsonText]:
    with opened(path, what) as content:
        yield _JsonText(content, path)


class _JsonText:
    """A JSON text of any size, of which one value at a time is in memory."""

    def __init__(self, content: Content, path: Path) -> None:
        self.content, self.path = content, path
        self.limit = max_record_bytes.get()
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at = "", 0
        self.line = self.column = 0  # of the beginning of `text`
        self.num_read = 0  # bytes, unpacked

    @property
    def share_read(self) -> float:
        return self.content.share_read

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
        self.check_end()

    def check_end(self) -> None:
        """Raise ValueError unless nothing stands here."""
        if rest := self.peek():
            raise self._wrong(f"it goes on behind its end with {rest!r}")

    def records(self) -> Iterator[Any]:
        """Yield the objects of a list below one of LISTS, or else the object that stands here."""
        own: dict[str, Any] = {}
        found, start = "", self.num_read
        for key in self._keys():
            if not found and self.num_read - start > 2 * self.limit + BLOCK_BYTES:
                raise self._too_long()
            is_list = key in LISTS and self._is_list_of_objects()
            if (found and (is_list or key in CONVERSATIONS)) or (is_list and own.keys() & set(CONVERSATIONS)):
                raise UserError(
                    f"{self.path}: records stand below {found or 'messages'!r} and at {key!r}; expected one"
                )
            if is_list:
                found = key
                yield from self.elements()
            else:
                own[key] = self.value()
                own = {} if found else own
        if own and own.keys() <= set(LISTS) and not any(own.values()):
            raise self._wrong("there are no records")
        if not found:
            yield next((value for value in own.values() if isinstance(value, SkipSample)), own)

    def _is_list_of_objects(self) -> bool:
        self.peek()
        while _OPENED_LIST.fullmatch(self.text, self.at) and self._reads_on():
            pass
        return bool(_LIST_OF_OBJECTS.match(self.text, self.at))

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
            raise self._wrong(f"expected a key, found {found!r}" if found else CUT_OFF)
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
            raise self._wrong(f"expected {' or '.join(expected)}, found {found!r}" if found else CUT_OFF)
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
                problem, is_whole = None, end < len(self.text) - _SURROUNDINGS  # else a number may go on
            except json.JSONDecodeError as error:
                problem, is_whole = error, False
                if error.pos < len(self.text) - _SURROUNDINGS and not error.msg.startswith("Unterminated string"):
                    break
            except RecursionError:
                problem, is_whole, value, end = None, True, SkipSample(TOO_DEEP), self._end_of_brackets()
            if is_whole or not self._reads_on():
                break
        if problem:
            raise self._wrong(_problem(problem), problem.pos)
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
                raise self._wrong(CUT_OFF)

    def _reads_on(self) -> bool:
        """Read more of the text; at its end there is none."""
        left = self.text[self.at :]
        if len(left) > self.limit + _SURROUNDINGS:
            raise self._too_long()
        # Twice as much each time, so that a long record is quick.
        block = self.content.file.read(max(BLOCK_BYTES, len(left)))
        try:
            more = self.decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            self.text += error.object[: error.start].decode(errors="replace")
            byte = error.object[error.start]
            raise self._wrong(f"byte 0x{byte:02x} {NOT_UTF8}; save it as UTF-8", len(self.text)) from error
        self.num_read += len(block)
        if block:
            self.line, self.column = self._location(self.at)
            self.text, self.at = left + more, 0
        return bool(block)

    def _location(self, at: int) -> tuple[int, int]:
        num_lines = self.text.count("\n", 0, at)
        column = at - self.text.rfind("\n", 0, at) - 1 if num_lines else self.column + at
        return self.line + num_lines, column

    def _wrong(self, problem: str, at: int | None = None) -> ValueError:
        """Return the error for what stands here, or at another place of the text."""
        line, column = self._location(self.at if at is None else at)
        return ValueError(f"line {line + 1}, column {column + 1}: {problem}")

    def _too_long(self) -> UserError:
        return UserError(
            f"{self.path}: a record of over {self.limit:,} bytes (data.max_record_bytes); "
            "a JSON list cannot be read on behind it"
        )


CUT_OFF = "it is cut off"
BYTE_ORDER_MARK = "\ufeff"
LISTS = ("data", "annotations", "records", "samples", "examples", "instances", "items", "rows", "entries", "questions")
"""Keys below which an object may hold its records as a list."""
CONVERSATIONS = ("messages", "conversations")
"""Keys by which an object is a record itself."""
_LIST_OF_OBJECTS, _OPENED_LIST = re.compile(r"\[[ \t\r\n]*\{"), re.compile(r"\[?[ \t\r\n]*")
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
