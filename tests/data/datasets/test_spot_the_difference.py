"""Spot the Difference: MIMIC-IT's SD in its three containers, and the original annotations."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.adapters import DATA, adapter, outcomes, said, samples
from helpers.stores import encoded

from sft.core.errors import UserError
from sft.core.images import MAX_BYTES
from sft.core.sample import Sample, SkipSample
from sft.data.datasets import _mimic_it

NAME = "spot_the_difference"
MIMIC_IT = DATA / NAME / "mimic_it"
ORIGINAL = DATA / NAME / "original"
IMAGES = json.loads((MIMIC_IT / "SD.json").read_text())
ONE_STRING = {name: value[0] if isinstance(value, list) else value for name, value in IMAGES.items()}
JUNK = (None, 7, [], {}, "", "\ud83d", True, [None], [[]], ["\ud83d"], {"bytes": 7})

VAN = ("Which vehicle is only in the left image?", "A yellow van is only in the left image.")
GATE = ("Is the gate open in both?", "No, it is closed in the second image.")


def pictures(sample: Sample) -> list[bytes]:
    return [image.source for image in sample.images]


def instruction(**fields) -> dict:
    """A sound instruction of MIMIC-IT, but for these fields; None leaves one out."""
    record = {"instruction": "What moved?", "answer": "A chair.", "image_ids": ["SD_IMG_00007_1", "SD_IMG_00007_2"]}
    return {name: value for name, value in (record | {"rel_ins_ids": []} | fields).items() if value is not None}


def write_instructions(folder, *records, images=IMAGES):
    """MIMIC-IT's files with these records."""
    data = {f"SD_INS_{number:05d}": record for number, record in enumerate(records)}
    (folder / "SD_instructions.json").write_text(json.dumps({"meta": {}, "data": data}))
    (folder / "SD.json").write_text(json.dumps(images))
    return folder


def outcome(folder, record, **options) -> Sample | str:
    [one] = outcomes(adapter(NAME, write_instructions(folder, record), **options))
    return one


# ----------------------------------------------------------------------------------------------- MIMIC-IT, JSON


def test_both_images_stand_before_the_question_in_the_order_of_their_ids():
    first = samples(adapter(NAME, MIMIC_IT))[0]
    assert [message.role for message in first.messages] == ["user", "assistant"]
    assert pictures(first) == [encoded("red"), encoded("green")]
    assert first.messages[0].content[2:] == VAN[:1] and first.messages[1].content == VAN[1:]
    assert first.key == "spot_the_difference/SD_instructions.json:SD_INS_00000"


def test_images_are_read_as_a_string_or_a_list_of_one_urlsafe_and_unpadded():
    assert isinstance(IMAGES["SD_IMG_00007_2"], list)
    assert set(IMAGES["SD_IMG_00021_1"]) & set("-_") and len(IMAGES["SD_IMG_00021_1"]) % 4
    dog = samples(adapter(NAME, MIMIC_IT))[2]
    assert pictures(dog)[0].startswith(encoded("blue")) and pictures(dog)[1] == encoded("white")


def test_markers_and_line_breaks_in_an_instruction_are_removed():
    assert samples(adapter(NAME, MIMIC_IT))[1].messages[0].content[2:] == GATE[:1]


def test_an_instruction_whose_images_are_absent_is_left_out_by_name():
    of = adapter(NAME, MIMIC_IT)
    assert [outcome for outcome in outcomes(of) if isinstance(outcome, str)] == ["image not in the data"]
    with pytest.raises(SkipSample) as skip:
        of.to_sample(list(of.rows(of.files()[0]))[3])
    assert "SD_IMG_00404_1" in skip.value.detail


def test_rows_hold_places_and_no_image_bytes():
    of = adapter(NAME, MIMIC_IT)
    for row in of.rows(of.files()[0]):
        assert all(image is None or isinstance(image, _mimic_it.ImageLocation) for image in row["images"])


