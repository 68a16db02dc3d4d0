"""The readers of raw files: what is a row, what is a reason to skip one, what is refused, and in how much memory."""

import base64
import datetime
import gzip
import io
import json
import os
import tarfile
import tracemalloc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sft.core.errors import UserError
from sft.core.sample import SkipSample
from sft.data import formats
from sft.data.formats import (
    find_files,
    json_text,
    read_json,
    read_json_items,
    read_jsonl,
    read_parquet,
    record_limit,
)
from sft.data.formats import parquet as parquet_reader
from sft.data.formats import tar as tar_reader
from sft.data.formats.base64_object import index_base64_object
from sft.data.formats.json_text import TOO_DEEP, read_json_list, read_json_object
from sft.data.formats.rows import TOO_LONG
from sft.data.formats.tar import read_tar

MEGABYTE = 1024 * 1024


def outcomes(rows: Iterable[Any]) -> list[Any]:
    """Rows without what the reader adds, and the reasons to skip the others."""
    return [
        row.reason if isinstance(row, SkipSample) else {k: v for k, v in row.items() if not k.startswith("__")}
        for row in rows
    ]


def places(rows: Iterable[Any]) -> list[str]:
    """Where each row or skip was read from."""
    return [row.where if isinstance(row, SkipSample) else row["__from__"] for row in rows]


@pytest.fixture
def written(tmp_path):
    """Writes a file and returns its path."""

    def write(content: bytes | str, name: str = "x") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    """A file to be written over and over; hypothesis cannot have a new folder for each example."""
    return tmp_path_factory.mktemp("scratch") / "x"


def refusal_of(rows: Iterable[Any]) -> str:
    """The one line by which a file is refused."""
    with pytest.raises(UserError) as caught:
        list(rows)
    message = str(caught.value)
    assert message.isprintable(), message
    return message


@contextmanager
def memory_below(num_bytes: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < num_bytes
    finally:
        tracemalloc.stop()


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def flipped(content: bytes, flips: list[tuple[int, int]]) -> bytes:
    """Some bytes changed."""
    changed = bytearray(content)
    for place, value in flips:
        changed[place % len(changed)] = value
    return bytes(changed)


flips = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4)


# --------------------------------------------------------------------------------------------------- JSON lines


def test_a_row_says_where_it_is_from_and_how_much_was_read(written):
    rows = list(read_jsonl(written('{"a": 1}\n{"a": 2}\n', "train.jsonl")))
    assert rows == [
        {"a": 1, "__from__": "train.jsonl:1", "__at__": 0.5},
        {"a": 2, "__from__": "train.jsonl:2", "__at__": 1.0},
    ]


def test_blank_lines_are_no_records_but_count_as_lines(written):
    rows = list(read_jsonl(written('\n{"a": 1}\r\n  \n\t\nno\n{"a": 2}')))
    assert outcomes(rows) == [{"a": 1}, "line is not JSON", {"a": 2}]
    assert places(rows) == ["x:2", "x:5", "x:6"]


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_the_last_line_needs_no_newline(written, end):
    assert outcomes(read_jsonl(written('{"a": 1}\n{"a": 2}' + end))) == [{"a": 1}, {"a": 2}]


def test_an_empty_file_has_no_lines(written):
    assert outcomes(read_jsonl(written(""))) == []


def test_a_line_at_the_limit_is_read_and_one_over_it_is_not(written):
    path = written('{"a": 1}\n{"a": 22}\n{"a": 3}\n')
    with record_limit(9):  # the newline counts
        rows = list(read_jsonl(path))
    assert outcomes(rows) == [{"a": 1}, TOO_LONG, {"a": 3}]
    assert places(rows) == ["x:1", "x:2", "x:3"]


def test_a_huge_line_is_skipped_in_little_memory(tmp_path):
    path = tmp_path / "x"
    with path.open("wb") as file:
        file.write(b'{"a": 1}\n{"a": "')
        for _ in range(50):
            file.write(b"x" * MEGABYTE)
        file.write(b'"}\n{"a": 2}\n')
    with record_limit(1000), memory_below(5 * MEGABYTE):
        assert outcomes(read_jsonl(path)) == [{"a": 1}, TOO_LONG, {"a": 2}]


def test_a_huge_line_without_an_end_is_one_skip(written):
    with record_limit(1000):
        assert outcomes(read_jsonl(written("x" * 3 * MEGABYTE))) == [TOO_LONG]


