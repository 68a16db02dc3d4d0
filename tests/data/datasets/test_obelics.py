"""OBELICS pages from parquet files with downloaded images beside them, and from interleaved tars."""

import json
import tarfile
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.adapters import DATA, adapter, outcomes, said, samples
from helpers.stores import encoded

from sft.core.errors import UserError
from sft.core.sample import Sample, SkipSample
from sft.data.formats import read_jsonl, read_parquet

RED = encoded("red", "JPEG")
URL = "https://example.org/"
NO_RULES = {
    "skip_ending_with_two_images": False,
    "skip_three_consecutive_images": False,
    "skip_single_trailing_image": False,
}


def shown(path: Path, **options) -> list[str]:
    """What becomes of each document: it as text, or the reason."""
    found = outcomes(adapter("obelics", path, **options))
    return [said(outcome)[0][1] if isinstance(outcome, Sample) else outcome for outcome in found]


def raw_rows(name: str) -> list[dict]:
    rows = read_jsonl(DATA / "obelics" / name)
    return [{column: value for column, value in row.items() if not column.startswith("__")} for row in rows]


def write_parquet(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_images(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(RED)


def shard(folder: Path, pages: list[dict], images: str = "train-00000.images") -> Path:
    """A shard with two downloaded images in img2dataset's layout and one that failed."""
    write_parquet(folder / images / "00000.parquet", raw_rows("downloads.jsonl"))
    write_images(folder / images / "00000", "000000000.jpg", "000000001.jpg")
    write_parquet(folder / "train-00000.parquet", pages)
    return folder


def page(*items: str | None) -> dict:
    """A page: `kite` and `lamp` are images that are here, `dead` is one that is not; anything else is text."""
    images = [f"{URL}{item}.jpg" if item in ("kite", "lamp", "dead") else None for item in items]
    return {"images": images, "texts": [None if image else item for image, item in zip(images, items, strict=True)]}


def one(folder: Path, *items: str | None, **options) -> str:
    (outcome,) = shown(shard(folder, [page(*items)]), **options)
    return outcome


# -------------------------------------------------------------------------------------------------- reading order


def test_pages_keep_their_order_lose_dead_images_and_are_split_at_the_marker(tmp_path):
    assert shown(shard(tmp_path, raw_rows("pages.jsonl"))) == [
        "<000000000.jpg>|A kite climbs.\n\nThe wind holds.|<000000001.jpg>|A lamp is lit. Night falls.",
        "Before between|<000000000.jpg>|after",
        "filtered: no image is left",
        "<000000000.jpg>|First page.",
        "filtered: no image is left",
        "Third page.|<000000001.jpg>|It goes on.",
    ]


def test_keys_name_shard_page_and_document(tmp_path):
    found = samples(adapter("obelics", shard(tmp_path, raw_rows("pages.jsonl"))))
    assert [sample.key.removeprefix("obelics/train-00000.parquet:") for sample in found] == ["1/0", "2/0", "4/0", "4/2"]
    assert {message.role for sample in found for message in sample.messages} == {"document"}


def test_texts_are_joined_by_a_space_and_nothing_stands_between_text_and_image(tmp_path):
    assert one(tmp_path, " a ", "b", "kite", "c\n\n", "dead", "d ") == "a  b|<000000000.jpg>|c\n\n d"


def test_slots_that_hold_nothing_are_dropped(tmp_path):
    nothing = {"images": [None, "", None], "texts": [None, None, " \n"]}
    whole = page("kite", "text")
    both = {column: nothing[column] + whole[column] for column in nothing}
    assert shown(shard(tmp_path, [nothing, both])) == ["filtered: no image is left", "<000000000.jpg>|text"]


def test_an_image_that_is_listed_but_not_on_disk_is_dead(tmp_path):
    shard(tmp_path, [page("kite", "a", "lamp", "b")])
    (tmp_path / "train-00000.images" / "00000" / "000000001.jpg").unlink()
    assert shown(tmp_path) == ["<000000000.jpg>|a b"]


def test_special_text_stays_text_unless_asked(tmp_path):
    items = ("kite", "a", "<image> b", "c")
    assert one(tmp_path, *items) == "<000000000.jpg>|a <image> b c"
    assert one(tmp_path, *items, skip_texts_with_image_tokens=True) == "<000000000.jpg>|a c"


# ----------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    "items, reason",
    [
        (("kite", "text", "kite", "lamp"), "ends with two images"),
        (("kite", "lamp", "kite", "text"), "three consecutive images"),
        (("text", "kite"), "the only image is last"),
    ],
)
def test_rules_of_the_packing_code_are_on_and_each_has_an_option(tmp_path, items, reason):
    assert one(tmp_path, *items) == f"filtered: {reason}"
    assert not one(tmp_path, *items, **NO_RULES).startswith("filtered")


def test_two_consecutive_images_and_a_last_one_after_others_are_fine(tmp_path):
    assert one(tmp_path, "kite", "lamp", "text", "kite") == "<000000000.jpg>|<000000001.jpg>|text|<000000000.jpg>"


def test_rules_judge_what_is_left_of_a_document(tmp_path):
    assert one(tmp_path, "kite", "dead", "lamp", "text", "kite", "dead").count("|") == 3
    assert one(tmp_path, "kite", "a", "dead", "dead") == "<000000000.jpg>|a"


@pytest.mark.parametrize("max_images, is_kept", [(None, True), (2, True), (1, False), (0, False)])
def test_documents_with_more_than_max_images_are_filtered(tmp_path, max_images, is_kept):
    outcome = one(tmp_path, "kite", "text", "lamp", "text", max_images=max_images)
    assert outcome.startswith("<") if is_kept else outcome == "filtered: more than max_images images"


@pytest.mark.parametrize("min_words, is_kept", [(1, True), (3, True), (4, False)])
def test_documents_with_fewer_than_min_words_are_filtered(tmp_path, min_words, is_kept):
    outcome = one(tmp_path, "kite", "one two", "lamp", "three", min_words=min_words)
    assert outcome.startswith("<") if is_kept else outcome == "filtered: fewer than min_words words"


def test_a_document_without_text_is_filtered(tmp_path):
    assert one(tmp_path, "kite", "lamp", **NO_RULES) == "filtered: fewer than min_words words"


# ----------------------------------------------------------------------------------------------------- broken pages


@pytest.mark.parametrize(
    "broken, reason",
    [
        ({"images": None, "texts": ["a"]}, "images or texts is not a list"),
        ({"images": ["a"], "texts": "a"}, "images or texts is not a list"),
        ({"images": [None]}, "images or texts is not a list"),
        ({"images": [None, None], "texts": ["a"]}, "images and texts differ in length"),
        ({"images": [URL + "kite.jpg"], "texts": ["a"]}, "slot holds both an image and a text"),
        ({"images": [7], "texts": [None]}, "slot holds neither a URL nor a text"),
        ({"images": [None], "texts": [7]}, "slot holds neither a URL nor a text"),
        ({"images": [None], "texts": [{"a": "b"}]}, "slot holds neither a URL nor a text"),
    ],
)
def test_a_broken_page_has_one_reason(tmp_path, broken, reason):
    assert shown(shard(tmp_path, [broken])) == [reason]


@pytest.mark.parametrize("name", ["\ud83d.jpg", "x" * 5000, " ", "https://example.org/kite.jpg"])
def test_a_path_that_cannot_be_a_file_is_never_an_error_of_the_code(tmp_path, name):
    write_parquet(tmp_path / "train-0.parquet", [page("kite", "text")])
    (tmp_path / "train-0.images").mkdir()
    (tmp_path / "train-0.images" / "map.jsonl").write_text(json.dumps({"url": URL + "kite.jpg", "path": name}))
    assert shown(tmp_path)[0] in ("image is not a local path", "filtered: no image is left")


@pytest.mark.parametrize("value", [None, 7, [], {}, "", "\ud83d", [7], [None], [[]], [b""]], ids=repr)
def test_no_value_of_any_field_is_an_error_of_the_code(tmp_path, monkeypatch, value):
    of = adapter("obelics", shard(tmp_path, []))
    for field in ("images", "texts", "metadata", "general_metadata"):
        row = raw_rows("pages.jsonl")[0] | {field: value, "__from__": "train-00000.parquet:1", "__at__": 1.0}
        monkeypatch.setattr("sft.data.datasets.obelics.read_records", pages_after_map([row], tmp_path))
        for outcome in outcomes(of):
            assert isinstance(outcome, Sample | str)
    for row in ({"__from__": "x", "items": value}, {"__from__": "x"}):
        with pytest.raises(SkipSample):
            of.to_sample(row)


def pages_after_map(pages: list[dict], folder: Path):
    """A reader that gives these pages for the shard, and the image map as it is."""
    return lambda path, **_: iter(pages) if path.parent == folder else read_parquet(path)


# ------------------------------------------------------------------------------------------------------- image map


def test_a_map_of_ones_own_has_url_and_path(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", [page("kite", "text")])
    write_images(tmp_path / "train-0.images" / "own", "1.png")
    lines = [
        {"url": URL + "kite.jpg", "path": "own/1.png"},
        {"url": URL + "kite.jpg", "path": "own/another.png"},
        {"url": None, "path": "own/1.png"},
        {"url": URL + "lamp.jpg", "path": 7},
    ]
    map_file = tmp_path / "train-0.images" / "map.jsonl"
    map_file.write_text("".join(json.dumps(line) + "\n" for line in lines) + "not JSON\n")
    assert shown(tmp_path) == ["<1.png>|text"]


def test_a_path_that_leaves_the_folder_of_images_is_a_bad_record(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", [page("kite", "text")])
    write_parquet(tmp_path / "train-0.images" / "map.parquet", [{"url": URL + "kite.jpg", "path": "../../etc/passwd"}])
    assert shown(tmp_path) == ["image path leaves the folder"]


def test_image_folder_says_where_the_folders_of_images_stand(tmp_path):
    shard(tmp_path / "data", [page("kite", "text")], images="../elsewhere/train-00000.images")
    assert shown(tmp_path, image_folder="../elsewhere") == ["<000000000.jpg>|text"]
    assert shown(tmp_path, image_folder=str(tmp_path / "elsewhere")) == ["<000000000.jpg>|text"]


def test_a_shard_without_its_images_is_refused(tmp_path):
    write_parquet(tmp_path / "train-00000.parquet", [page("kite", "text")])
    with pytest.raises(UserError, match=r"train-00000.images: no .* found; expected the shard's images"):
        shown(tmp_path)


def test_a_map_that_lists_no_downloaded_image_is_refused(tmp_path):
    write_parquet(tmp_path / "train-00000.parquet", [page("kite", "text")])
    write_parquet(tmp_path / "train-00000.images" / "0.parquet", [{"image_url": URL, "file": "0.jpg"}])
    with pytest.raises(UserError, match="no downloaded image listed"):
        shown(tmp_path)


# ------------------------------------------------------------------------------------------------------------ tars


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
    return path


def tar_page(slots: dict[str, bytes], listed: list[str] | None = None) -> dict[str, bytes]:
    """A page as exported: members in the order of their names and the list of them."""
    names = [f"3_0a1b2c.{slot}" for slot in slots] if listed is None else [f"3_0a1b2c.{slot}" for slot in listed]
    members = {f"3_0a1b2c.{slot}": content for slot, content in slots.items()}
    return dict(sorted((members | {"3_0a1b2c.metadata.txt": "\n".join(names).encode()}).items()))


def test_slots_of_a_tar_are_read_by_their_numbers(tmp_path):
    slots = {f"{n}.text.txt": f"text {n}".encode() for n in (0, 2, 10, 11)}
    slots |= {f"{n}.image.jpeg": RED for n in (1, 9)}
    tar = write_tar(tmp_path / "shard_0000000.tar", tar_page(slots))
    image = f"<{len(RED)} bytes>"
    assert shown(tmp_path) == [f"text 0|{image}|text 2|{image}|text 10 text 11"]
    (sample,) = samples(adapter("obelics", tar))
    assert sample.key == "obelics/shard_0000000.tar:./3_0a1b2c/0"


TWO_SLOTS = {"0.image.jpeg": RED, "1.text.txt": b"text"}


@pytest.mark.parametrize(
    "members, reason",
    [
        (tar_page(TWO_SLOTS, [*TWO_SLOTS, "2.text.txt"]), "a listed member is missing"),
        (tar_page(TWO_SLOTS, []), "no list of the members"),
        ({"3_0a1b2c.0.image.jpeg": RED}, "no list of the members"),
        (tar_page({**TWO_SLOTS, "0.text.txt": b"text"}), "slot holds both an image and a text"),
        (tar_page({**TWO_SLOTS, "1.text.txt": b"caf\xe9"}), "text is not UTF-8"),
        (tar_page({"0.text.txt": b"text"}), "filtered: no image is left"),
    ],
)
def test_a_broken_page_of_a_tar_has_one_reason(tmp_path, members, reason):
    assert shown(write_tar(tmp_path / "0.tar", members)) == [reason]


def test_members_of_no_slot_are_not_read(tmp_path):
    members = tar_page({**TWO_SLOTS, "1.2.text.txt": b"no slot", "text.txt": b"no slot"})
    assert shown(write_tar(tmp_path / "0.tar", members)) == [f"<{len(RED)} bytes>|text"]


# ----------------------------------------------------------------------------------------------------------- files


def test_shards_of_the_split_are_read_in_order_and_what_stands_beside_them_is_not(tmp_path):
    for name in ("train-00001.parquet", "train-00000.parquet", "test-00000.parquet", "train-00000.images/0.parquet"):
        write_parquet(tmp_path / "data" / name, [page("kite", "text")])
    files = adapter("obelics", tmp_path).files()
    assert [file.name for file in files] == ["train-00000.parquet", "train-00001.parquet"]


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected web documents"):
        adapter("obelics", tmp_path).files()