def test_multi_turn_joins_related_instructions_on_the_same_images_and_asks_each_once():
    first, again, dog, _, dog_gone = outcomes(adapter(NAME, MIMIC_IT, multi_turn=True))
    assert [text.rpartition("|")[2] for _, text in said(first)] == [*VAN, *GATE]
    assert len(first.images) == 2
    assert again == "filtered: asked in the dialogue of a related record"
    assert [len(sample.messages) for sample in (dog, dog_gone)] == [2, 2]


def test_multi_turn_keeps_broken_related_records_out_of_a_sound_dialogue(tmp_path):
    records = [instruction(rel_ins_ids=["SD_INS_00001", "SD_INS_00002", 7]), instruction(answer=""), 7]
    of = adapter(NAME, write_instructions(tmp_path, *records), multi_turn=True)
    sound, *rest = outcomes(of)
    assert len(sound.messages) == 2
    assert rest == ["empty answer", "record is not a JSON object"]


def test_a_broken_record_takes_no_related_ones_with_it(tmp_path):
    records = [instruction(instruction="", rel_ins_ids=["SD_INS_00001"]), instruction()]
    broken, sound = outcomes(adapter(NAME, write_instructions(tmp_path, *records), multi_turn=True))
    assert broken == "empty instruction" and isinstance(sound, Sample)


def test_keys_are_unique_in_every_form():
    for path in (MIMIC_IT, ORIGINAL):
        keys = [sample.key for sample in samples(adapter(NAME, path))]
        assert len(set(keys)) == len(keys) > 2


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"instruction": None}, "instruction is not text"),
        ({"instruction": 7}, "instruction is not text"),
        ({"instruction": " \n"}, "empty instruction"),
        ({"instruction": "<image>"}, "empty instruction"),
        ({"answer": None}, "answer is not text"),
        ({"answer": ["A chair."]}, "answer is not text"),
        ({"answer": " "}, "empty answer"),
        ({"image_ids": None}, "images are not a list"),
        ({"image_ids": "SD_IMG_00007_1"}, "images are not a list"),
        ({"image_ids": []}, "no image"),
        ({"image_ids": ["SD_IMG_00007_1"]}, "one image only"),
        ({"image_ids": ["SD_IMG_00007_1"] * 3}, "more than two images"),
        ({"image_ids": ["SD_IMG_00007_1", 7]}, "image not in the data"),
        ({"image_ids": ["SD_IMG_00007_1", ["SD_IMG_00007_2"]]}, "image not in the data"),
        ({"image_ids": ["SD_IMG_00007_1", ""]}, "image not in the data"),
    ],
)
@pytest.mark.parametrize("multi_turn", [False, True])
def test_a_broken_instruction_has_one_reason(tmp_path, fields, reason, multi_turn):
    assert outcome(tmp_path, instruction(**fields), multi_turn=multi_turn) == reason


@pytest.mark.parametrize("content", ["", "###", "not base64 at all!"])
def test_an_image_that_is_not_base64_is_left_out(tmp_path, content):
    images = IMAGES | {"SD_IMG_00007_2": content}
    assert outcomes(adapter(NAME, write_instructions(tmp_path, instruction(), images=images))) == [
        "image is not base64"
    ]


@pytest.mark.parametrize("field", ["instruction", "answer", "image_ids", "rel_ins_ids", "__further__", "images"])
@pytest.mark.parametrize("multi_turn", [False, True])
def test_deep_nesting_in_an_instruction_is_no_error_of_the_code(tmp_path, field, multi_turn):
    deep = "[" * 2000 + "]" * 2000
    text = json.dumps({"data": {"SD_INS_00000": instruction() | {field: "HERE"}}}).replace('"HERE"', deep)
    write_instructions(tmp_path)
    (tmp_path / "SD_instructions.json").write_text(text)
    assert len(outcomes(adapter(NAME, tmp_path, multi_turn=multi_turn))) == 1