@pytest.mark.parametrize(
    ("line", "outcome"),
    [
        (b'{"a": 1', "line is not JSON"),
        (b"{'a': 1}", "line is not JSON"),
        (b'{"a": 1} {"a": 2}', "line is not JSON"),
        (b"\0\0\0\0", "line is not JSON"),
        (b'{"a": 1}\0', "line is not JSON"),
        (b'{"a": "\0"}', "line is not JSON"),
        (b'{"a": "\\u0000"}', {"a": "\0"}),
        (b'{"a": "\xff"}', "line is not UTF-8"),
        (b'{"a": "\\ud83d"}', {"a": "\ud83d"}),  # refused where it is written as text
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        (b'{"a": 1, "a": 2}', {"a": 2}),
        (b'{"a": 1e999}', {"a": float("inf")}),
        (b'{"a": ' + b"1" * 5000 + b"}", "line is not JSON"),  # digits beyond what Python converts
        (b"[1]", "line is not a JSON object"),
        (b"null", "line is not a JSON object"),
        (b'"a"', "line is not a JSON object"),
        (b'{"__from__": [], "__at__": {}}', {}),
    ],
    ids=str,
)
def test_a_line_has_one_outcome(written, line, outcome):
    assert outcomes(read_jsonl(written(line + b'\n{"b": 1}'))) == [outcome, {"b": 1}]


def test_nan_is_read_as_python_reads_it(written):
    (row,) = read_jsonl(written('{"a": NaN}'))
    assert row["a"] != row["a"]


@pytest.mark.parametrize("depth", [100, 500, 5_000, 300_000])
def test_a_record_nested_deep_is_skipped_whatever_the_stack_can_hold(written, depth):
    record = f'{{"a": {nested(depth)}}}'
    assert outcomes(read_jsonl(written(f'{record}\n{{"b": 1}}'))) == [TOO_DEEP, {"b": 1}]
    assert outcomes(read_json_list(written(f'[{record}, {{"b": 1}}]'))) == [TOO_DEEP, {"b": 1}]


def test_what_is_long_is_not_deep(written):
    record = json.dumps({"a": [[]] * 1000, "b": "[" * 1000})
    assert outcomes(read_jsonl(written(record))) == outcomes(read_json_list(written(f"[{record}]")))
    assert outcomes(read_jsonl(written(f'{{"a": {nested(99)}}}'))) != [TOO_DEEP]


def test_a_missing_file_is_named(tmp_path):
    for read in (read_jsonl, read_json_list, read_parquet, read_json, lambda path: read_tar(path, ["txt"])):
        with pytest.raises(UserError, match=r"nowhere: file not found; expected a"):
            list(read(tmp_path / "nowhere"))


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "file not found" in refusal_of(read_jsonl(tmp_path / "pipe"))


JSON_LINES = b'{"a": 1, "b": ["x", null]}\n{"a": "\xc3\xa9"}\n'


@given(flips)
def test_flipped_bytes_in_json_lines_make_rows_and_skips(scratch, changes):
    scratch.write_bytes(flipped(JSON_LINES, changes))
    assert all(isinstance(row, dict | SkipSample) for row in read_jsonl(scratch))


# ---------------------------------------------------------------------------------------------------- JSON lists


def test_a_list_is_read_at_the_top(written):
    rows = list(read_json_list(written('[{"a": 1}, {"a": 2}]', "x.json")))
    assert outcomes(rows) == [{"a": 1}, {"a": 2}] and places(rows) == ["x.json:1", "x.json:2"]
    assert rows[1]["__at__"] == 1.0


def test_records_that_are_no_objects_are_skipped(written):
    path = written('[1, {"a": 1}, null, [], "text", -2.5e3]')
    assert outcomes(read_json_list(path)) == [
        *("record is not a JSON object", {"a": 1}),
        *["record is not a JSON object"] * 4,
    ]


@pytest.mark.parametrize("content", ["[]", '{"a": 1}', "7"])
def test_no_list_where_one_should_be_is_refused(written, content):
    assert refusal_of(read_json_list(written(content))).endswith("x: no JSON list of records")


