"""What a file holds is told by its bytes, whatever it is called and whichever adapter reads it."""

import csv
import gzip
import io
import json
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.adapters import adapter, said, samples
from helpers.stores import encoded

from sft.core.errors import UserError
from sft.core.sample import SkipSample
from sft.data.formats import read_records, record_limit
from sft.data.formats.csv_text import read_csv

ROWS = [{"a": 1, "b": ["x"]}, {"a": 2, "b": ["\u2028é"]}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
MARK = b"\xef\xbb\xbf"


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), file)
    return file.getvalue()


def arrow(opened: Callable = pa.ipc.new_stream) -> bytes:
    file, table = io.BytesIO(), pa.Table.from_pylist(ROWS)
    with opened(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as opened:
        opened.addfile(tarfile.TarInfo("0.json"))
    return file.getvalue()


def outcomes(path: Path) -> list:
    """Rows without what the reader adds, and the reasons to skip the others with what was found."""
    return [
        f"{row.where}: {row.reason}; {row.detail}"
        if isinstance(row, SkipSample)
        else {key: value for key, value in row.items() if not key.startswith("__")}
        for row in read_records(path)
    ]


FORMS = {
    "lines": LINES.encode(),
    "lines with marks": b"".join(MARK + line + b"\r\n" for line in LINES.encode().splitlines()),
    "a list": json.dumps(ROWS).encode(),
    "a list with blanks": b"\r\n\t" + json.dumps(ROWS, indent=2).encode(),
    "an object with a list": json.dumps({"metadata": [{"c": 1}], "data": ROWS, "info": {"data": [{}]}}).encode(),
    "a list below a line": b'{"annotations": [\n' + LINES.encode().replace(b"}\n", b"},\n")[:-2] + b"\n]}",
    "objects of several lines": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "gzip": gzip.compress(LINES.encode(), mtime=0),
    "gzip twice in a row": gzip.compress(LINES.encode()[:9], mtime=0) + gzip.compress(LINES.encode()[9:], mtime=0),
    "gzip of a list": gzip.compress(json.dumps(ROWS).encode()),
    "zstd": zstd(LINES.encode()),
    "parquet": parquet(),
    "an Arrow stream": arrow(),
    "an Arrow file": arrow(pa.ipc.new_file),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_records_is_read_whatever_it_is_called(tmp_path, form):
    for name in ("train.jsonl", "train.json", "train.gz", "train"):
        (tmp_path / name).write_bytes(FORMS[form])
        assert outcomes(tmp_path / name) == ROWS


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (LINES.encode("utf-16"), "is text in UTF-16; `iconv -f UTF-16 -t UTF-8 train.jsonl` makes UTF-8 of it"),
        (LINES.encode("utf-16-be"), "`iconv -f UTF-16BE -t UTF-8 train.jsonl`"),
        (LINES.encode("utf-16-le"), "`iconv -f UTF-16LE -t UTF-8 train.jsonl`"),
        (LINES.encode("utf-32"), "is text in UTF-32"),
        (LINES.encode("utf-32-le"), "is text in UTF-32LE"),
        (LINES.encode("utf-32-be"), "is text in UTF-32BE"),
        (gzip.compress(LINES.encode("utf-16"), mtime=0), "`iconv -f UTF-16 -t UTF-8 <(gzip -dc train.jsonl)` makes"),
        (b"PK\x03\x04", "is a zip archive; unpack it"),
        (b"BZh91AY", "is packed by xz, bzip2"),
        (b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
        (b"<!DOCTYPE html>", "is a web page"),
        (encoded("red"), "is an image"),
        (tar(), "is a tar; unpack it"),
        (gzip.compress(parquet(), mtime=0), "is parquet inside gzip; unpack it"),
        (zstd(tar()), "is tar inside zstd; unpack it"),
        (gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0), "is packed inside gzip"),
        (gzip.compress(LINES.encode(), mtime=0)[:-9], "not readable as gzip after 100% of it"),
        (zstd(LINES.encode())[:-9], "not readable as zstd after 100% of it"),
        (b" \n", "the file is empty"),
        (b'{"annotations": []}', "there are no records"),
        (b'{"data": [{}], "rows": [{}]}', "records stand below 'data' and at 'rows'; expected one"),
        (b'{"messages": [], "data": [{}]}', "records stand below 'messages' and at 'data'; expected one"),
        ('{\n "a": "é"\n}'.encode("latin-1"), "line 2, column 8: byte 0xe9 is not UTF-8, maybe latin-1"),
        (b'[{"a": 1},\n {"a": 2},\n]', "after record 2: line 3, column 1: a comma before ']'"),
    ],
)
def test_a_file_that_is_not_read_is_named(tmp_path, content, found):
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_records(tmp_path / "train.jsonl"))
    assert "train.jsonl: " in str(caught.value) and found in str(caught.value)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"a": "é"}'.encode("latin-1"), "line is not UTF-8; column 8: byte 0xe9 is not UTF-8, maybe latin-1"),
        (b'{"a": 1,}', "line is not JSON; column 9: a comma before '}'"),
        (b'{"a": 1},', "line is not JSON; column 9: Extra data at ','"),
        (b'{"a": 1', "line is not JSON; column 9: it is cut off"),
        (b"{'a': 1}", "line is not JSON; column 2: Expecting property name enclosed in double quotes"),
    ],
)
def test_a_bad_line_says_what_is_wrong_and_where(tmp_path, line, found):
    (tmp_path / "x.jsonl").write_bytes(line + b'\n{"b": 1}\n')
    bad, good = outcomes(tmp_path / "x.jsonl")
    assert bad.startswith(f"x.jsonl:1: {found}") and good == {"b": 1}


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_a_packed_bomb_is_one_skip_in_little_memory(tmp_path, pack):
    bomb = pack(b'{"a": "' + b"x" * 50_000_000 + b'"}\n{"a": 2}\n')
    (tmp_path / "x").write_bytes(bomb)
    del bomb
    tracemalloc.start()
    with record_limit(1000):
        assert outcomes(tmp_path / "x") == ["x:1: record too long; ", {"a": 2}]
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()


