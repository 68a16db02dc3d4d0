"""Datasets from the command line: prepare one, look at it, hand it on; kill it and go on."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import status_of
from PIL import Image

from sft.cli.terminal import console, preparation
from sft.core.file_lock import locked
from sft.core.shipped import shipped_recipe
from sft.data.datasets import Adapter
from sft.data.encoded_arrays import encode_samples
from sft.data.store import Settings, Store, prepare_store
from sft.data.store.pieces import write_piece
from sft.models.chat_template import ChatTemplate

DATA = Path(__file__).parent.parent / "fixtures" / "messages"


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
    (first,) = printed(*prepare(tmp_path / "first", "--limit", 2))["stores"]
    assert first["samples"] == 2


def test_a_limit_does_not_replace_more_records(tmp_path, printed, refusal):
    (first,) = printed(*prepare(tmp_path / "store", "--limit", 2))["stores"]
    assert printed(*prepare(tmp_path / "store", "--limit", 2))["stores"] == [first]
    assert printed(*prepare(tmp_path / "store", "--limit", 4))["stores"][0]["samples"] == 4
    refused = refusal(*prepare(tmp_path / "store", "--limit", 2))
    assert "holds 4 records, and --limit 2 would replace them; choose another --output, or --fresh" in refused
    assert len(Store(tmp_path / "store")) == 4
    assert printed(*prepare(tmp_path / "store", "--limit", 2, "--fresh"))["stores"] == [first]


def test_two_datasets_are_prepared_into_one_folder_at_a_time(tmp_path, printed, refusal):
    with locked(tmp_path / "stores" / "a", beside=True):
        assert "stores/a: another idefics-sft is writing here" in refusal(*prepare(tmp_path / "stores" / "a"))
        printed(*prepare(tmp_path / "stores" / "b"))
    printed(*prepare(tmp_path / "stores" / "a"))
    assert {path.name for path in (tmp_path / "stores").iterdir()} == {"a", "b"}, "no lock is left"


def test_the_next_command_is_one_for_the_shell(tmp_path, capsys):
    assert status_of(*prepare(tmp_path / "ö mine")) == 0
    assert capsys.readouterr().out.endswith(f"Next: idefics-sft stats '{tmp_path}/ö mine'\n")


EVIL = ["x[/b].png", "[bold]y.png", ":smile:.png", "\x1b[2J.png", "a\nb.png", "\ud83d.png"]
SHOWN = ["x[/b].png", "[bold]y.png", ":smile:.png", r"\x1b[2J.png", r"a\nb.png", r"\ud83d.png"]


@pytest.mark.parametrize(
    ("name", "shown"), list(zip(EVIL, SHOWN, strict=True)), ids=["close", "open", "emoji", "escape", "line", "half"]
)
def test_data_are_printed_as_they_are_and_steer_no_terminal(tmp_path, capsys, name, shown):
    said = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "That."}]
    rows = [{"messages": said, "images": [name]}, {"messages": [said[0] | {"content": "Hm?"}, said[1]]}]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["prepare", "--dataset", "messages", "--path", tmp_path / "raw.jsonl", "--output", tmp_path / "store"]
    assert status_of(*command) == 2
    failed = capsys.readouterr().err
    assert shown in failed.replace(r"\\", "\\") and failed.removesuffix("\n").isprintable()
    assert status_of(*command, "--max-skip-share", 1) == 0
    printed = capsys.readouterr().out
    assert shown in printed.replace(r"\\", "\\") and all(line.isprintable() for line in printed.split("\n"))
    assert status_of("stats", tmp_path / "store") == 0


def test_keys_that_are_not_read_are_named_once_and_those_that_hold_images_warned_of(tmp_path, capsys):
    said = [{"role": "user", "content": "Hm?", "name": "Ann"}, {"role": "assistant", "content": "That.", "name": "Bo"}]
    extra = {"img": "0.png", "label": True} | dict.fromkeys("abcdefg", 1)
    (tmp_path / "raw.jsonl").write_text(json.dumps({"messages": said} | extra) + "\n" + json.dumps({"messages": said}))
    command = ["prepare", "--dataset", "messages", "--path", tmp_path / "raw.jsonl", "--output", tmp_path / "store"]
    assert status_of(*command) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "store: warning: img seems to hold images ('0.png') and is not read; expected 'image'" in printed
    assert "store: not read: label (1 of 2), turns: name (4), img (1 of 2), " in printed and "… and 4 more" in printed
    assert status_of(*command, "--json") == 0
    assert json.loads(capsys.readouterr().out)["stores"][0]["not_read"]["turns: name"] == 4


def test_all_mismatches_of_markers_and_images_are_listed_in_one_run(tmp_path, capsys):
    said = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "That."}]
    sound = {"messages": [said[0] | {"content": "Hm?"}, said[1]]}
    rows = [sound, {"messages": said}, sound, {"messages": said}]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["prepare", "--dataset", "messages", "--path", tmp_path / "raw.jsonl", "--output", tmp_path / "store"]
    assert status_of(*command) == 2
    assert "2 image marker without an image (as messages/raw.jsonl:2" in capsys.readouterr().err
    assert status_of(*command, "--max-skip-share", 0.5) == 0
    assert "messages/raw.jsonl:2: 1 <image> marker but 0 images; write <image> in" in capsys.readouterr().out
    skips = [json.loads(line) for line in (tmp_path / "store" / "skips.jsonl").read_text().splitlines()]
    assert [skip["key"] for skip in skips] == ["messages/raw.jsonl:2", "messages/raw.jsonl:4"]
    assert len(Store(tmp_path / "store")) == 2


def test_a_bar_counts_what_this_run_has_done(monkeypatch, capsys):
    """4,096 of the 8,192 records were there already, so that 1,000 in ten seconds are 100 a second."""
    now = iter((0.0, 5.0, 20.0, 30.0))
    monkeypatch.setattr("sft.cli.terminal.time.monotonic", lambda: next(now))
    with preparation(console()) as update:
        update("mine", 0, 0.0)
        assert capsys.readouterr().out == "preparing mine\n", "at once"
        update("mine", 4096, 0.5)
        update("mine", 5596, 0.75)
        update("mine", 6096, 1.0)
    assert capsys.readouterr().out == "preparing mine: 5,596, 100/s, 15 s left\npreparing mine: 6,096, 80/s\n"


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
    beside = printed("export", tmp_path / "store", "--format", "messages-parquet")
    assert beside["path"] == str(tmp_path / "store.messages" / "train.parquet")
    again = ["prepare", "--dataset", "messages", "--path", tmp_path / "out", "--output", tmp_path / "again"]
    printed(*again)
    before, after = Store(tmp_path / "store"), Store(tmp_path / "again")
    assert [after.sample(row).messages for row in range(5)] == [before.sample(row).messages for row in range(5)]


def test_what_is_wrong_is_one_line(tmp_path, refusal):
    assert "prepare needs a RECIPE, or --dataset NAME" in refusal("prepare")
    assert "needs --path RAW and --output DIR" in refusal("prepare", "--dataset", "messages")
    for option, value, key in (
        ("--images", "reference", "data.images=reference"),
        ("--verify", "header", "data.verify=header"),
        ("--path", "raw", "data.mixture.0.datasets.0.path=raw"),
        ("--split", "dev", "data.mixture.0.datasets.0.split=dev"),
        ("--output", "stores", "data.store=stores"),
        ("--option", "form=1", "data.mixture.0.datasets.0.options"),
    ):
        refused = refusal("prepare", "toy.yaml", option, value)
        assert f"{option} goes with --dataset; a RECIPE has the key {key}" in refused
    assert "did you mean 'messages'?" in refusal("prepare", "--dataset", "mesages", "--output", tmp_path / "store")
    assert "--verify: Input should be 'decode' or 'header'" in refusal(*prepare(tmp_path / "s", "--verify", "eyes"))
    assert "--option 'form': expected KEY=VALUE" in refusal(*prepare(tmp_path / "s", "--option", "form"))
    assert "unknown option 'form'" in refusal(*prepare(tmp_path / "s", "--option", "form=1"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "is there already and is no prepared dataset" in refusal(*prepare(tmp_path / "mine"))
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    assert f"prepare --dataset messages --path {tmp_path} --output stores/" in refusal("stats", tmp_path)
    assert "no prepared dataset here" in refusal("export", tmp_path, "--output", tmp_path / "x")
    shutil.copy(shipped_recipe("quickstart"), tmp_path / "recipe.yaml")
    said = refusal("stats", tmp_path)
    assert f"{tmp_path}: a run; its stores are: {tmp_path}/stores/" in said and "/stores/easy_vqa-" in said


def test_too_many_bad_records_are_a_mistake_with_the_table(tmp_path, refusal):
    bad = ["prepare", "--dataset", "messages", "--path", DATA / "bad.jsonl", "--output", tmp_path / "store"]
    assert f"messages ({DATA / 'bad.jsonl'}): 100.0 % of 14 records bad (allowed: 5.0 %)" in refusal(*bad)
    assert len((tmp_path / "store.skips.jsonl").read_text().splitlines()) == 14


KILLED = """
import sys
from pathlib import Path
from sft.data.datasets import Adapter
from sft.data.store import Settings, prepare_store, schedule
schedule.PIECE_RECORDS = 20
adapter = Adapter("messages", sys.argv[1], "train", {})
prepare_store(adapter, Path(sys.argv[2]), asked={}, settings=Settings(num_proc=int(sys.argv[3])))
"""


def wait_for_end_of(session: int) -> None:
    """Wait until no process of a session is left; fail where one stays."""
    for _ in range(1000):
        if not any(session_of(stat) == session for stat in Path("/proc").glob("[0-9]*/stat")):
            return
        time.sleep(0.01)
    pytest.fail("a process outlived the one that was killed")


def session_of(stat: Path) -> int | None:
    try:
        state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
    except OSError:  # it ended meanwhile
        return None
    return None if state == "Z" else int(session)


WAITS = """
import time
from sft.core.parallel import ordered_map
for done in ordered_map(time.sleep, iter([0, 0, 0, 0, 0, 600]), 2):
    print(done, flush=True)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_no_process_outlives_kill_9():
    process = subprocess.Popen([sys.executable, "-c", WAITS], start_new_session=True, stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline(), "the others are at work"
    process.kill()
    process.wait()
    process.stdout.close()
    wait_for_end_of(process.pid)


def test_after_a_kill_encoding_goes_on_where_it_stopped(tmp_path, monkeypatch, template):
    monkeypatch.setattr("sft.data.encoded_arrays.BLOCK_SAMPLES", 2)
    adapter = Adapter("messages", str(DATA / "train.jsonl"), "train", {})
    store = prepare_store(adapter, tmp_path / "store", asked={}, settings=Settings())
    whole = encode_samples(store, template, tmp_path / "whole")
    encode, made = ChatTemplate.encode, []

    def until_killed(self, sample):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(sample.key)
        return encode(self, sample)

    monkeypatch.setattr(ChatTemplate, "encode", until_killed)
    with pytest.raises(KeyboardInterrupt):
        encode_samples(store, template, tmp_path / "killed")
    done = []
    monkeypatch.setattr(ChatTemplate, "encode", lambda self, sample: made.append(sample.key) or encode(self, sample))
    again = encode_samples(store, template, tmp_path / "killed", on_progress=done.append)
    keys = list(store.keys)
    assert made == [*keys[:3], *keys[2:]], "the first block is not encoded again"
    assert done == [4, 5]
    for file in whole.path.iterdir():
        assert (again.path / file.name).read_bytes() == file.read_bytes(), file.name
    assert not list(tmp_path.glob(".*")), "nothing is left of the blocks"


@pytest.mark.slow
@pytest.mark.parametrize("num_proc", [1, 2])
def test_after_kill_9_it_goes_on_and_the_result_is_the_same(tmp_path, monkeypatch, num_proc):
    monkeypatch.setattr("sft.data.store.schedule.PIECE_RECORDS", 20)
    raw, store = tmp_path / "raw.jsonl", tmp_path / "store"
    question, answer = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi."}
    raw.write_text("".join(json.dumps({"messages": [question, answer], "n": n}) + "\n" for n in range(4000)))
    arguments = [sys.executable, "-c", KILLED, str(raw), str(store), str(num_proc)]
    process = subprocess.Popen(arguments, start_new_session=True)
    session = process.pid
    while len(list(tmp_path.glob(".store.pieces/00000-*"))) < 5 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    wait_for_end_of(session)
    assert not (store / "manifest.json").exists()
    finished = {piece.name for piece in tmp_path.glob(".store.pieces/00000-*")}
    made = []

    def write(piece):
        made.append(piece.path.name)
        return write_piece(piece)

    monkeypatch.setattr("sft.data.store.schedule.write_piece", write)
    adapter = Adapter("messages", str(raw), "train", {})
    resumed = prepare_store(adapter, store, asked={}, settings=Settings())
    assert made and not finished & set(made), "finished pieces are not made again"
    assert list(resumed.keys) == [f"messages/raw.jsonl:{n + 1}" for n in range(4000)]
    assert not list(tmp_path.glob(".store*"))


def test_prepare_says_how_images_are_seen(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4), "red").save(tmp_path / "photo.jpg", exif=exif)
    turns = [{"role": "user", "content": "<image>Which colour?"}, {"role": "assistant", "content": "Red."}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": turns, "images": ["photo.jpg"]}))
    command = ["prepare", "--dataset", "messages", "--path", str(tmp_path), "--output", str(tmp_path / "store")]
    assert status_of(*command) == 0
    assert "1 image has an EXIF orientation, applied" in capsys.readouterr().out
    assert status_of(*command, "--images", "{orientation: ignore}") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "made again since data.images was orientation apply" in printed
    assert "1 image has an EXIF orientation, not applied (data.images.orientation: ignore)" in printed