@pytest.mark.parametrize(
    ("content", "last", "problem"),
    [
        ("", 0, "line 1, column 1: it is cut off"),
        ('[{"a": 1},\n {"b": ', 1, "line 2, column 8: it is cut off"),
        ('[{"a": 1}, {"b": "te', 1, "line 1, column 18: Unterminated string"),
        ('[{"a": 1}', 1, "line 1, column 10: it is cut off"),
        ('[{"a": 1},', 1, "line 1, column 11: it is cut off"),
        ('[{"a": 1}] [', 1, "line 1, column 12: it goes on behind its end"),
        ('[{"a": 1} {"a": 2}]', 1, "line 1, column 11: expected , or ], found '{'"),
        ('[{"a": 1},\n]', 1, "line 2, column 1: a comma before ']'"),
        ('[{"a": 1,}]', 0, "line 1, column 10: a comma before '}'"),
        ('[{"a": 1}, \x1b[31m]', 1, r"line 1, column 12: Expecting value at '\x1b[31m]'"),
        ('[{"a": "\0"}]', 0, "line 1, column 9: Invalid control character"),
        ("<html>", 0, "line 1, column 1: Expecting value at '<html>'"),
    ],
)
def test_where_a_list_stops_being_json_the_last_record_is_named(written, content, last, problem):
    message = refusal_of(read_json_list(written(content)))
    assert f"x: not readable as JSON after record {last}: {problem}" in message


def test_a_list_cut_off_behind_its_records_is_refused_too(written):
    rows = read_json_object(written('{"data": [{"a": 1}], "mo'))
    assert outcomes([next(rows)]) == [{"a": 1}]
    assert "not readable as JSON after record 1" in refusal_of(rows)


def test_text_that_is_not_utf8_is_refused_and_a_byte_order_mark_is_not(written):
    assert "not readable as JSON after record 0" in refusal_of(read_json_list(written(b'[{"a": "\xff"}]')))
    assert outcomes(read_json_list(written(b'\xef\xbb\xbf[{"a": "\xc3\xa9"}]'))) == [{"a": "é"}]


def test_a_record_over_the_limit_ends_a_list_since_its_end_is_not_known(written):
    path = written(json.dumps([{"a": 1}, {"a": "x" * 100}, {"a": 2}]))
    with record_limit(109):
        assert len(list(read_json_list(path))) == 3
    with record_limit(108):
        rows = read_json_list(path)
        assert outcomes([next(rows)]) == [{"a": 1}]
        assert "a record of over 108 bytes (data.max_record_bytes)" in refusal_of(rows)


def test_a_huge_record_is_refused_in_little_memory(written):
    path = written(b'[{"a": "' + b"x" * 30 * MEGABYTE)
    with record_limit(MEGABYTE), memory_below(12 * MEGABYTE):
        assert "a record of over" in refusal_of(read_json_list(path))


def test_brackets_without_end_are_refused_in_little_memory(written):
    path = written(b'[{"key": ' * 30_000)
    with memory_below(20 * MEGABYTE):
        assert "it is cut off" in refusal_of(read_json_list(path))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text('ab"\\[é', max_size=3), children, max_size=3)
    ),
    max_leaves=8,
)


@given(st.lists(json_values, min_size=1), st.booleans(), st.sampled_from([None, 1]), st.integers(1, 40))
def test_a_list_reads_as_json_does_wherever_a_block_ends(scratch, values, ensure_ascii, indent, block):
    scratch.write_text(json.dumps(values, ensure_ascii=ensure_ascii, indent=indent), "utf-8", "surrogatepass")
    expected = [value if isinstance(value, dict) else "record is not a JSON object" for value in values]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "BLOCK_BYTES", block)
        assert outcomes(read_json_list(scratch)) == expected


JSON_LIST = b'[{"a": 1, "b": ["x", null]}, {"a": "\xc3\xa9"}, {"c": {"d": -1.5e3}}]'


@given(flips)
def test_flipped_bytes_in_a_list_make_rows_and_skips_or_one_refusal(scratch, changes):
    scratch.write_bytes(flipped(JSON_LIST, changes))
    try:
        assert all(isinstance(row, dict | SkipSample) for row in read_json_list(scratch))
    except UserError as error:
        assert str(error).isprintable()


@given(st.integers(0, len(JSON_LIST) - 1))
def test_a_list_cut_anywhere_is_refused(scratch, length):
    scratch.write_bytes(JSON_LIST[:length])
    assert "not readable as JSON after record" in refusal_of(read_json_list(scratch))


