"""JSON: a small file whole, lines one at a time, a list or an object of any size value by value."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from sft.core.errors import UserError, printable
from sft.core.sample import SkipSample
from sft.data.formats.content import NOT_UTF8, Content, opened
from sft.data.formats.rows import BLOCK_BYTES, MAX_RECORD_BYTES, TOO_LONG, Row, max_record_bytes, one_line, placed

TOO_DEEP = "record nested too deep"
MAX_DEPTH = 100
"""Of lists and objects in a JSON record: where Python's stack ends it can be neither counted nor sent to a process."""


def read_json(path: Path) -> Any:
    """Return a whole JSON file of up to MAX_RECORD_BYTES; raise UserError where it is missing, larger or not JSON."""
    with opened(path, "a JSON file") as content:
        text = content.file.read(MAX_RECORD_BYTES + 1)
    if len(text) > MAX_RECORD_BYTES:
        raise UserError(f"{path}: larger than {MAX_RECORD_BYTES:,} bytes; expected a small JSON file")
    try:
        return json.loads(text.decode("utf-8-sig"))
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
        row = json.loads(line.decode().removeprefix("\ufeff"))
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


def read_json_list(path: Path) -> Iterator[Row | SkipSample]:
    """Yield the objects of a JSON list of any size; raise UserError for none, one too long, and what is not JSON."""
    return _records(path, "a JSON list", _JsonText.elements)


def read_json_object(path: Path) -> Iterator[Row | SkipSample]:
    """Yield the records of a list below one of LISTS, else the object itself as a record, and objects behind it. Raise
    UserError as `read_json_list`, or where records stand in two places."""
    return _records(path, "a JSON object", _JsonText.records)


def _records(path: Path, what: str, values: Callable[[_JsonText], Iterator[Any]]) -> Iterator[Row | SkipSample]:
    number = 0
    with _opened(path, what, lambda: f"record {number}") as text:
        for number, value in enumerate(values(text), start=1):
            here = f"{path.name}:{number}"
            if isinstance(value, dict):
                yield placed(value, here, text.content.share_read)
            else:
                reason = value.reason if isinstance(value, SkipSample) else "record is not a JSON object"
                yield SkipSample(reason, where=here)
        text.check_end()
    if not number:
        raise UserError(f"{path}: no JSON list of records")


def read_json_items(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of the JSON object below a key of the one at the top, of any size, streamed. A value
    that is nested too deep is a SkipSample. Raise UserError as `read_json_list`."""
    key = None
    with _opened(path, "a JSON object", lambda: f"key {one_line(key)!r}" if key else "no key") as text:
        for key, value in text.items_below(name):
            if isinstance(value, dict):
                placed(value, f"{path.name}:{printable(key)}", text.content.share_read)
            yield key, value
        text.check_end()
    if key is None:
        raise UserError(f"{path}: no JSON object at {name!r}")


@contextmanager
def _opened(path: Path, what: str, last: Callable[[], str]) -> Iterator[_JsonText]:
    """Open a JSON text, and tell after what it stops being JSON."""
    with opened(path, what) as content:
        try:
            yield _JsonText(content, path)
        except ValueError as error:
            raise UserError(f"{path}: not readable as JSON after {last()}: {one_line(error)}") from error


class _JsonText:
    """A JSON text of any size, of which one value at a time is in memory."""

    def __init__(self, content: Content, path: Path) -> None:
        self.content, self.path = content, path
        self.limit = max_record_bytes.get()
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at = "", 0
        self.line = self.column = 0  # of the beginning of `text`
        self.num_read = 0  # bytes, unpacked

    def check_end(self) -> None:
        """Raise ValueError unless nothing stands here."""
        if rest := self.peek():
            raise self._wrong(f"it goes on behind its end with {rest!r}")

    def records(self) -> Iterator[Any]:
        """Yield the records of the objects that stand here, one after another."""
        while self.peek() == "{":
            yield from self._records_of_object()

    def _records_of_object(self) -> Iterator[Any]:
        """Yield the objects of a list below one of LISTS, or else the object that stands here."""
        own: dict[str, Any] = {}
        found, start = "", self.num_read
        for key in self._keys():
            if not found and self.num_read - start > 2 * self.limit + BLOCK_BYTES:
                raise self._too_long()
            is_list = key in LISTS and self._is_list_of_objects()
            if (found and (is_list or key in CONVERSATIONS)) or (is_list and own.keys() & set(CONVERSATIONS)):
                first = found or "messages"
                raise UserError(f"{self.path}: records stand below {first!r} and at {key!r}; expected one")
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

    def elements(self) -> Iterator[Any]:
        """Yield the elements of the list that stands here; none where something else does."""
        return self._members("[", "]", self.value)

    def items_below(self, name: str) -> Iterator[tuple[str, Any]]:
        """Yield the members of the object below a key of the one that stands here."""
        for above in self._keys():
            if above == name:
                yield from ((key, self.value()) for key in self._keys())
            else:
                self.value()

    def _keys(self) -> Iterator[str]:
        """Yield the keys of an object, none where something else stands; between two of them the value is read."""
        return self._members("{", "}", self._key)

    def _members(self, start: str, end: str, read: Callable[[], Any]) -> Iterator[Any]:
        if self.peek() != start:
            self.value()
            return
        self.at += 1
        if self.peek() == end:
            self.at += 1
            return
        yield read()
        while self._takes(",", end) == ",":
            yield read()

    def _key(self) -> str:
        if (found := self.peek()) != '"':
            raise self._wrong(f"expected a key, found {found!r}" if found else CUT_OFF)
        key: str = self.value()
        self._takes(":")
        return key

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
        found = f"a record of over {self.limit:,} bytes (data.max_record_bytes)"
        return UserError(f"{self.path}: {found}; a JSON list cannot be read on behind it")


CUT_OFF = "it is cut off"
LISTS = ("data", "annotations", "records", "samples", "examples", "instances", "items", "rows", "entries", "questions")
"""Keys below which an object may hold its records as a list."""
CONVERSATIONS = ("messages", "conversations")  # keys by which an object is a record itself
_LIST_OF_OBJECTS, _OPENED_LIST = re.compile(r"\[[ \t\r\n]*\{"), re.compile(r"\[?[ \t\r\n]*")
_DECODER = json.JSONDecoder()
_BRACKET_OR_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
_BLANKS = re.compile(r"[ \t\r\n]*")
_SURROUNDINGS = 64  # what stands closer to the end of a text may mean something else when more follows


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        inside = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, list | dict))
        level = [*chain.from_iterable(inside)]
        if not level:
            return False
    return True