def test_a_vast_image_is_left_out_unread(tmp_path):
    of = adapter(NAME, write_instructions(tmp_path, instruction()))
    [row] = of.rows(of.files()[0])
    row["images"][1] = row["images"][1]._replace(length=2 * MAX_BYTES)
    with pytest.raises(SkipSample, match="image too many bytes"):
        of.to_sample(row)


@pytest.mark.parametrize("field", ["instruction", "answer", "image_ids", "rel_ins_ids"])
@pytest.mark.parametrize("multi_turn", [False, True])
def test_no_junk_in_an_instruction_is_an_error_of_the_code(tmp_path, field, multi_turn):
    of = adapter(NAME, write_instructions(tmp_path, instruction()), multi_turn=multi_turn)
    for junk in JUNK:
        if "\\ud83d" not in json.dumps(junk):  # the JSON reader refuses half a surrogate pair
            assert isinstance(outcome(tmp_path, instruction() | {field: junk}, multi_turn=multi_turn), Sample | str)
        row = next(iter(of.rows(of.files()[0]))) | {field: junk}
        try:
            assert isinstance(of.to_sample(row), Sample)
        except SkipSample as skip:
            assert skip.reason


# ------------------------------------------------------------------------------------------- MIMIC-IT, parquet


@pytest.mark.parametrize("index", ["__index_level_0__", "image_id"])
@pytest.mark.parametrize("row_group_size", [1, 100])
@pytest.mark.parametrize("block_bytes", [1, 1000000])
def test_an_image_parquet_says_the_same_as_the_json(tmp_path, monkeypatch, index, row_group_size, block_bytes):
    monkeypatch.setattr(_mimic_it, "BLOCK_BYTES", block_bytes)  # 1: the file is read again for every record
    shutil.copy(MIMIC_IT / "SD_instructions.json", tmp_path)
    table = pa.table({"base64": list(ONE_STRING.values()), index: list(ONE_STRING)})
    pq.write_table(table, tmp_path / "SD.parquet", row_group_size=row_group_size)
    assert outcomes(adapter(NAME, tmp_path)) == outcomes(adapter(NAME, MIMIC_IT))
    assert outcomes(adapter(NAME, tmp_path, multi_turn=True)) == outcomes(adapter(NAME, MIMIC_IT, multi_turn=True))


def test_an_image_parquet_as_pandas_writes_it_is_read(tmp_path):
    pandas = pytest.importorskip("pandas")
    shutil.copy(MIMIC_IT / "SD_instructions.json", tmp_path)
    frame = pandas.DataFrame.from_dict(ONE_STRING, orient="index", columns=["base64"])
    frame.to_parquet(tmp_path / "SD.parquet", engine="pyarrow")
    assert outcomes(adapter(NAME, tmp_path)) == outcomes(adapter(NAME, MIMIC_IT))


@pytest.mark.parametrize("columns", [["base64"], ["image", "id"], ["base64", "id", "more"]])
def test_an_image_parquet_with_other_columns_is_refused(tmp_path, columns):
    shutil.copy(MIMIC_IT / "SD_instructions.json", tmp_path)
    pq.write_table(pa.table({name: ["x"] for name in columns}), tmp_path / "SD.parquet")
    with pytest.raises(UserError, match=r"SD\.parquet: has columns .*; expected `base64` and one of image ids"):
        outcomes(adapter(NAME, tmp_path))


def test_an_image_parquet_that_is_none_is_refused(tmp_path):
    shutil.copy(MIMIC_IT / "SD_instructions.json", tmp_path)
    (tmp_path / "SD.parquet").write_bytes(b"PAR1, or so it says")
    with pytest.raises(UserError, match=r"SD\.parquet: not readable as parquet"):
        outcomes(adapter(NAME, tmp_path))


def hub_row(**fields) -> dict:
    images = [{"bytes": encoded("red"), "path": None}, {"bytes": encoded("green"), "path": "b.png"}]
    return {"id": "SD_INS_00000", "instruction": VAN[0], "answer": VAN[1], "images": images} | fields


def write_hub(folder, *rows):
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), folder / "train-00000-of-00001.parquet")