# -------------------------------------------------------------------------------------------------- JSON objects


def test_members_of_an_object_are_read_in_order_those_given_twice_too(written):
    path = written('{"meta": 1, "data": {"a": {"x": 1}, "b": 2, "a": []}}', "x.json")
    items = list(read_json_items(path, "data"))
    assert items == [("a", {"x": 1, "__from__": "x.json:a", "__at__": 1.0}), ("b", 2), ("a", [])]


def test_a_key_is_printed_on_one_line(written):
    (item,) = read_json_items(written(r'{"data": {"a\n\u001b[31m": {}}}'), "data")
    assert item[0] == "a\n\x1b[31m" and item[1]["__from__"] == r"x:a\n\x1b[31m"


def test_no_object_and_a_broken_one_are_refused(written):
    for content in ("[]", "{}", "7", '{"a": 1}', '{"data": [1]}', '{"data": {}}'):
        assert "no JSON object at 'data'" in refusal_of(read_json_items(written(content), "data"))
    for content in ('{"a": 1, ', '{"a": 1, 7: 2}', '{"a": 1, "b" 2}', '{"a": 1'):
        problem = refusal_of(read_json_items(written(f'{{"data": {content}'), "data"))
        assert "not readable as JSON after key 'a'" in problem
    long = json.dumps({"data": {"k" * 9000: 1}})[:-1]
    assert len(refusal_of(read_json_items(written(long), "data"))) < 500


def test_a_member_nested_deep_has_no_value(written):
    (deep, sound) = read_json_items(written(f'{{"data": {{"a": {nested(200)}, "b": 1}}}}'), "data")
    assert isinstance(deep[1], SkipSample) and sound == ("b", 1)


# ---------------------------------------------------------------------------------------------- small JSON files


def test_a_small_file_is_refused_when_it_is_not_small_or_not_json(tmp_path, written):
    for content in ('{"a"', "\xff", nested(100_000)):
        assert "not readable as JSON" in refusal_of([read_json(written(content))] for _ in [0])
    with (tmp_path / "large").open("wb") as file:
        file.truncate(formats.MAX_RECORD_BYTES + 1)
    assert "expected a small JSON file" in refusal_of([read_json(tmp_path / "large")] for _ in [0])


def test_the_first_pattern_that_matches_is_taken(tmp_path):
    for name in ("b.tar", "a.tar", "a.parquet"):
        (tmp_path / name).touch()
    (tmp_path / "folder.tar").mkdir()
    assert [path.name for path in find_files(tmp_path, "*.zip", "*.tar", "*.parquet", what="")] == ["a.tar", "b.tar"]
    assert find_files(tmp_path / "a.tar", "*.zip", what="") == [tmp_path / "a.tar"]
    with pytest.raises(UserError, match=r"no \*.zip or \*.txt found; expected words"):
        find_files(tmp_path, "*.zip", "*.txt", what="words")


# ------------------------------------------------------------------------------------------------- base64 objects


def contents(path: Path) -> dict[str, bytes]:
    return {name: place.read() for name, place in index_base64_object(path).items()}


names = st.text(
    st.characters(codec="utf-8", exclude_characters='"\\', exclude_categories=["Cc"]), min_size=1, max_size=9
)


@given(st.dictionaries(names, st.tuples(st.binary(max_size=20), st.booleans())), st.sampled_from([None, 2]))
def test_the_index_finds_what_json_reads(scratch, members, indent):
    encoded = {name: base64.b64encode(content).decode() for name, (content, _) in members.items()}
    written = {name: [encoded[name]] if in_list else encoded[name] for name, (_, in_list) in members.items()}
    scratch.write_text(json.dumps(written, indent=indent, ensure_ascii=False), "utf-8")
    reference = json.loads(scratch.read_text("utf-8"))
    assert contents(scratch) == {
        name: (value[0] if isinstance(value, list) else value).encode() for name, value in reference.items()
    }


def test_members_that_are_no_base64_are_not_in_the_index(written):
    path = written(r'{"a": 1, "b": null, "c": "AA==", "d": "x\"y", "e\"f": "BB==", "g": "", "c": "CC=="}')
    assert contents(path) == {"c": b"CC==", "g": b""}