# ---------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.csv", 'file_name,text\r\n0.jpg,"a, ""b""\nc"\r\n'),
        ("x.tsv", 'file_name\ttext\n0.jpg\t"a, ""b""\nc"\n'),
        ("x.csv", '\ufefffile_name;text\n0.jpg;"a, ""b""\nc"\n'),
        ("x.csv", 'file_name,text\r0.jpg,"a, ""b""\nc"\r'),
    ],
)
def test_csv_has_a_header_and_rows_that_may_hold_lines(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    (row,) = read_records(tmp_path / name)
    assert row == {"file_name": "0.jpg", "text": 'a, "b"\nc', "__from__": f"{name}:2", "__at__": 1.0}


def test_the_limit_of_csv_for_other_readers_stays(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    before = csv.field_size_limit()
    with record_limit(before // 2):
        for _ in read_csv(tmp_path / "x.csv"):
            assert csv.field_size_limit() == before
    assert csv.field_size_limit() == before


def test_what_is_wrong_with_csv_is_said(tmp_path):
    path = tmp_path / "x.csv"

    def refusal(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(UserError) as caught, record_limit(1000):
            list(read_csv(path))
        return str(caught.value)

    joined = "row has a stray quote; it joins lines 2 to 3, each of which is a row by itself"
    quote = "row has a stray quote; ',' expected after '\"'; expected each quote of a quoted text twice"
    for text, found in {
        "a,b\n1\n\n1,2": ["x.csv:2: row has other columns than the header; 1 in place of 2", {"a": "1", "b": "2"}],
        'a,b\n1,"2\n3,4"\n5,6': [f"x.csv:2: {joined}", f"x.csv:3: {joined}", {"a": "5", "b": "6"}],
        'a,b\n"1" x,2\n1 "y",6': [f"x.csv:2: {quote}", {"a": '1 "y"', "b": "6"}],
        'a\n"b\nc"': [{"a": "b\nc"}],
        ",a\n0,1": [{"column 1": "0", "a": "1"}],
        "sep=|\na|b\n1,2|3": [{"a": "1,2", "b": "3"}],
    }.items():
        path.write_text(text)
        assert outcomes(path) == found
    assert "x.csv: the columns are 'a', 'a'; expected a name for each, each once" in refusal(b"a,a\n")
    assert "x.csv:2: byte 0xe9 is not UTF-8" in refusal(b"a,b\n\xe9,2\n")
    for content in (b"", b"\n1", b",\n1,2", b'"a" b,c\n'):
        assert "expected a name for each, each once" in refusal(content)
    for content in (b'a,b\n"1,2\n' + b"x\n" * 1000, b'a,b\n"1,2\n', b'"a,b\n1,2\n'):
        assert "is a quote not closed?" in refusal(content)


# ------------------------------------------------------------------------------------------- folders and the hub

TALK = {"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Red."}]}


def saved(folder: Path) -> datasets.Dataset:
    """A dataset with an image, whose bytes are in it."""
    (folder / "red.png").write_bytes(encoded("red"))
    own = datasets.Dataset.from_list([TALK | {"images": [str(folder / "red.png")]}])
    return own.cast_column("images", datasets.List(datasets.Image()))


def test_what_save_to_disk_wrote_is_read_as_it_is(tmp_path):
    saved(tmp_path).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=saved(tmp_path)).save_to_disk(tmp_path / "splits")
    (tmp_path / "one" / "cache-0.arrow").touch()
    for folder in ("one", "splits"):
        (sample,) = samples(adapter("messages", tmp_path / folder))
        assert said(sample) == [("user", f"<{len(encoded('red'))} bytes>|What?"), ("assistant", "Red.")]


def test_a_dataset_of_the_hub_is_read_from_its_cache(tmp_path, monkeypatch):
    pq.write_table(pa.table({"messages": [TALK["messages"]], "images": [[{"bytes": b"?"}]]}), tmp_path / "x.parquet")
    asked = []

    def load_dataset(name, configuration, split):
        asked.append((name, configuration, split))
        return original("parquet", data_files=str(tmp_path / "x.parquet"), split=split, cache_dir=str(tmp_path / "c"))

    original = datasets.load_dataset
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    of = adapter("messages", "owner/name", config="small")
    assert said(*samples(of)) == [("user", "<1 bytes>|What?"), ("assistant", "Red.")]
    assert of.all_files() == of.files() and asked == [("owner/name", "small", "train")]
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "train.jsonl").write_text(json.dumps({"messages": []}))
    monkeypatch.chdir(tmp_path)
    assert [file.name for file in adapter("messages", "owner/name").files()] == ["train.jsonl"], "what is here wins"