def test_rows_of_the_hub_hold_their_images(tmp_path):
    write_hub(tmp_path / "SD", hub_row(**{"related instructions": ["SD_INS_00001"]}), hub_row(answer="  "))
    sample, broken = outcomes(adapter(NAME, tmp_path))
    assert pictures(sample) == [encoded("red"), encoded("green")]
    assert [text.rpartition("|")[2] for _, text in said(sample)] == list(VAN)
    assert sample.key == "spot_the_difference/train-00000-of-00001.parquet:1"
    assert broken == "empty answer"


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (None, "images are not a list"),
        ([], "no image"),
        ([{"bytes": encoded("red"), "path": None}], "one image only"),
        ([{"bytes": encoded("red"), "path": None}] * 3, "more than two images"),
        ([None, {"bytes": encoded("red"), "path": None}], "image not in the data"),
        ([{"bytes": None, "path": "a.png"}] * 2, "image without bytes"),
        ([{"bytes": b"", "path": "a.png"}] * 2, "image without bytes"),
        ([7, 7], "image is not base64"),
    ],
)
def test_a_broken_row_of_the_hub_has_one_reason(images, reason):
    with pytest.raises(SkipSample, match=f"^{reason}$"):
        adapter(NAME, MIMIC_IT).to_sample(hub_row(images=images, __from__="train.parquet:1"))


@pytest.mark.parametrize("field", ["id", "instruction", "answer", "images", "related instructions"])
def test_no_junk_in_a_row_of_the_hub_is_an_error_of_the_code(field):
    of = adapter(NAME, MIMIC_IT)
    for junk in (*JUNK, [{}, {}], [7, None], ["\ud83d", b""]):
        try:
            assert isinstance(of.to_sample(hub_row(__from__="train.parquet:1") | {field: junk}), Sample)
        except SkipSample as skip:
            assert skip.reason


# --------------------------------------------------------------------------------------------------- original


def test_the_original_is_a_pair_of_files_and_its_sentences_in_one_line():
    first = samples(adapter(NAME, ORIGINAL))[0]
    assert [image.source.name for image in first.images] == ["31.png", "31_2.png"]
    assert all(image.source.is_file() for image in first.images)
    assert first.messages[1].content == ("The blue truck drove off. A crate stands by the wall.",)
    assert first.key == "spot_the_difference/train.json:1"


def test_sentences_stay_as_they_are_when_asked():
    first = samples(adapter(NAME, ORIGINAL, correct_casing=False))[0]
    assert first.messages[1].content == ("the blue truck drove off\na crate stands by the wall.",)


def test_a_record_of_empty_sentences_is_left_out():
    assert outcomes(adapter(NAME, ORIGINAL))[2] == "no sentence, or only empty ones"


def test_each_split_of_the_original_has_its_file():
    [one] = samples(adapter(NAME, ORIGINAL, split="val"))
    assert one.messages[1].content == ("One bench fewer.",)


def test_the_prompt_is_drawn_by_seed_and_key_alone():
    def prompts(seed):
        return [sample.messages[0].content[2] for sample in samples(adapter(NAME, ORIGINAL, seed=seed))]

    assert prompts(0) == prompts(0)
    assert len({tuple(prompts(seed)) for seed in range(8)}) > 1


@pytest.mark.parametrize("path", ["", "data", "data/annotations", "data/annotations/train.json"])
def test_the_original_is_found_from_its_folders_and_its_file(path):
    assert len(samples(adapter(NAME, ORIGINAL / path))) == 3