@pytest.mark.parametrize("content", ["", "{}", "[", "\0" * 100, '"' * 1000, '"a": "' + "x" * 1000])
def test_a_file_that_is_no_such_object_has_an_empty_index(written, content):
    assert index_base64_object(written(content)) == {}


# ------------------------------------------------------------------------------------------------------- parquet


@pytest.fixture
def parquet(tmp_path):
    """Writes columns as a parquet file."""

    def write(columns: dict[str, Any], **options: Any) -> Path:
        pq.write_table(pa.table(columns), tmp_path / "x.parquet", **options)
        return tmp_path / "x.parquet"

    return write


def test_rows_of_a_parquet_file_are_numbered_through_its_row_groups(parquet):
    rows = list(read_parquet(parquet({"a": [1, 2, 3], "b": [[1], None, []]}, row_group_size=2)))
    assert outcomes(rows) == [{"a": 1, "b": [1]}, {"a": 2, "b": None}, {"a": 3, "b": []}]
    assert places(rows) == ["x.parquet:1", "x.parquet:2", "x.parquet:3"]
    assert [row["__at__"] for row in rows] == [2 / 3, 2 / 3, 1.0], "by batches"


def test_nested_columns_are_lists_and_dicts(parquet):
    image = {"bytes": b"\xff\xd8", "path": None}
    row = {"images": [image], "turns": [{"role": "user", "parts": ["Hi."]}]}
    assert outcomes(read_parquet(parquet({name: [value] for name, value in row.items()}))) == [row]


def test_a_parquet_row_over_the_limit_is_skipped(parquet):
    path = parquet({"a": [b"x", b"x" * 2000, b"y"]})
    with record_limit(1000):
        assert outcomes(read_parquet(path)) == [{"a": b"x"}, TOO_LONG, {"a": b"y"}]


def test_the_limit_of_a_parquet_row_is_for_its_text_and_for_each_image(parquet):
    def row(*sizes: int) -> list[dict[str, Any]]:
        return [{"bytes": bytes(size), "path": None} for size in sizes]

    images = [row(900, 900, 900), row(1100), row(10), row(900, 900, 900, 900, 900)]
    rows = read_parquet(parquet({"images": images, "text": ["a", "b", "c" * 1100, "d"]}))
    with formats.record_limit(1000):
        assert outcomes(rows) == [{"images": images[0], "text": "a"}, *[TOO_LONG] * 3]


@pytest.mark.skipif(not hasattr(pa, "proxy_memory_pool"), reason="asks Arrow for the peak of its memory")
@pytest.mark.parametrize("use_dictionary", [True, False])
def test_few_large_rows_are_unpacked_at_a_time(parquet, monkeypatch, use_dictionary):
    """64 MB in all, where only one of the equal values is written if there is a dictionary."""
    monkeypatch.setattr(parquet_reader, "BATCH_BYTES", 4_000_000)
    path = parquet({"a": [bytes(1_000_000)] * 64, "b": range(64)}, use_dictionary=use_dictionary, write_batch_size=1)
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    default = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        assert len(list(outcome["b"] for outcome in outcomes(read_parquet(path)))) == 64
    finally:
        pa.set_memory_pool(default)
    assert pool.max_memory() < 20_000_000


def test_a_row_group_that_unpacks_to_a_thousand_times_its_file_is_refused(parquet, monkeypatch):
    monkeypatch.setattr(parquet_reader, "MAX_UNPACKED_BYTES", 1_000_000)
    monkeypatch.setattr(parquet_reader, "MAX_UNPACKED_TIMES", 100)
    path = parquet({"a": [1], "b": [bytes(1_100_000)]}, compression="zstd")
    assert "x.parquet: a row group unpacks" in refusal_of(read_parquet(path))
    assert len(outcomes(read_parquet(parquet({"b": [np.random.default_rng(0).bytes(1_100_000)]})))) == 1


def test_names_that_are_ours_are_not_taken_from_data(parquet, written):
    theirs = {"__from__": "a", "__at__": "b", "__further__": "c", "__key__": "d", "__": "e", "_f": "g"}
    line = json.dumps(theirs)
    for rows in (
        read_parquet(parquet({name: [value] for name, value in theirs.items()})),
        read_jsonl(written(line, "x.jsonl")),
        read_json_list(written(f"[{line}]", "x.json")),
        (row for _, row in formats.read_json_items(written(f'{{"data": {{"n": {line}}}}}', "y.json"), "data")),
    ):
        (row,) = rows
        assert row.keys() == {"_f", "__from__", "__at__"}
        assert row["__from__"] != "a" and isinstance(row["__at__"], float)


