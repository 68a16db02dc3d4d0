"""General Scene Difference: what it does beyond the form it shares with Spot the Difference; see that test too."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.adapters import DATA, adapter, outcomes, said, samples
from helpers.stores import encoded

from sft.core.errors import UserError
from sft.core.sample import Sample, SkipSample

NAME = "general_scene_difference"
HERE = DATA / NAME
ROW = {
    "instruction": "Which photo was taken indoors?",
    "answer": "The first one.",
    "image_ids": ["CGD_IMG_000000000042", "CGD_IMG_000000000077"],
    "rel_ins_ids": [],
    "__from__": "CGD_instructions.json:CGD_INS_000000",
}
JUNK = (None, 7, [], {}, "", "\ud83d", True, [None, None], [[], {}], ["\ud83d", "\ud83d"])


def test_images_come_from_the_data_in_the_order_of_their_ids():
    first, *_ = samples(adapter(NAME))
    assert [image.source for image in first.images] == [encoded("red"), encoded("green")]
    assert said(first)[1] == ("assistant", "The first one, in a kitchen.")
    assert first.key == "general_scene_difference/CGD_instructions.json:CGD_INS_000000"


def test_an_image_folder_stands_for_full_size_coco():
    first, _, last = samples(adapter(NAME, image_folder="train2017"))
    assert said(first)[0] == ("user", "<000000000042.jpg>|<000000000077.jpg>|Which photo was taken indoors?")
    assert said(last)[0] == ("user", "<000000000105.jpg>|<000000000042.jpg>|Which has more people?")
    assert all(image.source.is_file() for image in (*first.images, *last.images))


def test_the_image_folder_may_hold_train2017(tmp_path):
    shutil.copytree(HERE / "train2017", tmp_path / "coco" / "train2017")
    first, *_ = samples(adapter(NAME, image_folder=str(tmp_path / "coco")))
    assert first.images[0].source == tmp_path / "coco" / "train2017" / "000000000042.jpg"


def test_coco_needs_no_images_beside_the_instructions(tmp_path):
    shutil.copy(HERE / "CGD_instructions.json", tmp_path)
    found = outcomes(adapter(NAME, tmp_path, image_folder=str(HERE / "train2017")))
    assert len(found) == 3 and all(isinstance(outcome, Sample) for outcome in found)


def test_an_id_with_too_many_zeros_is_found_in_json_and_parquet(tmp_path):
    shutil.copy(HERE / "CGD_instructions.json", tmp_path)
    images = json.loads((HERE / "CGD.json").read_text())
    pq.write_table(pa.table({"base64": list(images.values()), "id": list(images)}), tmp_path / "CGD.parquet")
    for path in (HERE, tmp_path):
        assert [image.source for image in samples(adapter(NAME, path))[2].images] == [encoded("blue"), encoded("red")]


@pytest.mark.parametrize("options", [{}, {"image_folder": "train2017"}])
def test_multi_turn_joins_what_is_asked_about_the_same_images(options):
    first, again, last = outcomes(adapter(NAME, multi_turn=True, **options))
    assert [role for role, _ in said(first)] == ["user", "assistant"] * 2
    assert said(first)[2:] == [("user", "What do both show?"), ("assistant", "Both show a kettle.")]
    assert again == "filtered: asked in the dialogue of a related record"
    assert len(last.messages) == 2


def test_rows_of_the_hub_hold_their_images(tmp_path):
    images = [{"bytes": encoded("red"), "path": "a.png"}, {"bytes": encoded("blue"), "path": "b.png"}]
    row = {"id": "CGD_INS_000000", "instruction": "What differs?", "answer": "The colour.", "images": images}
    (tmp_path / "CGD").mkdir()
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "CGD" / "train-00000-of-00001.parquet")
    [sample] = samples(adapter(NAME, tmp_path))
    assert [image.source for image in sample.images] == [encoded("red"), encoded("blue")]
    pq.write_table(
        pa.Table.from_pylist([row | {"__further__": "x"}]), tmp_path / "CGD" / "train-00000-of-00001.parquet"
    )
    assert samples(adapter(NAME, tmp_path)) == [sample], "a column is never taken for what we note in a row"
    with pytest.raises(UserError, match="multi_turn and image_folder go by image ids"):
        outcomes(adapter(NAME, tmp_path, image_folder="CGD"))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"instruction": ""}, "empty instruction"),
        ({"instruction": None}, "instruction is not text"),
        ({"answer": ""}, "empty answer"),
        ({"answer": None}, "answer is not text"),
        ({"image_ids": None}, "images are not a list"),
        ({"image_ids": []}, "no image"),
        ({"image_ids": ["CGD_IMG_000000000042"]}, "one image only"),
        ({"image_ids": ["CGD_IMG_000000000042"] * 3}, "more than two images"),
        ({"image_ids": ["CGD_IMG_000000000042", 77]}, "image id is not one of COCO"),
        ({"image_ids": ["CGD_IMG_000000000042", "SD_IMG_00007_1"]}, "image id is not one of COCO"),
        ({"image_ids": ["CGD_IMG_000000000042", "CGD_IMG_"]}, "image id is not one of COCO"),
        ({"image_ids": ["CGD_IMG_000000000042", "CGD_IMG_0000000000x42"]}, "image id is not one of COCO"),
        ({"image_ids": ["CGD_IMG_000000000042", "CGD_IMG_²"]}, "image id is not one of COCO"),
        ({"image_ids": ["CGD_IMG_000000000042", "CGD_IMG_00000000000000042"]}, "image id is not one of COCO"),
        ({"image_ids": ["CGD_IMG_000000000042", "CGD_IMG_000000000077\n"]}, "image id is not one of COCO"),
    ],
)
def test_a_broken_record_has_one_reason(fields, reason):
    with pytest.raises(SkipSample, match=f"^{reason}$") as skip:
        adapter(NAME, image_folder="train2017").to_sample(ROW | fields)
    assert not skip.value.filtered


@pytest.mark.parametrize("field", ["instruction", "answer", "image_ids", "rel_ins_ids", "images"])
@pytest.mark.parametrize("options", [{}, {"image_folder": "train2017"}])
def test_no_junk_in_a_record_is_an_error_of_the_code(field, options):
    of = adapter(NAME, **options)
    for row in list(of.rows(of.files()[0])):
        for junk in JUNK:
            try:
                assert isinstance(of.to_sample(row | {field: junk}), Sample)
            except SkipSample as skip:
                assert skip.reason


def test_an_image_folder_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"val2017: folder not found; expected image_folder, the JPEG files of COCO"):
        adapter(NAME, image_folder="val2017").files()


def test_there_is_a_train_split_only():
    with pytest.raises(UserError, match=r"expected CGD of MIMIC-IT, published as train only"):
        adapter(NAME, split="val").files()