def test_the_image_folder_may_be_anywhere(tmp_path):
    shutil.copytree(ORIGINAL / "data" / "resized_images", tmp_path / "full size")
    shutil.copy(ORIGINAL / "data" / "annotations" / "train.json", tmp_path)
    for folder in ("full size", str(tmp_path / "full size")):
        first = samples(adapter(NAME, tmp_path, image_folder=folder))[0]
        assert first.images[0].source == tmp_path / "full size" / "31.png"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"img_id": None}, "img_id is not an id"),
        ({"img_id": 31}, "img_id is not an id"),
        ({"img_id": ""}, "img_id is not an id"),
        ({"img_id": "../../31"}, "img_id is not an id"),
        ({"img_id": "\ud83d"}, "img_id is not an id"),
        ({"sentences": None}, "sentences are not a list of text"),
        ({"sentences": "one bench fewer"}, "sentences are not a list of text"),
        ({"sentences": ["one bench fewer", 7]}, "sentences are not a list of text"),
        ({"sentences": []}, "no sentence, or only empty ones"),
    ],
)
def test_a_broken_annotation_has_one_reason(fields, reason):
    row = {"img_id": "31", "sentences": ["one bench fewer"], "__from__": "train.json:1"} | fields
    with pytest.raises(SkipSample, match=f"^{reason}$"):
        adapter(NAME, ORIGINAL).to_sample(row)


@pytest.mark.parametrize("field", ["img_id", "sentences"])
def test_no_junk_in_an_annotation_is_an_error_of_the_code(field):
    of = adapter(NAME, ORIGINAL)
    row = {"img_id": "31", "sentences": ["one bench fewer"], "__from__": "train.json:1"}
    for junk in JUNK:
        try:
            assert isinstance(of.to_sample(row | {field: junk}), Sample)
        except SkipSample as skip:
            assert skip.reason
    with pytest.raises(SkipSample):
        of.to_sample({name: value for name, value in row.items() if name != field})


# ------------------------------------------------------------------------------------------------- whole files


def test_instructions_without_images_are_refused(tmp_path):
    shutil.copy(MIMIC_IT / "SD_instructions.json", tmp_path)
    with pytest.raises(UserError, match=r"SD\.parquet: file not found; expected the images of SD_instructions"):
        outcomes(adapter(NAME, tmp_path))


def test_instructions_without_data_are_refused(tmp_path):
    shutil.copy(MIMIC_IT / "SD.json", tmp_path)
    (tmp_path / "SD_instructions.json").write_text('{"meta": {}}')
    with pytest.raises(UserError, match=r"no JSON object at 'data'"):
        outcomes(adapter(NAME, tmp_path))


def test_instructions_are_of_the_train_split():
    with pytest.raises(UserError, match=r"no SD/val-\*\.parquet or .* found; expected SD of MIMIC-IT"):
        adapter(NAME, MIMIC_IT, split="val").files()


def test_the_original_without_its_images_is_refused(tmp_path):
    shutil.copy(ORIGINAL / "data" / "annotations" / "train.json", tmp_path)
    with pytest.raises(UserError, match=r"resized_images: folder not found; expected the images of Spot-the-Diff"):
        adapter(NAME, tmp_path).files()


def test_options_of_the_other_form_are_refused(tmp_path):
    with pytest.raises(UserError, match="image_folder is for the original"):
        adapter(NAME, MIMIC_IT, image_folder="resized_images").files()
    with pytest.raises(UserError, match="multi_turn is for MIMIC-IT"):
        outcomes(adapter(NAME, ORIGINAL, multi_turn=True))
    write_hub(tmp_path, hub_row())
    with pytest.raises(UserError, match="multi_turn and image_folder go by image ids"):
        outcomes(adapter(NAME, tmp_path, multi_turn=True))


def test_another_json_is_refused_by_what_it_is(tmp_path):
    (tmp_path / "resized_images").mkdir()
    (tmp_path / "other.json").write_text('{"prompts": [], "answers": 7}')
    of = adapter("spot_the_difference", tmp_path / "other.json")
    (row,) = of.rows(*of.files())
    with pytest.raises(SkipSample, match="img_id is not an id") as caught:
        of.to_sample(row)
    assert caught.value.detail == "found prompts, answers"
    of = adapter("general_scene_difference", tmp_path / "other.json")
    with pytest.raises(
        UserError, match=r"other.json: an object, as the instructions .*; expected NAME_instructions.json"
    ):
        list(of.rows(*of.files()))