def test_what_is_neither_here_nor_on_the_hub_is_a_mistake(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("offline")))
    with pytest.raises(UserError, match=r"owner/name: no such file or folder here; as a dataset of the hub: .*offline"):
        adapter("messages", "owner/name").files()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "train.jsonl").touch()
    for name, path, near in (
        ("messages", "a/b/c", "$"),
        ("messages", "here/tran.jsonl", "; did you mean 'train.jsonl'"),
        ("messages", "here/name", "$"),
        ("messages", "elsewhere/train.json", "$"),
        ("m3it", "owner/name", "; docs/data.md"),
    ):
        with pytest.raises(UserError, match=rf"path {path} does not exist{near}"):
            adapter(name, path)


def test_rows_say_which_of_several_folders_they_are_from(tmp_path):
    for task, subset in (("vqa", "gqa"), ("captioning", "coco")):
        folder = tmp_path / "data" / task / subset
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_text('{"no"}\n7\n')
    of = adapter("m3it", tmp_path, subsets=["coco", "gqa"])
    skips = [row for file in of.files() for row in of.rows(file)]
    assert [skip.where for skip in skips] == [
        f"{name}/train.jsonl:{line}" for name in ("coco", "gqa") for line in (1, 2)
    ]


def test_an_object_of_many_members_is_no_record_without_end(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({str(n): {"a": "x" * 90} for n in range(40_000)}))
    with pytest.raises(UserError, match="a record of over 1,000 bytes"), record_limit(1000):
        list(read_records(tmp_path / "x.json"))