def test_a_parquet_value_that_python_has_not_is_skipped(parquet):
    days = pa.array([0, 2_000_000_000], pa.int32()).cast(pa.date32())
    assert outcomes(read_parquet(parquet({"a": days}))) == [
        {"a": datetime.date(1970, 1, 1)},
        "row has a value that cannot be read",
    ]
    text = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xff"], pa.binary()).buffers())
    assert outcomes(read_parquet(parquet({"a": text}))) == [{"a": "a"}, "row has a value that cannot be read"]


def test_a_file_that_is_cut_off_or_not_parquet_is_refused(parquet, written):
    whole = parquet({"a": [1, 2]}).read_bytes()
    for content in (whole[:-1], whole[:20], b"", b"PAR1", b"<html>" * 100, whole[:-8] + b"\xff\xff\xff\x7fPAR1"):
        assert "not readable as parquet after row 0" in refusal_of(read_parquet(written(content)))


def parquet_bytes() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"a": [1, 2], "b": ["x", None], "c": [[1], []]}), buffer)
    return buffer.getvalue()


PARQUET = parquet_bytes()


@given(flips)
@example([(548, 19)])  # pyarrow's `RowGroupMetaData.column()` aborts: sizes of a histogram do not agree
@example([(343, 119)])
@example([(548, 19), (343, 119)])
def test_flipped_bytes_in_parquet_make_rows_and_skips_or_one_refusal(scratch, changes):
    scratch.write_bytes(flipped(PARQUET, changes))
    try:
        assert all(isinstance(row, dict | SkipSample) for row in read_parquet(scratch))
    except UserError as error:
        assert str(error).isprintable()


# ---------------------------------------------------------------------------------------------------------- tars

END = bytes(2 * tarfile.BLOCKSIZE)
EXTENSIONS = ("jpg", "txt", "image.jpeg")


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = size, kind, link
    return member.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape")


def plain(name: str, content: bytes = b"?", kind: bytes = tarfile.REGTYPE) -> bytes:
    """A member as it stands in a tar: its header, and its content in whole blocks."""
    return header(name, len(content), kind) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


GOOD = plain("a.jpg", b"J") + plain("a.txt", b"T")
A = {"jpg": b"J", "txt": b"T"}


def read(path: Path) -> Iterator[Any]:
    return read_tar(path, EXTENSIONS)


def test_members_that_share_a_name_are_one_sample_in_the_order_of_the_tar(written):
    tar = GOOD + plain("./d/b.1.c.jpg", b"1") + plain("e/a.TXT", b"2") + plain("a.txt", b"3") + END
    rows = list(read(written(tar, "0.tar")))
    assert outcomes(rows) == [A, {}, {"txt": b"2"}, {"txt": b"3"}], "1.c.jpg is no extension that is asked for"
    assert [row["__key__"] for row in rows] == ["a", "./d/b", "e/a", "a"]
    assert places(rows) == ["0.tar:a", "0.tar:./d/b", "0.tar:e/a", "0.tar:a"]
    shares = [row["__at__"] for row in rows]
    assert all(one < other for one, other in pairwise(shares)) and shares[-1] < 1


def test_numbers_may_stand_before_an_extension(written):
    tar = plain("a.0.txt", b"0") + plain("a.10.image.jpeg", b"10") + plain("a.2.image.jpeg", b"2") + END
    assert outcomes(read(written(tar))) == [{"0.txt": b"0", "10.image.jpeg": b"10", "2.image.jpeg": b"2"}]


def test_folders_are_no_members(written):
    assert outcomes(read(written(header("d/", kind=tarfile.DIRTYPE) + GOOD + END))) == [A]


def test_a_tar_of_nothing_has_no_rows(written):
    assert outcomes(read(written(END))) == []


