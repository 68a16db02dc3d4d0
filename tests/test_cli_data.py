"""Datasets from the command line: prepare one, look at it, hand it on; kill it and go on."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import status_of

from sft.datasets import Adapter
from sft.store import Settings, Store, prepare_store
from sft.store.pieces import write_piece

DATA = Path(__file__).parent / "data" / "messages"


@pytest.fixture
def printed(capsys):
    """Runs a command line that is right and returns the JSON object it prints."""

    def run(*arguments: object):
        capsys.readouterr()
        assert status_of(*arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    return run


def prepare(output: Path, *more: object) -> list[object]:
    return ["prepare", "--dataset", "messages", "--path", DATA / "train.jsonl", "--output", output, *more]


def test_one_dataset_is_prepared_without_a_recipe(tmp_path, printed):
    (store,) = printed(*prepare(tmp_path / "store"))["stores"]
    assert (store["records"], store["samples"], store["images"]) == (5, 5, 2)
    assert (store["filtered"], store["skipped"]) == ({}, {})
    assert printed(*prepare(tmp_path / "store"))["stores"] == [store], "a second time it is opened"
    (first,) = printed(*prepare(tmp_path / "store", "--limit", 2))["stores"]
    assert first["samples"] == 2


def test_stats_are_those_of_the_samples(tmp_path, printed):
    printed(*prepare(tmp_path / "store"))
    stats = printed("stats", tmp_path / "store")
    samples = [Store(tmp_path / "store").sample(row) for row in range(5)]
    messages = [message for sample in samples for message in sample.messages]
    answers = [len(m.content[0]) for m in messages if m.role == "assistant"]
    texts = [sum(len(i) for m in s.messages for i in m.content if isinstance(i, str)) for s in samples]
    assert (stats["samples"], stats["images"], stats["distinct_images"]) == (5, sum(len(s.images) for s in samples), 2)
    assert stats["messages"] == Counter(message.role for message in messages)
    assert (stats["answer"]["total"], stats["answer"]["max"]) == (sum(answers), max(answers))
    assert (stats["text"]["total"], stats["text"]["max"]) == (sum(texts), max(texts))
    assert stats["images_per_sample"] == {"0": 2, "1": 2, "2": 1}
    assert stats["licence"] == "your own"


def test_an_export_is_read_by_the_messages_adapter(tmp_path, printed):
    printed(*prepare(tmp_path / "store"))
    exported = printed("export", tmp_path / "store", "--output", tmp_path / "out")
    assert exported == {"path": str(tmp_path / "out" / "train.parquet"), "samples": 5, "images": 4}
    again = ["prepare", "--dataset", "messages", "--path", tmp_path / "out", "--output", tmp_path / "again"]
    printed(*again)
    before, after = Store(tmp_path / "store"), Store(tmp_path / "again")
    assert [after.sample(row).messages for row in range(5)] == [before.sample(row).messages for row in range(5)]


def test_what_is_wrong_is_one_line(tmp_path, refusal):
    assert "prepare needs a RECIPE, or --dataset NAME" in refusal("prepare")
    assert "needs --path RAW and --output DIR" in refusal("prepare", "--dataset", "messages")
    assert "did you mean 'messages'?" in refusal("prepare", "--dataset", "mesages", "--output", tmp_path / "store")
    assert "--verify: Input should be 'decode' or 'header'" in refusal(*prepare(tmp_path / "s", "--verify", "eyes"))
    assert "--option 'form': expected KEY=VALUE" in refusal(*prepare(tmp_path / "s", "--option", "form"))
    assert "unknown option 'form'" in refusal(*prepare(tmp_path / "s", "--option", "form=1"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "is there already and is no prepared dataset" in refusal(*prepare(tmp_path / "mine"))
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    assert "no prepared dataset here" in refusal("stats", tmp_path)
    assert "no prepared dataset here" in refusal("export", tmp_path, "--output", tmp_path / "x")


def test_too_many_bad_records_are_a_failure_with_the_table(tmp_path, capsys):
    bad = ["prepare", "--dataset", "messages", "--path", DATA / "bad.jsonl", "--output", tmp_path / "store"]
    assert status_of(*bad) == 1
    assert "100.0% of 14 records bad (allowed: 5.0%)" in capsys.readouterr().err
    assert len((tmp_path / "store.skips.jsonl").read_text().splitlines()) == 14


KILLED = """
import sys
from pathlib import Path
from sft.datasets import Adapter
from sft.store import Settings, preparation, prepare_store
preparation.PIECE_RECORDS = 20
adapter = Adapter("messages", sys.argv[1], "train", {})
prepare_store(adapter, Path(sys.argv[2]), asked={}, settings=Settings(num_proc=int(sys.argv[3])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_proc", [1, 2])
def test_after_kill_9_it_goes_on_and_the_result_is_the_same(tmp_path, monkeypatch, num_proc):
    monkeypatch.setattr("sft.store.preparation.PIECE_RECORDS", 20)
    raw, store = tmp_path / "raw.jsonl", tmp_path / "store"
    question, answer = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi."}
    raw.write_text("".join(json.dumps({"messages": [question, answer], "n": n}) + "\n" for n in range(4000)))
    arguments = [sys.executable, "-c", KILLED, str(raw), str(store), str(num_proc)]
    process = subprocess.Popen(arguments, start_new_session=True)
    while len(list(tmp_path.glob(".store.pieces/00000-*"))) < 5 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (store / "manifest.json").exists()
    finished = {piece.name for piece in tmp_path.glob(".store.pieces/00000-*")}
    made = []

    def write(piece):
        made.append(piece.path.name)
        return write_piece(piece)

    monkeypatch.setattr("sft.store.preparation.write_piece", write)
    adapter = Adapter("messages", str(raw), "train", {})
    resumed = prepare_store(adapter, store, asked={}, settings=Settings())
    assert made and not finished & set(made), "finished pieces are not made again"
    assert list(resumed.keys) == [f"messages/raw.jsonl:{n + 1}" for n in range(4000)]
    assert not list(tmp_path.glob(".store*"))
