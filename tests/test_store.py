"""What an adapter makes is on disk afterwards, and what was left out is counted."""

import io
import json
import struct
import zlib

import pytest
from PIL import Image

from sft.errors import RunError, UserError
from sft.images import MAX_BYTES, decode_rgb, read_bytes
from sft.sample import ImageRef, Message, Sample, SkipSample
from sft.store import Store, prepare_store


def encoded(colour: str, format: str = "PNG", size: tuple[int, int] = (4, 3)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format)
    return buffer.getvalue()


RED, BLUE = encoded("red"), encoded("blue")


def header_of(width: int, height: int) -> bytes:
    """A PNG that says how large it is and holds nothing: decoding it could only fail."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", b""), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


class Toys:
    """An adapter whose records are samples, or the reason to leave them out."""

    name = "toys"
    raw = "as it was"

    def __init__(self, *records: Sample | SkipSample) -> None:
        self.records = records
        self.num_read = 0

    def stamp(self):
        return self.raw

    def rows(self):
        for record in self.records:
            self.num_read += 1
            yield record if isinstance(record, SkipSample) else {"sample": record}

    def to_sample(self, row):
        return row["sample"]


def shown(key: str, *items: str | bytes) -> Sample:
    """A question of texts and encoded images, answered yes."""
    content = tuple(ImageRef(source=item) if isinstance(item, bytes) else item for item in items)
    return Sample(
        key=key,
        messages=(Message(role="user", content=content), Message(role="assistant", content=("Yes.",))),
    )


def prepared(path, adapter, *, max_skip_share=1.0, **options) -> Store:
    return prepare_store(adapter, path / "toys", asked={"dataset": "toys"}, max_skip_share=max_skip_share, **options)


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


def test_each_distinct_image_is_kept_once(tmp_path):
    (tmp_path / "copy.png").write_bytes(RED)
    copy = Sample(
        key="copy", messages=(Message(role="document", content=(ImageRef(source=tmp_path / "copy.png"), "A file.")),)
    )
    store = prepared(tmp_path, Toys(shown("one", RED), shown("two", BLUE, RED, BLUE), copy))
    assert store.num_images == 2
    assert [rows for _, rows in store.stored_samples()] == [(0,), (1, 0, 1), (0,)]
    assert store.image_bytes(0) == RED
    assert len(set(store.image_hashes)) == 2


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
    assert store.manifest["examples"]["image does not decode"] == "bad"
    lines = [json.loads(line) for line in (store.path / "skips.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["toys/1", "toys/2", "toys/3", "bad", "half a letter"]
    assert lines[1] == {"key": "toys/2", "reason": "too small", "filtered": True}


def test_too_many_bad_records_stop_with_the_table(tmp_path):
    toys = Toys(shown("good", "Hi."), shown("bad", b"?"), SkipSample("no messages"), SkipSample("no messages"))
    with pytest.raises(RunError) as caught:
        prepared(tmp_path, toys, max_skip_share=0.7)
    assert str(caught.value) == (
        "toys: 75.0% of 4 records bad (allowed: 70.0%): 2 no messages (as toys/2), 1 image does not decode (as bad)"
    )
    assert not (tmp_path / "toys").exists()
    assert len(prepared(tmp_path, toys, max_skip_share=0.75)) == 1


def test_filtered_records_are_not_dirty_but_something_must_be_left(tmp_path):
    filtered = SkipSample("too small", filtered=True)
    assert len(prepared(tmp_path, Toys(filtered, filtered, shown("good", "Hi.")), max_skip_share=0.0)) == 1
    with pytest.raises(RunError, match=r"none of 1 records is left: \{'too small': 1\}"):
        prepared(tmp_path / "else", Toys(filtered))


def test_a_finished_store_is_opened_as_it_is(tmp_path):
    prepared(tmp_path, Toys(shown("one", "Hi.")))
    again = Toys(shown("other", "Ho."))
    assert prepared(tmp_path, again).sample(0).key == "one"
    assert again.num_read == 0


def test_a_store_is_made_anew_when_raw_files_changed(tmp_path):
    old = prepared(tmp_path, Toys(shown("one", "Hi.")))
    (old.path / "encoded").mkdir()
    again = Toys(shown("other", "Ho."))
    again.raw = "changed"
    store = prepared(tmp_path, again)
    assert [store.sample(row).key for row in range(len(store))] == ["other"]
    assert not (store.path / "encoded").exists(), "what was encoded of the old one is gone too"


def test_an_unfinished_store_is_made_again(tmp_path):
    class Breaks(Toys):
        def rows(self):
            yield from super().rows()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        prepared(tmp_path, Breaks(shown("one", RED)))
    with pytest.raises(UserError, match="run `idefics-sft prepare` first"):
        Store(tmp_path / "toys")
    (tmp_path / "toys").mkdir()  # as when the manifest was deleted
    assert prepared(tmp_path, Toys(shown("one", RED), shown("two", BLUE))).num_images == 2


def test_a_store_of_another_version_is_refused(tmp_path):
    store = prepared(tmp_path, Toys(shown("one", "Hi.")))
    (store.path / "manifest.json").write_text(json.dumps(store.manifest | {"version": 0}))
    with pytest.raises(UserError, match=r"prepared by version 0 .* prepare again"):
        Store(store.path)


def test_progress_counts_records(tmp_path):
    counts = []
    prepared(tmp_path, Toys(shown("one", "Hi."), SkipSample("no messages")), on_progress=counts.append)
    assert counts[-1] == 2


# -------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "image does not decode"),
        (RED[: len(RED) // 2], "image does not decode"),
        (encoded("red", "TIFF"), "image does not decode"),  # more code than anybody reads; not among FORMATS
        (header_of(6_000, 5_000), "image too many pixels"),
        (header_of(10_000, 10_000), "image too many pixels"),  # Pillow would warn
        (header_of(60_000, 60_000), "image too many pixels"),  # Pillow would raise
        (header_of(510, 10), "image too narrow"),
        (header_of(500, 10), "image does not decode"),
        (RED + bytes(MAX_BYTES), "image too many bytes"),
    ],
    ids=["empty", "cut", "format", "pixels", "warns", "raises", "narrow", "hollow", "bytes"],
)
def test_an_image_that_is_not_fit_has_a_reason(tmp_path, content, reason):
    store = prepared(tmp_path, Toys(shown("good", RED), shown("bad", content)))
    assert store.manifest["skipped"] == {reason: 1}


def test_a_file_that_is_not_there_has_a_reason(tmp_path):
    for name, reason in (("nothing.png", "image file missing"), ("x" * 300, "image file unreadable")):
        with pytest.raises(SkipSample, match=reason):
            read_bytes(ImageRef(source=tmp_path / name))


def test_transparency_is_laid_over_white():
    buffer = io.BytesIO()
    Image.new("RGBA", (2, 1), (255, 0, 0, 0)).save(buffer, "PNG")
    assert decode_rgb(buffer.getvalue()).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_formats_that_are_read(format):
    assert decode_rgb(encoded("white", format)).getpixel((0, 0)) == (255, 255, 255)