def test_a_packed_tar_is_read_and_its_checksum_too(written):
    packed = gzip.compress(GOOD + END)
    assert outcomes(read(written(packed))) == [A]
    assert "CRC check failed" in refusal_of(read(written(packed[:-8] + bytes(4) + packed[-4:])))
    for length in (len(packed) - 1, len(packed) - 8, len(packed) // 2, 3):
        assert "not readable as a tar" in refusal_of(read(written(packed[:length])))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("cut", "after"),
    [
        (GOOD, "after a: the tar breaks off; get it again"),
        (GOOD + bytes(512), "after a: the tar breaks off; get it again"),
        (GOOD[:1024], "after a: the tar breaks off; get it again"),
        (GOOD[:1023], "after a: unexpected end of data"),
        (GOOD[:1200], "after a: the tar breaks off; get it again"),
        (GOOD[:512], "after a: member a.jpg is cut off"),
        (GOOD[:511], "at its beginning: truncated header"),
        (b"", "at its beginning: empty file"),
        (b"<html>" * 200, "at its beginning: invalid header"),
        (GOOD + b"?" * 512 + END, "after a: the tar breaks off; get it again"),
        (GOOD + END + GOOD + END, "after a: the tar goes on behind its end, as two in one file would"),
    ],
)
def test_a_tar_that_does_not_end_as_tars_do_is_refused(written, cut, after, packed):
    message = refusal_of(read(written(gzip.compress(cut) if packed else cut)))
    assert message.endswith(f"x: not readable as a tar {after}")


@given(st.integers(0, len(GOOD + END) - 1))
def test_a_tar_cut_anywhere_is_refused(scratch, length):
    scratch.write_bytes((GOOD + END)[:length])
    assert "not readable as a tar" in refusal_of(read(scratch))


@pytest.mark.parametrize(
    "kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"S", b"D", b"?"]
)
def test_members_that_are_no_plain_files_leave_their_sample_out(written, kind):
    tar = (
        plain("b.jpg", b"B") + header("b.txt", kind=kind, link="/etc/passwd") + GOOD + header("c.jpg", kind=kind) + END
    )
    not_plain = "tar member is not a plain file"
    assert outcomes(read(written(tar))) == [not_plain, A, not_plain]


def test_a_member_that_stands_there_twice_leaves_its_sample_out(written):
    tar = plain("b.jpg", b"1") + plain("b.jpg", b"2") + GOOD + END
    assert outcomes(read(written(tar))) == ["tar member stands there twice", A]


@pytest.mark.parametrize("name", ["/etc/evil.jpg", "../../evil.jpg", "a/../../evil.jpg", "C:\\evil.jpg"])
def test_a_name_that_leads_elsewhere_is_a_name_and_nothing_is_written(written, name):
    path = written(plain(name, b"J") + END)
    before = sorted(path.parent.parent.rglob("*"))
    (row,) = read(path)
    assert row["jpg"] == b"J" and row["__key__"] == name.removesuffix(".jpg")
    assert sorted(path.parent.parent.rglob("*")) == before and not Path("/etc/evil.jpg").exists()


@pytest.mark.parametrize("extension", ["pyd", "pkl", "pickle", "npy", "pth", "pt", "npz", "__key__x", "py"])
def test_members_of_other_kinds_are_not_even_read(written, monkeypatch, extension):
    def content(self, member):
        raise AssertionError(member.name)

    monkeypatch.setattr(tar_reader._Tar, "content", content)
    assert outcomes(read(written(plain(f"a.{extension}") + plain(f"a.{extension}") + END))) == [{}]


def test_a_name_that_no_terminal_should_see_is_printed_as_its_code(written):
    tar = plain("a\nb\x1b[31m.jpg") + plain("\udcff.jpg")
    assert places(read(written(tar + END))) == [r"x:a\nb\x1b[31m", r"x:\udcff"]
    assert r"after \udcff" in refusal_of(read(written(tar)))


def test_the_members_of_a_sample_are_one_record_for_the_limit(written):
    tar = plain("b.jpg", b"x" * 600) + plain("b.txt", b"x" * 600) + plain("c.jpg", b"x" * 1001) + GOOD + END
    with record_limit(1000):
        assert outcomes(read(written(tar))) == [TOO_LONG, TOO_LONG, A]


def test_empty_members_count_too(written):
    tar = b"".join(plain(f"a.{n}.jpg", b"") for n in range(5000)) + END
    with record_limit(MEGABYTE):
        assert outcomes(read(written(gzip.compress(tar, 1)))) == [TOO_LONG]


