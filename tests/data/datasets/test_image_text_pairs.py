"""Image-text pairs from tars and parquet files, in the layouts of img2dataset, HuggingFaceM4, PMD and LAION."""

import tarfile
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.adapters import DATA, adapter, outcomes, said, samples
from helpers.stores import encoded

from sft.core.errors import UserError
from sft.core.sample import ImageRef, Sample, SkipSample
from sft.data.formats import read_jsonl, record_limit

MEMBERS = DATA / "image_text_pairs" / "members"
RED = encoded("red")


def pairs(path: Path, **options):
    return adapter("image_text_pairs", path, **options)


def shown(path: Path, **options) -> list[str]:
    """What becomes of each record: its document as text, or the reason."""
    found = outcomes(pairs(path, **options))
    return [said(outcome)[0][1] if isinstance(outcome, Sample) else outcome for outcome in found]


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
    return path


def members(pattern: str = "0*") -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(MEMBERS.glob(pattern))}


def write_parquet(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def raw_rows(name: str) -> list[dict]:
    rows = read_jsonl(DATA / "image_text_pairs" / name)
    return [{column: value for column, value in row.items() if not column.startswith("__")} for row in rows]


# ---------------------------------------------------------------------------------------------------------- tars


def test_a_tar_of_img2dataset_gives_image_then_caption_and_names_what_is_wrong(tmp_path):
    jpeg, png = (len((MEMBERS / name).read_bytes()) for name in ("000000000.jpg", "000000001.png"))
    assert shown(write_tar(tmp_path / "00000.tar", members())) == [
        f"<{jpeg} bytes>|A red kite over the dunes.",
        f"<{png} bytes>|Un étang bleu à l’aube",
        "filtered: download failed",
        "filtered: download failed",
        "no caption",
        "no image",
        "empty caption",
        "caption is not UTF-8",
        "json member is not a JSON object",
        "json member is not a JSON object",
    ]


def test_a_tar_of_other_members_says_which_it_has(tmp_path):
    pairs_of = pairs(write_tar(tmp_path / "0.tar", {"a.png": b"?", "a.cls": b"7", "b.cls": b"7", "b.txt": b"A pier."}))
    details = []
    for row in pairs_of.rows(*pairs_of.files()):
        with pytest.raises(SkipSample) as caught:
            pairs_of.to_sample(row)
        details.append(f"{caught.value.reason}: {caught.value.detail}")
    assert details == [
        "no caption: found png, cls; option text_column says which one is meant",
        "no image: found txt, cls; option image_column says which one is meant",
    ]


def test_the_key_names_tar_and_member_and_the_role_is_document(tmp_path):
    first, _ = samples(pairs(write_tar(tmp_path / "00000.tar", members())))
    assert first.key == "image_text_pairs/00000.tar:000000000"
    assert [message.role for message in first.messages] == ["document"]


@pytest.mark.parametrize("name, mode", [("00000.tar", "w"), ("00000.tar.gz", "w:gz"), ("00000.tgz", "w:gz")])
def test_tars_of_a_folder_are_read_packed_or_not_and_the_parquet_beside_them_is_not(tmp_path, name, mode):
    write_tar(tmp_path / name, members("000000000*"), mode)
    write_parquet(tmp_path / "00000.parquet", raw_rows("img2dataset.jsonl"))
    assert [file.name for file in pairs(tmp_path).files()] == [name]
    assert len(samples(pairs(tmp_path))) == 1


def test_a_tar_of_huggingfacem4_needs_no_json(tmp_path):
    content = {"./7_0a1b2c.image.jpeg": RED, "./7_0a1b2c.text.txt": b"a yellow tram"}
    assert shown(write_tar(tmp_path / "shard_0000000.tar", content)) == [f"<{len(RED)} bytes>|a yellow tram"]


def test_text_column_names_another_member(tmp_path):
    tar = write_tar(tmp_path / "0.tar", {"1.cls": b"7", "1.png": RED})
    assert shown(tar) == ["no caption"]
    assert shown(tar, text_column="cls") == [f"<{len(RED)} bytes>|7"]


def test_a_json_member_over_the_limit_is_not_read_and_its_pair_is_left_out(tmp_path):
    tar = write_tar(tmp_path / "0.tar", {"1.jpg": RED, "1.json": b'{"exif": "' + b"x" * 9000 + b'"}', "1.txt": b"x"})
    with record_limit(5000):
        assert shown(tar) == ["record too long"]


def test_json_nested_without_end_is_a_bad_record(tmp_path):
    tar = write_tar(tmp_path / "0.tar", {"1.jpg": RED, "1.json": b"[" * 200_000, "1.txt": b"x"})
    assert shown(tar) == ["json member is not a JSON object"]


# ------------------------------------------------------------------------------------------------------- parquet


def test_files_of_img2dataset_are_found_in_the_folder_named_after_the_parquet(tmp_path):
    write_parquet(tmp_path / "00000.parquet", raw_rows("img2dataset.jsonl"))
    assert shown(tmp_path) == ["<000000000.jpg>|A heron by the weir", "filtered: download failed"]
    (sample,) = samples(pairs(tmp_path))
    assert sample.images == (ImageRef(source=tmp_path / "00000" / "000000000.jpg"),)
    assert sample.key == "image_text_pairs/00000.parquet:1"


def test_image_folder_says_where_else_the_images_are(tmp_path):
    write_parquet(tmp_path / "00000.parquet", raw_rows("img2dataset.jsonl"))
    (sample,) = samples(pairs(tmp_path, image_folder="photos"))
    assert sample.images == (ImageRef(source=tmp_path / "photos" / "00000" / "000000000.jpg"),)


def test_parquet_output_of_img2dataset_holds_its_images(tmp_path):
    good, failed = raw_rows("img2dataset.jsonl")
    rows = [good | {"jpg": RED, "txt": b"A heron by the weir"}, failed | {"jpg": None, "txt": None}]
    assert shown(write_parquet(tmp_path / "0.parquet", rows)) == [
        f"<{len(RED)} bytes>|A heron by the weir",
        "filtered: download failed",
    ]
    two = [good | {"jpg": RED, "png": None, "txt": "A heron"}, good | {"jpg": RED, "png": b"?"}]
    assert shown(write_parquet(tmp_path / "1.parquet", two)) == ["several images or captions"] * 2


def test_every_row_of_a_plain_laion_parquet_is_filtered(tmp_path):
    write_parquet(tmp_path / "part-0.parquet", raw_rows("laion.jsonl"))
    assert shown(tmp_path) == ["filtered: image not downloaded"] * 2


def test_columns_of_another_name_are_named_by_options(tmp_path):
    row = raw_rows("laion.jsonl")[0] | {"photo": "mugs.png", "alt": "mugs"}
    write_parquet(tmp_path / "0.parquet", [row])
    assert shown(tmp_path, image_column="photo") == ["<mugs.png>|Two mugs on a sill"]
    assert shown(tmp_path, image_column="photo", text_column="alt") == ["<mugs.png>|mugs"]


@pytest.mark.parametrize(
    "image, expected",
    [
        ({"bytes": RED, "path": None}, f"<{len(RED)} bytes>|A pier"),
        ({"bytes": None, "path": "pier.png"}, "<pier.png>|A pier"),
        ({"bytes": None, "path": None}, "filtered: image not downloaded"),
        ({"bytes": None, "path": "../pier.png"}, "image path leaves the folder"),
        ("https://example.org/pier.png", "image is not a local path"),
        (None, "filtered: image not downloaded"),
    ],
)
def test_pmd_holds_images_as_bytes_and_path_or_null(tmp_path, image, expected):
    row = {"image": image, "text": "A pier", "source": "invented", "meta": "{}"}
    assert shown(write_parquet(tmp_path / "train-0.parquet", [row])) == [expected]


def test_parquet_files_of_the_split_come_before_others(tmp_path):
    for name in ("data/train-1.parquet", "data/train-0.parquet", "data/test-0.parquet"):
        write_parquet(tmp_path / name, raw_rows("laion.jsonl"))
    assert [file.name for file in pairs(tmp_path).files()] == ["train-0.parquet", "train-1.parquet"]


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected shards of image-text pairs"):
        pairs(tmp_path).files()


# ------------------------------------------------------------------------------------------- image at the end


@pytest.mark.parametrize("share, at_end", [(0.0, 0), (0.1, 20), (1.0, 200)])
def test_that_share_of_images_stands_after_the_caption_drawn_by_seed_and_key(tmp_path, share, at_end):
    write_parquet(tmp_path / "0.parquet", [{"image": RED, "text": "A pier"}] * 200)

    def order(seed: int) -> list[bool]:
        found = samples(pairs(tmp_path, prob_image_at_end=share, seed=seed))
        return [sample.messages[0].content[0] == "A pier" for sample in found]

    assert abs(sum(order(0)) - at_end) <= 12
    assert order(0) == order(0)
    assert (order(0) != order(1)) == (0 < share < 1)


def test_a_probability_is_between_0_and_1(tmp_path):
    write_parquet(tmp_path / "0.parquet", [{"image": RED, "text": "A pier"}])
    with pytest.raises(UserError, match="prob_image_at_end is 10"):
        samples(pairs(tmp_path, prob_image_at_end=10.0))


# -------------------------------------------------------------------------------------------------- broken records


@pytest.mark.parametrize(
    "value", [None, 7, [], {}, "", "\ud83d", b"", b"\xff", [[]], {"bytes": 7}, float("nan")], ids=repr
)
def test_no_value_of_any_field_is_an_error_of_the_code(tmp_path, value):
    write_parquet(tmp_path / "0.parquet", raw_rows("img2dataset.jsonl"))
    write_tar(tmp_path / "0.tar", members("000000000*"))
    for file in (tmp_path / "0.parquet", tmp_path / "0.tar"):
        of = pairs(file)
        row = next(iter(of.rows(file)))
        for field in set(row) - {"__from__", "__at__"}:
            try:
                assert isinstance(of.to_sample(row | {field: value}), Sample)
            except SkipSample as skip:
                assert skip.reason


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"text": None}, "no caption"),
        ({"text": 7}, "caption is not text"),
        ({"text": "  "}, "empty caption"),
        ({"text": b"\xff"}, "caption is not UTF-8"),
        ({"image": 7}, "image is not a local path"),
        ({"image": {"bytes": 7}}, "image is not a local path"),
        ({"status": "failed_to_resize"}, "filtered: download failed"),
    ],
)
def test_a_broken_row_has_one_reason(tmp_path, changed, reason):
    row = {"image": RED, "text": "A pier"} | changed
    assert shown(write_parquet(tmp_path / "0.parquet", [row])) == [reason]
