"""A source is its file, however the path to it is spelled."""

import json
import os
from pathlib import Path

import pytest

from sft.core.errors import UserError
from sft.data.datasets import Adapter
from sft.data.store import Settings, Store, prepare_store, schedule
from sft.recipe import DatasetConfig

TALK = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current directory, with a file of four records and a link to its folder."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.jsonl").write_text((json.dumps(TALK) + "\n") * 4)
    (tmp_path / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SPELLINGS = ("data/x.jsonl", "./data/x.jsonl", "{here}/data/x.jsonl", "link/x.jsonl", "data/../data/x.jsonl")


def make(path: str, on_progress=lambda records, share: None) -> Store:
    adapter = Adapter("messages", path, "train", {})
    asked = {"dataset": "messages", "path": path}
    return prepare_store(adapter, Path("store"), asked=asked, settings=Settings(), on_progress=on_progress)


def test_a_finished_store_is_opened_by_any_spelling(here):
    spellings = [spelling.format(here=here) for spelling in SPELLINGS]
    made = {(make(path), os.stat("store/manifest.json").st_ino)[1] for path in spellings}
    assert len(made) == 1
    (here / "y.jsonl").write_text(json.dumps(TALK))
    assert len(make("y.jsonl")) == 1


def test_a_folder_of_one_file_is_that_file(here):
    (here / "data" / "x.jsonl").rename("data/train.jsonl")
    assert len({(make(path), os.stat("store/manifest.json").st_ino)[1] for path in ("data", "data/train.jsonl")}) == 1
    (here / "data" / "data").mkdir()
    (here / "data" / "train.jsonl").rename("data/data/train-00000-of-00001.jsonl")
    made = {(make(path), os.stat("store/manifest.json").st_ino)[1] for path in ("data", "data/data")}
    assert len(made) == 2, "their images are below another folder"


def test_finished_pieces_of_a_killed_run_are_kept_by_any_spelling(here, monkeypatch):
    monkeypatch.setattr(schedule, "PIECE_RECORDS", 1)
    written = []

    def stop_after_two(records: int, share: float) -> None:
        written.append(records)
        if len(written) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make("data/x.jsonl", stop_after_two)
    make(str(here / "link" / "x.jsonl"), lambda records, share: written.append(records))
    assert written == [1, 2, 3, 4]


def test_a_refusal_before_any_piece_leaves_nothing(here):
    (here / "data" / "x.jsonl").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="is a zip archive"):
        make("data/x.jsonl")
    assert not list(here.glob(".store*"))


def test_the_name_of_a_store_is_that_of_the_file(here):
    named = {DatasetConfig(dataset="messages", path=path.format(here=here)).store_name for path in SPELLINGS}
    assert len(named) == 1
    earlier = DatasetConfig(dataset="messages", path="./data/x.jsonl")
    assert earlier.store_in("stores") == Path("stores") / earlier.store_name
    by_spelling = Path("stores") / earlier._named(earlier.path)
    by_spelling.mkdir(parents=True)
    assert earlier.store_in("stores") == by_spelling, "made by an earlier version"