def test_a_member_of_10_gb_is_passed_over(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(header("b.jpg", 10 << 30))
    os.truncate(path, 512 + (10 << 30))  # a file with a hole
    with path.open("ab") as file:
        file.write(GOOD + END)
    with memory_below(2 * MEGABYTE):
        assert outcomes(read(path)) == [TOO_LONG, A]


def test_a_member_that_the_file_does_not_hold_is_cut_off(written):
    path = written(header("b.jpg", 10 << 30) + b"x" * 600)
    assert "after b: unexpected end of data" in refusal_of(read(path))
    assert "after b: member b.jpg is cut off" in refusal_of(read(written(header("b.jpg", 50 * MEGABYTE) + b"x" * 600)))


def test_a_packed_bomb_is_passed_over_in_little_memory(written):
    bomb = gzip.compress(header("b.jpg", 64 * MEGABYTE) + bytes(64 * MEGABYTE) + GOOD + END, 1)
    assert len(bomb) < MEGABYTE
    path = written(bomb)
    with record_limit(MEGABYTE), memory_below(2 * MEGABYTE):
        assert outcomes(read(path)) == [TOO_LONG, A]


def pax(**records: str) -> bytes:
    return tarfile.TarInfo._create_pax_generic_header(records, tarfile.XHDTYPE, "utf-8")


def test_long_names_are_read_in_both_ways_of_writing_them(written):
    name = "d/" * 100 + "b.jpg"
    long_name = plain("././@LongLink", name.encode() + b"\0", tarfile.GNUTYPE_LONGNAME)
    for before in (long_name, pax(path=name)):
        (row,) = read(written(before + plain("short", b"J") + END))
        assert row["__key__"] == name.removesuffix(".jpg") and row["jpg"] == b"J"


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_long_name_of_5_gb_is_refused_and_not_read(tmp_path, kind):
    path = tmp_path / "x"
    path.write_bytes(GOOD + header("name", 5 << 30, kind))
    os.truncate(path, 6 << 30)
    with memory_below(MEGABYTE):
        assert "after a: a header asks for 5,368,709,120 bytes" in refusal_of(read(path))


def test_long_names_of_long_names_without_end_are_refused(written):
    chain = plain("././@LongLink", b"n", tarfile.GNUTYPE_LONGNAME) * 3000
    assert "a header asks for" in refusal_of(read(written(chain + GOOD + END)))


@pytest.mark.parametrize("size", [-1, -511, -512, -1024, -(10**9)])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE, b"D"])
def test_a_negative_size_leads_to_an_end(written, size, kind):
    for name in ("b.jpg", "b.other"):
        try:
            rows = outcomes(read(written(GOOD + header(name, size, kind) + GOOD + END)))
        except UserError:
            continue
        assert len(rows) <= 3


@pytest.mark.parametrize("size", ["-512", "-1", "99999999999999999999", "no number"])
def test_a_size_in_an_attribute_is_no_better(written, size):
    try:
        assert len(list(read(written(GOOD + pax(size=size) + plain("b.jpg") + END)))) <= 2
    except UserError as error:
        assert str(error).isprintable()


def test_a_tar_keeps_nothing_of_the_members_that_were_read(written):
    members = b"".join(plain(f"{n}.txt", b"") for n in range(2000))
    tar = tarfile.TarInfo._create_pax_generic_header({"comment": "x" * 9000}, tarfile.XGLTYPE, "utf-8") + members + END
    path = written(tar)
    with memory_below(3 * MEGABYTE // 2):
        assert sum(1 for _ in read(path)) == 2000


TARS = [GOOD + END, gzip.compress(GOOD + END), pax(path="é" * 60 + ".jpg") + GOOD + END]


@given(st.sampled_from(TARS), flips, st.booleans())
def test_flipped_bytes_in_a_tar_make_rows_and_skips_or_one_refusal(scratch, content, changes, sum_fits):
    content = flipped(content, changes)
    if sum_fits:
        content = summed(content)
    scratch.write_bytes(content)
    try:
        assert all(isinstance(row, dict | SkipSample) for row in read(scratch))
    except UserError as error:
        assert str(error).isprintable()


def summed(content: bytes) -> bytes:
    """With the checksum of each header set right, so that what was flipped is believed."""
    blocks = [content[start : start + 512] for start in range(0, len(content), 512)]
    return b"".join(
        block[:148] + b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:])) + block[156:]
        if block[257:262] == b"ustar"
        else block
        for block in blocks
    )
