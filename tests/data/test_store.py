"""What an adapter makes is on disk afterwards, and what was left out is counted."""

import io
import json
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import datasets
import pytest
import xxhash
from conftest import withheld
from helpers.stores import BLUE, RED, Toys, encoded, prepared, shown
from PIL import Image

from sft.core.errors import RunError, UserError
from sft.core.images import MAX_BYTES, TOO_MANY_BYTES, TOO_MANY_PIXELS, TOO_NARROW, decode_rgb, read_bytes
from sft.core.parallel import ordered_map
from sft.core.sample import Decoding, ImageRef, Message, Sample, SkipSample
from sft.data.datasets import Adapter
from sft.data.store import Store, is_store_folder, schedule


def header_of(width: int, height: int) -> bytes:
    """A PNG that says how large it is and holds nothing: decoding it could only fail."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", b""), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def framed(key: str, file: Path) -> Sample:
    """A document of an image file."""
    return Sample(key=key, messages=(Message(role="document", content=(ImageRef(source=file), "A photo.")),))


def keys(store: Store) -> list[str]:
    return list(store.keys)


def test_samples_read_back_equal(tmp_path):
    samples = [
        shown("one", RED, "Is it red?"),
        shown("two", "Compare ", RED, " and ", BLUE, "</s>"),
        shown("three", "Ü"),
    ]
    store = prepared(tmp_path, Toys(*samples))
    assert [store.sample(row) for row in range(len(store))] == samples
    assert store.manifest["asked"] == {"dataset": "toys"}
    assert (store.manifest["records"], store.manifest["samples"]) == (3, 3)


def test_an_empty_text_is_left_out(tmp_path):
    store = prepared(tmp_path, Toys(shown("one", "", RED, "Is it red?", "")))
    assert store.sample(0) == shown("one", RED, "Is it red?")


def test_each_distinct_image_is_kept_once(tmp_path):
    (tmp_path / "copy.png").write_bytes(RED)
    copy = Sample(
        key="copy", messages=(Message(role="document", content=(ImageRef(source=tmp_path / "copy.png"), "A file.")),)
    )
    store = prepared(tmp_path, Toys(shown("one", RED), shown("two", BLUE, RED, BLUE), copy))
    assert store.num_images == 2
    assert [rows for _, rows in store.stored_samples()] == [(0,), (1, 0, 1), (0,)]
    assert store.image_bytes(0) == RED
    assert len(set(store.image_keys.tolist())) == 2


def test_text_alone_is_a_store_too(tmp_path):
    store = prepared(tmp_path, Toys(shown("one", "Hi.")))
    assert store.num_images == 0
    assert [rows for _, rows in store.stored_samples()] == [()]


def test_what_is_left_out_is_counted_and_listed(tmp_path):
    store = prepared(
        tmp_path,
        Toys(
            shown("good", "Hi."),
            SkipSample("line is not JSON"),
            SkipSample("too small", filtered=True),
            SkipSample("line is not JSON"),
            shown("bad", b"no image"),
            shown("half a letter", "\ud83d"),
        ),
    )
    assert store.manifest["skipped"] == {"line is not JSON": 2, "image does not decode": 1, "text is not Unicode": 1}
    assert store.manifest["filtered"] == {"too small": 1}
    assert store.manifest["examples"]["line is not JSON"] == "toys/1"
    assert store.manifest["examples"]["image does not decode"] == "bad: image 1 of the record"
    lines = [json.loads(line) for line in (store.path / "skips.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["toys/1", "toys/2", "toys/3", "bad", "half a letter"]
    assert lines[1] == {"key": "toys/2", "reason": "too small", "detail": "", "filtered": True}


def test_a_bug_of_an_adapter_names_its_record(tmp_path):
    class Broken(Toys):
        def to_sample(self, row):
            raise KeyError("photo")

    with pytest.raises(KeyError) as caught:
        prepared(tmp_path, Broken(shown("one", "Hi.")))
    assert caught.value.__notes__ == ["while reading the record toys/0"]


def test_too_many_bad_records_stop_with_the_table(tmp_path, monkeypatch):
    toys = Toys(shown("good", "Hi."), shown("bad", b"?"), SkipSample("no messages"), SkipSample("no messages"))
    expected = (
        "toys: 75.0 % of 4 records bad (allowed: 70.0 %): 2 no messages (as toys/2), 1 image does not decode "
        f"(as bad: image 1 of the record); all of them: {tmp_path}/toys.skips.jsonl"
    )
    kept = f"; {tmp_path}/.toys.pieces keeps N bytes of finished work, from which the next run goes on"
    for notable, message in ((10**6, expected), (1, expected + kept)):
        monkeypatch.setattr("sft.data.store.write.NOTABLE_BYTES", notable)
        with pytest.raises(UserError) as caught:
            prepared(tmp_path, toys, max_skip_share=0.7)
        assert re.sub("[0-9,]+ bytes", "N bytes", str(caught.value)) == message
    assert len((tmp_path / "toys.skips.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "toys").exists()
    assert len(prepared(tmp_path, toys, max_skip_share=0.75)) == 1
    assert not (tmp_path / "toys.skips.jsonl").exists(), "it was the list of a failure"


def test_who_allows_more_bad_records_goes_on_at_once(tmp_path):
    toys = Toys(shown("good", "Hi."), SkipSample("no messages"))
    with pytest.raises(UserError):
        prepared(tmp_path, toys, max_skip_share=0.1)
    assert len(prepared(tmp_path, toys, max_skip_share=0.5)) == 1
    assert toys.num_read == 2, "read once"


def test_who_allows_no_more_bad_records_has_mended_something(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "PIECE_RECORDS", 1)
    made = []

    class Counted(Toys):
        def to_sample(self, row):
            made.append(row["sample"].key)
            return super().to_sample(row)

    with pytest.raises(UserError):
        prepared(tmp_path, Counted(shown("good", "Hi."), shown("bad", b"?")), max_skip_share=0.1)
    mended = Counted(shown("good", "Hi."), shown("mended", RED))
    assert keys(prepared(tmp_path, mended, max_skip_share=0.1)) == ["good", "mended"]
    assert made == ["good", "bad", "mended"], "what was good is not made again"


def test_an_image_that_is_there_at_last_is_not_skipped_again(tmp_path):
    photo = tmp_path / "photo.png"
    toys = Toys(shown("text", "Hi."), framed("photo", photo))
    with pytest.raises(UserError):
        prepared(tmp_path, toys, max_skip_share=0.1)
    photo.write_bytes(RED)
    assert keys(prepared(tmp_path, toys, max_skip_share=0.5)) == ["text", "photo"]


def test_it_stops_early_where_most_records_are_bad(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "PIECE_RECORDS", 2)
    monkeypatch.setattr(schedule, "EARLY_RECORDS", 4)
    bad = [SkipSample("no messages")]
    toys = Toys(*[shown("good", "Hi.")] * 2, *bad * 18)
    with pytest.raises(UserError, match=r"66\.7 % of 6 records bad \(allowed: 5\.0 %\)"):
        prepared(tmp_path, toys, max_skip_share=0.05)
    assert toys.num_read == 7, "one more than three pieces"
    with pytest.raises(UserError, match=r"50\.0 % of 20 records"):
        prepared(tmp_path / "half", Toys(*[*bad, shown("good", "Hi.")] * 10), max_skip_share=0.05)
    assert len(prepared(tmp_path / "all", toys, max_skip_share=0.9)) == 2


def test_a_finished_store_is_refused_where_fewer_bad_records_are_allowed(tmp_path):
    toys = Toys(shown("good", "Hi."), SkipSample("no messages"))
    prepared(tmp_path, toys)
    with pytest.raises(UserError) as caught:
        prepared(tmp_path, toys, max_skip_share=0.4)
    assert str(caught.value) == (
        "toys: 50.0 % of 2 records bad (allowed: 40.0 %): 1 no messages (as toys/1)"
        f"; all of them: {tmp_path}/toys/skips.jsonl"
    )
    assert len(prepared(tmp_path, toys)) == 1 and toys.num_read == 2


def test_filtered_records_are_not_dirty_but_something_must_be_left(tmp_path):
    filtered = SkipSample("too small", filtered=True)
    assert len(prepared(tmp_path, Toys(filtered, filtered, shown("good", "Hi.")), max_skip_share=0.0)) == 1
    with pytest.raises(UserError, match=r"no record of 1 is left: 1 too small \(as toys/0\)"):
        prepared(tmp_path / "else", Toys(filtered))


def test_a_finished_store_is_opened_as_it_is(tmp_path):
    prepared(tmp_path, Toys(shown("one", "Hi.")))
    again = Toys(shown("other", "Ho."))
    assert prepared(tmp_path, again).sample(0).key == "one"
    assert again.num_read == 0


def test_a_store_is_made_anew_when_a_raw_file_changed(tmp_path):
    raw = tmp_path / "raw.jsonl"
    raw.write_text("old")
    old = prepared(tmp_path, Toys(shown("one", "Hi."), file=raw))
    (old.path / "encoded").mkdir()
    os.utime(raw, ns=(1, 1))
    assert keys(prepared(tmp_path, Toys(shown("other", "Ho."), file=raw))) == ["one"], "only its time is another"
    raw.write_text("new")
    store = prepared(tmp_path, Toys(shown("other", "Ho."), file=raw))
    assert keys(store) == ["other"]
    assert not (store.path / "encoded").exists(), "what was encoded of the old one is gone too"


def test_a_store_is_made_anew_when_an_image_file_changed(tmp_path):
    photo = tmp_path / "photo.png"
    photo.write_bytes(RED)
    toys = Toys(Sample(key="one", messages=(Message(role="document", content=(ImageRef(source=photo), "A dog.")),)))
    assert prepared(tmp_path, toys).image_bytes(0) == RED
    later = (tmp_path / "toys" / "manifest.json").stat().st_mtime_ns + 1
    os.utime(photo, ns=(later, later))
    assert prepared(tmp_path, toys) and toys.num_read == 1, "the same content"
    photo.write_bytes(BLUE)
    os.utime(photo, ns=(later, later))
    assert prepared(tmp_path, toys).image_bytes(0) == BLUE
    photo.unlink()
    assert prepared(tmp_path, toys).image_bytes(0) == BLUE, "the store has what it needs"


def test_an_image_file_replaced_by_an_older_one_is_noticed_under_each_of_its_names(tmp_path):
    photo, copy = tmp_path / "photo.png", tmp_path / "copy.png"
    for file in (photo, copy):
        file.write_bytes(RED)
    toys = Toys(framed("one", photo), framed("two", copy))
    assert prepared(tmp_path, toys).num_images == 1
    for number, file in enumerate((copy, photo), start=2):
        file.write_bytes(PICTURES[number])
        os.utime(file, ns=(1, 1))
        store = prepared(tmp_path, toys)
        assert [store.sample(row).images[0].source for row in (0, 1)] == [photo.read_bytes(), copy.read_bytes()]


def test_a_raw_file_that_grows_while_it_is_read_is_read_again(tmp_path):
    raw = tmp_path / "raw.jsonl"
    raw.write_text("begun")

    class Grows(Toys):
        def rows(self, file):
            yield from super().rows(file)
            with raw.open("a") as growing:
                growing.write(", and on")

    with pytest.raises(RunError, match=r"raw\.jsonl: changed while it was read; prepare again"):
        prepared(tmp_path, Grows(shown("one", "Hi."), file=raw))
    assert [file.name for file in tmp_path.iterdir()] == ["raw.jsonl"]
    assert keys(prepared(tmp_path, Toys(shown("one", "Hi."), shown("two", "Hi."), file=raw))) == ["one", "two"]


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda store: shutil.rmtree(store / "samples"), r"samples/ has 0 of 2 rows"),
        (lambda store: shutil.rmtree(store / "images"), r"images/ has 0 of 1 rows"),
        (lambda store: cut(next(store.glob("samples/data-*"))), r"samples/ (is not readable|has . of 2 rows)"),
        (lambda store: cut(next(store.glob("images/data-*"))), r"images/ (is not readable|has . of 1 rows)"),
        (lambda store: os.truncate(next(store.glob("images/data-*")), 0), r"images/ is not readable"),
        (lambda store: cut(store / "manifest.json"), r"manifest.json is not readable as JSON"),
        (lambda store: os.truncate(store / "manifest.json", 0), r"manifest.json is not readable as JSON"),
        (lambda store: (store / "manifest.json").write_text("{}"), r"manifest.json does not say 'version'"),
        (lambda store: (store / "manifest.json").write_text('{"version": 5}'), r"manifest.json does not say 'adapter'"),
        (lambda store: (store / "image_keys.bin").unlink(), r"image_keys.bin is missing"),
        (lambda store: cut(store / "image_order.bin"), r"image_order.bin is not of 8 bytes"),
        (lambda store: (store / "image_files.jsonl").unlink(), r"image_files.jsonl is missing"),
        (lambda store: (store / "image_files.jsonl").write_text('{"path'), r"image_files.jsonl is not readable"),
    ],
)
def test_a_damaged_store_is_refused_and_can_be_made_anew(tmp_path, damage, message):
    toys = Toys(shown("one", RED), shown("two", "Hi."))
    damage(prepared(tmp_path, toys).path)
    with pytest.raises(UserError, match=rf"toys: this store is damaged \({message}\); prepare with --fresh to make"):
        prepared(tmp_path, toys)
    assert keys(prepared(tmp_path, toys, fresh=True)) == ["one", "two"]


def test_a_folder_of_something_else_is_never_removed(tmp_path):
    (tmp_path / "toys" / "images").mkdir(parents=True)
    (tmp_path / "toys" / "manifest.json").write_text("{}")
    assert not is_store_folder(tmp_path / "toys")
    with pytest.raises(UserError, match=r"toys: is there already and is no prepared dataset"):
        prepared(tmp_path, Toys(shown("one", "Hi.")), fresh=True)
    assert (tmp_path / "toys" / "manifest.json").read_text() == "{}"


def test_a_store_without_a_manifest_is_made_again(tmp_path):
    toys = Toys(shown("one", RED))
    store = prepared(tmp_path, toys).path
    (store / "manifest.json").unlink()
    assert is_store_folder(store)
    assert keys(prepared(tmp_path, toys)) == ["one"]
    (store / "notes.txt").write_text("mine")
    assert not is_store_folder(store) and not is_store_folder(tmp_path / "nothing")


def test_a_store_is_made_anew_when_it_is_told_or_asked_for_in_another_way(tmp_path):
    toys = Toys(shown("one", RED), shown("two", "Hi."))
    assert len(prepared(tmp_path, toys, limit=1)) == 1
    assert len(prepared(tmp_path, toys, verify="header")) == 2
    assert prepared(tmp_path, toys).manifest["verify"] == "decode", "a header was not enough"
    assert prepared(tmp_path, toys, verify="header").manifest["verify"] == "decode", "this is more than asked"
    num_read = toys.num_read
    prepared(tmp_path, toys, fresh=True)
    assert toys.num_read == num_read + 2


def test_a_store_by_another_version_of_the_adapter_is_refused_unless_told(tmp_path):
    prepared(tmp_path, Toys(shown("one", "Hi.")))
    newer = Toys(shown("two", "Hi."), version=2)
    with pytest.raises(UserError, match=r"version 1 of the adapter 'toys', this is version 2 of 'toys'; .* --fresh"):
        prepared(tmp_path, newer)
    assert keys(prepared(tmp_path, newer, fresh=True)) == ["two"]


def test_the_manifest_names_the_raw_files_with_sizes_and_hashes(tmp_path):
    raw = tmp_path / "raw.jsonl"
    raw.write_bytes(b"12345")
    manifest = prepared(tmp_path, Toys(shown("one", "Hi."), file=raw)).manifest
    assert [(f["path"], f["bytes"], f["xxh3"]) for f in manifest["files"]] == [
        (str(raw), 5, xxhash.xxh3_128(b"12345").hexdigest())
    ]
    assert manifest["licence"] == "MIT" and manifest["adapter"] == {"name": "toys", "version": 1}


def test_a_store_of_another_version_is_refused(tmp_path):
    store = prepared(tmp_path, Toys(shown("one", "Hi.")))
    (store.path / "manifest.json").write_text(json.dumps(store.manifest | {"version": 0}))
    with pytest.raises(UserError, match=r"prepared by version 0 .* prepare with --fresh"):
        Store(store.path)


def test_turns_that_are_not_to_be_learned_read_back_so(tmp_path):
    sample = withheld(shown("one", RED, "Is it red?"), 1)
    assert prepared(tmp_path, Toys(sample, shown("two", RED))).sample(0) == sample


@pytest.mark.parametrize("num_proc", [1, 2])
def test_keys_that_are_not_read_are_counted_over_all_pieces(tmp_path, monkeypatch, num_proc):
    monkeypatch.setattr(schedule, "PIECE_RECORDS", 1)
    records = [shown(str(number), "Hi.") for number in range(3)]
    store = prepared(tmp_path, Labelled(*records, SkipSample("no messages")), num_proc=num_proc)
    assert store.manifest["not_read"] == {"label": 3, "turns: loss": 6}
    assert store.manifest["examples"]["not read: label"] == "'0'"


class Labelled(Toys):
    """Records that have a key beside, and two turns with one."""

    def not_read(self, row, sample=None):
        return [("label", row["sample"].key), ("turns: loss", 1), ("turns: loss", 1)]


def test_progress_counts_records(tmp_path):
    counts = []
    toys = Toys(shown("one", "Hi."), SkipSample("no messages"))
    prepared(tmp_path, toys, on_progress=lambda records, share: counts.append((records, share)))
    assert counts == [(2, 1.0)]


def test_the_tables_are_those_of_datasets(tmp_path):
    wide = encoded("red", size=(4, 3))
    store = prepared(tmp_path, Toys(shown("one", wide, "Is it red?"), shown("two", "Hi.")))
    samples, images = (datasets.load_from_disk(str(store.path / name)) for name in ("samples", "images"))
    assert samples["key"] == ["one", "two"]
    assert samples[0]["messages"][0]["content"][1]["text"] == "Is it red?"
    assert (images[0]["bytes"], images[0]["width"], images[0]["height"]) == (wide, 4, 3)


def test_referenced_images_stay_where_they_are(tmp_path):
    (tmp_path / "photo.png").write_bytes(RED)
    photo = Message(role="document", content=(ImageRef(source=tmp_path / "photo.png"), "A dog."))
    store = prepared(tmp_path, Toys(Sample(key="one", messages=(photo,)), shown("two", BLUE)), images="reference")
    images = datasets.load_from_disk(str(store.path / "images"))
    assert images["bytes"] == [None, BLUE], "what has no file is kept"
    assert [store.image_bytes(row) for row in (0, 1)] == [RED, BLUE]
    (tmp_path / "photo.png").unlink()
    with pytest.raises(SkipSample, match="image file missing"):
        store.image_bytes(0)


# -------------------------------------------------------------------------------------------------------- pieces


PICTURES = [encoded(colour) for colour in ("red", "green", "blue", "black", "white")]


def many(n: int) -> list[Sample | SkipSample]:
    """Records of every kind; images come back again and again, in other pieces too."""
    return [
        SkipSample("no messages")
        if number % 7 == 3
        else shown(f"{number}", *([] if number % 5 == 0 else [PICTURES[number % 4]]), "What?", PICTURES[number * 3 % 5])
        if number % 2
        else shown(f"{number}", "Hi.")
        for number in range(n)
    ]


def contents(store: Store):
    """All a store holds."""
    manifest = {key: store.manifest[key] for key in ("records", "samples", "distinct_images", "skipped", "examples")}
    skips = (store.path / "skips.jsonl").read_text()
    return [store.sample(row) for row in range(len(store))], store.image_keys.tolist(), manifest, skips


def test_pieces_make_the_same_samples_as_one(tmp_path, monkeypatch):
    records = many(50)
    whole = prepared(tmp_path / "whole", Toys(*records))
    monkeypatch.setattr(schedule, "PIECE_RECORDS", 4)
    cut = prepared(tmp_path / "cut", Toys(*records))
    assert contents(cut) == contents(whole)
    assert [cut.sample(row) for row in range(len(cut))] == [r for r in records if isinstance(r, Sample)]
    assert cut.num_images == 5
    assert [rows for _, rows in cut.stored_samples(3, 9)] == [rows for _, rows in whole.stored_samples()][3:9]
    assert not list((tmp_path / "cut").glob(".*")), "nothing is left of the pieces"


def test_processes_change_nothing(tmp_path, monkeypatch):
    raw = tmp_path / "raw.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "!"}]} for n in range(30)
    ]
    raw.write_text("".join(json.dumps(line if n % 9 else {}) + "\n" for n, line in enumerate(lines)))
    monkeypatch.setattr(schedule, "PIECE_RECORDS", 7)
    adapter = Adapter("messages", str(raw), "train", {})
    one, two = (prepared(tmp_path / f"{n}", adapter, num_proc=n) for n in (1, 2))
    assert len(one) == 26
    assert contents(one) == contents(two)


def test_a_kill_before_a_piece_has_its_name_leaves_nothing(tmp_path, monkeypatch):
    def killed(path):
        raise KeyboardInterrupt

    toys = Toys(shown("one", RED))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("sft.core.files._sync", killed)
        prepared(tmp_path, toys)
    assert (tmp_path / ".toys.pieces" / ".00000-000000.staging" / "piece.json").is_file()
    assert keys(prepared(tmp_path, toys)) == ["one"]


def test_an_image_file_changed_after_a_kill_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "PIECE_RECORDS", 1)
    photo = tmp_path / "photo.png"
    photo.write_bytes(RED)

    class Killed(Toys):
        def rows(self, file):
            yield from super().rows(file)
            raise KeyboardInterrupt

    samples = framed("one", photo), shown("two", "Hi."), shown("three", "Hi.")
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path, Killed(*samples))
    photo.write_bytes(BLUE)
    assert prepared(tmp_path, Toys(*samples)).image_bytes(0) == BLUE


def test_a_kill_while_pieces_are_removed_does_no_harm(tmp_path, monkeypatch):
    def killed(folder, **_):
        for file in folder.rglob("samples.arrow"):
            file.unlink()
            raise KeyboardInterrupt

    toys = Toys(shown("one", RED))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("sft.core.files.shutil.rmtree", killed)
        prepared(tmp_path, toys)
    assert list(tmp_path.glob(".toys*")), "half of the pieces"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("sft.core.files.shutil.rmtree", killed)
        prepared(tmp_path / "again", toys)
    (tmp_path / "again" / "toys" / "manifest.json").unlink()
    for folder in (tmp_path, tmp_path / "again"):
        assert keys(prepared(folder, toys)) == ["one"]
        assert not list(folder.glob(".toys*")), "nothing is left"


def test_pieces_left_beside_a_finished_store_are_removed(tmp_path):
    toys = Toys(shown("one", RED))
    prepared(tmp_path, toys)
    (tmp_path / ".toys.pieces").mkdir()
    prepared(tmp_path, toys)
    assert not (tmp_path / ".toys.pieces").exists()


def test_a_piece_ends_at_so_many_bytes_of_images_too(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "PIECE_BYTES", 10)
    rows = [{"images": [ImageRef(source=b"1234567890")]}] * 3
    assert [len(block) for block, _ in schedule._blocks(rows)] == [1, 1, 1]


def test_a_record_may_be_nested_deeper_than_the_stack():
    row: dict = {"text": "12345"}
    for _ in range(100_000):
        row = {"in": [row]}
    [(block, is_last)] = schedule._blocks([row])
    assert len(block) == 1 and is_last
    while "in" in row:  # Python frees it level by level
        row = row.pop("in").pop()


class Refused:
    """What can be sent to a process and not be made there."""

    def __reduce__(self):
        return _refuse, ()


def _refuse():
    raise UserError("path raw does not exist")


def test_what_a_process_refuses_comes_out_as_itself():
    with pytest.raises(UserError, match="path raw does not exist"):
        list(ordered_map(str, [Refused()], 2))


@pytest.mark.parametrize("stop_at", [0, 9, 10, 19, 39])
def test_a_killed_preparation_goes_on_where_it_stopped(tmp_path, monkeypatch, stop_at):
    monkeypatch.setattr(schedule, "PIECE_RECORDS", 5)
    records = many(40)

    class Killed(Toys):
        made = 0

        def to_sample(self, row):
            Killed.made += 1
            if row["sample"].key == many(40)[stop_at + (stop_at % 7 == 3)].key and self.version == 1 and self.kills:
                raise KeyboardInterrupt
            return super().to_sample(row)

    Killed.kills = True
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path, Killed(*records))
    before, Killed.made, Killed.kills = Killed.made, 0, False
    resumed = prepared(tmp_path, Killed(*records))
    num_samples = sum(isinstance(record, Sample) for record in records)
    assert Killed.made <= num_samples - before + 5, "finished pieces are not made again"
    assert contents(resumed) == contents(prepared(tmp_path / "whole", Toys(*records)))


def test_other_raw_files_begin_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "PIECE_RECORDS", 2)
    raw = tmp_path / "raw.jsonl"
    raw.write_text("old")

    class Breaks(Toys):
        def rows(self, file):
            yield from super().rows(file)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path, Breaks(*[shown(f"old {n}", "Hi.") for n in range(6)], file=raw))
    assert list(tmp_path.glob(".toys.pieces/0*"))
    raw.write_text("newer")
    store = prepared(tmp_path, Toys(*[shown(f"new {n}", "Hi.") for n in range(6)], file=raw))
    assert keys(store) == [f"new {n}" for n in range(6)]


def test_a_limit_counts_records_of_all_files(tmp_path):
    class TwoFiles(Toys):
        def files(self):
            return [self.raw, self.raw]

    samples = [shown(f"{n}", "Hi.") for n in range(3)]
    assert len(prepared(tmp_path / "5", TwoFiles(*samples), limit=5)) == 5
    assert len(prepared(tmp_path / "2", TwoFiles(*samples), limit=2)) == 2
    assert len(prepared(tmp_path / "all", TwoFiles(*samples))) == 6


# -------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "image does not decode"),
        (RED[: len(RED) // 2], "image does not decode"),
        (encoded("red", "TIFF"), "image is TIFF, which is not read; expected JPEG, PNG, WEBP, GIF, BMP, AVIF or HEIC"),
        (header_of(8_000, 8_126), TOO_MANY_PIXELS),
        (header_of(10_000, 10_000), TOO_MANY_PIXELS),  # Pillow would warn
        (header_of(60_000, 60_000), TOO_MANY_PIXELS),  # Pillow would raise
        (header_of(510, 10), TOO_NARROW),
        (header_of(500, 10), "image does not decode"),
        (RED + bytes(MAX_BYTES), TOO_MANY_BYTES),
    ],
    ids=["empty", "cut", "format", "pixels", "warns", "raises", "narrow", "hollow", "bytes"],
)
def test_an_image_that_is_not_fit_has_a_reason(tmp_path, content, reason):
    store = prepared(tmp_path, Toys(shown("good", RED), shown("bad", content)))
    assert store.manifest["skipped"] == {reason: 1}


def turned(colour: str, format: str = "JPEG") -> bytes:
    """An image of 6 x 4 pixels that a viewer shows as one of 4 x 6."""
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4), colour).save(buffer, format, exif=exif)
    return buffer.getvalue()


SIDEWAYS = (shown("a", turned("red"), RED), shown("b", turned("blue", "PNG"), turned("red")), shown("c", turned("red")))


@pytest.mark.parametrize("piece_records", [1, 4096])
def test_sizes_are_of_images_as_they_are_seen_and_each_is_counted_once(tmp_path, monkeypatch, piece_records):
    monkeypatch.setattr(schedule, "PIECE_RECORDS", piece_records)
    store = prepared(tmp_path, Toys(*SIDEWAYS, shown("d", encoded("blue", "JPEG")[:-2])))
    assert store.image_sizes == [(4, 6), (4, 4), (4, 6), (4, 4)]
    assert store.manifest["image_notes"] == {"orientation": 2, "no_end_marker": 1}
    assert store.sample(0).images[0].decoding == store.decoding == Decoding()


def test_an_ignored_orientation_is_counted_and_goes_with_the_images(tmp_path):
    as_stored = Decoding(orientation="ignore", max_pixels=100)
    store = prepared(tmp_path, Toys(*SIDEWAYS), decoding=as_stored)
    assert store.image_sizes[0] == (6, 4) and store.manifest["image_notes"]["orientation"] == 2
    assert store.sample(0).images[0].decoding == Store(store.path).decoding == as_stored


def test_a_store_is_made_again_for_another_orientation(tmp_path):
    toys = Toys(*SIDEWAYS)
    sizes = [prepared(tmp_path, toys, decoding=Decoding(orientation=o)).image_sizes[0] for o in ("ignore", "apply")]
    assert sizes == [(6, 4), (4, 6)]
    read = toys.num_read
    prepared(tmp_path, toys)
    assert toys.num_read == read, "there is nothing to make again"


def test_a_skipped_image_is_named(tmp_path):
    (tmp_path / "torn.png").write_bytes(RED[:-20])
    (tmp_path / "wide.png").write_bytes(encoded("red", size=(9, 3)))
    torn, wide = (ImageRef(source=tmp_path / name) for name in ("torn.png", "wide.png"))
    samples = [
        Sample(key=f"{n}", messages=(Message(role="document", content=(i,)),)) for n, i in enumerate((torn, wide))
    ]
    toys = Toys(*samples, shown("2", RED, RED[:-20]), shown("3", "Hi."))
    store = prepared(tmp_path, toys, decoding=Decoding(max_pixels=26))
    details = [json.loads(line)["detail"] for line in (store.path / "skips.jsonl").read_text().splitlines()]
    assert details == [
        str(torn.source),
        f"{wide.source}: 9 x 3, over the 26 of data.images.max_pixels",
        "image 2 of the record",
    ]


def test_a_file_that_is_not_there_has_a_reason(tmp_path):
    for name, reason in (("nothing.png", "image file missing"), ("x" * 300, "image file unreadable")):
        with pytest.raises(SkipSample, match=reason):
            read_bytes(ImageRef(source=tmp_path / name))


def test_transparency_is_laid_over_white():
    buffer = io.BytesIO()
    Image.new("RGBA", (2, 1), (255, 0, 0, 0)).save(buffer, "PNG")
    assert decode_rgb(buffer.getvalue()).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF"])
def test_formats_that_are_read(format):
    assert decode_rgb(encoded("white", format)).getpixel((0, 0)) == (255, 255, 255)


def test_an_image_file_is_listed_once_and_a_broken_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "PIECE_RECORDS", 2)
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "broken.png").write_bytes(RED[:40])
    files = ["red.png"] * 5 + ["broken.png"]
    store = prepared(tmp_path, Toys(*(framed(str(n), tmp_path / name) for n, name in enumerate(files))))
    listed = [json.loads(line)["path"] for line in (store.path / "image_files.jsonl").read_text().splitlines()]
    assert listed == [str(tmp_path / "red.png"), str(tmp_path / "broken.png")]
    assert store.manifest["examples"] == {"image does not decode": f"5: {tmp_path / 'broken.png'}"}
