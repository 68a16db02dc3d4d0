"""M3IT: many subsets, two forms of rows; the fixtures hold invented rows in the published fields."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.adapters import adapter, encoded_base64, outcomes, said, samples
from helpers.stores import encoded

from sft.core.errors import UserError
from sft.core.images import decode_rgb
from sft.core.sample import ImageRef, Message, Sample
from sft.data.datasets.m3it import SELECTION

RED = encoded_base64("red")
LOADER_ROW = {"instruction": "Look.", "inputs": "What is it?", "image_base64_str": [RED], "outputs": "Red.\n"}
RAW_ROWS = {
    "coco": {"image": RED, "meta": {"targets": ["A red square."]}},
    "shapes": {"question": "is it red", "answer": "true", "image_str": RED},
    "vqav2": {"question": "How many?", "paraphrased_answer": "Two.", "original_answer": "2", "img_str": RED},
    "a-okvqa": {"question": "When?", "rationale": "It is bright.", "answer": "day", "image_str": RED},
    "docvqa": {"question": "What is the total?", "answer": "12", "image_str": RED},
    "imagenet": {"label": 3, "img_str": RED},
    "snli-ve": {"hypothesis": "It is red.", "gold_label": "neutral", "image_base64_str": RED},
    "coco-goi": {"input": "Options:\ncup\nbox", "outputs": "box", "image_str": RED},
    "vist": {"images": [RED, RED], "sentences": ["One.", "Two."]},
}


def of_subset(name: str, **options) -> list[Sample]:
    return samples(adapter("m3it", subsets=[name], **options))


def texts(name: str, **options) -> list[tuple[str, str]]:
    """(question, answer) of each sample of a fixture subset, without instruction and images."""
    conversations = [said(sample) for sample in of_subset(name, **options)]
    return [(user.split("|")[-1].partition("\n")[2], answer) for (_, user), (_, answer) in conversations]


def colour(image: ImageRef) -> tuple[int, int, int]:
    return decode_rgb(image.source).getpixel((0, 0))


def write(folder, *rows, name="train.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "instructions.json").write_text('["Look at it."]')
    (folder / "mapping.txt").write_text("".join(f"n{number:08d} thing {number}\n" for number in range(12)))
    return folder


# ------------------------------------------------------------------------------------------------- the two forms


def test_a_row_of_the_loader_form_is_an_image_a_question_and_a_stripped_answer():
    first, second = (sample.messages for sample in of_subset("visual-dialog"))
    image = first[0].content[0]

    assert colour(image) == (0, 128, 0)
    assert first[0] == Message(role="user", content=(image, "Answer as in the talk.\nWhat colour?"))
    assert first[1] == Message(role="assistant", content=("Green.",))
    assert second[0] == Message(role="user", content=(image, "Describe it."))


def test_the_loader_form_is_read_from_a_file_a_subset_folder_or_parquet(tmp_path):
    folder = write(tmp_path / "gqa", LOADER_ROW)
    pq.write_table(pa.Table.from_pylist([LOADER_ROW]), tmp_path / "train-00000-of-00001.parquet")
    as_struct = {"instruction": "Look.", "inputs": "What is it?", "outputs": "Red.", "image": {"bytes": encoded("red")}}
    (tmp_path / "copy/data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([as_struct]), tmp_path / "copy/data/train-00000-of-00001.parquet")

    read = [samples(adapter("m3it", path)) for path in (folder, folder / "train.jsonl", tmp_path, tmp_path / "copy")]

    assert [list(map(said, each)) for each in read] == [[said(read[0][0])]] * 4


def test_keys_name_subset_file_and_line_and_are_unique():
    names = ["coco", "shapes", "okvqa", "science-qa"]
    keys = [sample.key for sample in samples(adapter("m3it", subsets=names))]

    assert len(set(keys)) == len(keys)
    assert keys[:3] == ["m3it/coco/train.jsonl:1/1", "m3it/coco/train.jsonl:1/2", "m3it/shapes/train.large.jsonl:1"]


# -------------------------------------------------------------------------------------------------- the templates


@pytest.mark.parametrize(
    ("subset", "expected"),
    [
        ("coco", [("", "A red square."), ("", "Nothing but red.")]),
        ("shapes", [("is a square above?", "The answer is yes."), ("is there blue?", "The answer is no.")]),
        ("okvqa", [("Who paints this?", "A child paints it."), ("Which colour?", "The answer is blue.")]),
        ("a-okvqa", [("Day or night?", "The sky is bright. So the answer is day.")]),
        ("docvqa", [("What is the total?", "12")]),
        ("viquae", [("Where is it?", "The answer is nowhere.")]),
        ("vqa-v2", [("How many?", "There are two."), ("What time?", "The answer is noon.")]),
        ("text-vqa", [("What does it say?", "It says hello.")]),
        ("st-vqa", [("Which word?", "The answer is stop.")]),
        ("coco-itm", [("(A) a cat\n(B) a dog\n(C) red", "(C)")]),
        ("mocheg", [("Claim: it is red.", "True")]),
        ("coco-text", [("", "legible")]),
        ("snli-ve", [("", "maybe")]),
        ("imagenet-open-ended", [("", "thing 3, item 3"), ("", "thing 1, item 1")]),
    ],
)
def test_each_subset_has_its_template(subset, expected):
    assert texts(subset) == expected


def test_the_hypothesis_of_snli_ve_stands_inside_its_instruction():
    (sample,) = of_subset("snli-ve")

    assert sample.messages[0].content[1] == "Does the picture show that It is red.?"


def test_mocheg_says_its_options_in_the_instruction():
    (sample,) = of_subset("mocheg")

    assert " Options: True or False.\nClaim" in said(sample)[0][1]


def test_an_imagenet_row_asks_for_its_class_among_ten():
    question, answer = texts("imagenet")[0]
    options = question.splitlines()[1:]

    assert len(set(options)) == 10
    assert answer in options and answer.endswith(") thing 3, item 3")


def test_a_coco_region_keeps_24_options_and_the_answer_is_always_among_them():
    (short, short_answer), (long, long_answer) = texts("coco-goi")

    assert (short, short_answer) == ("Options:\n(A) cup\n(B) box\n(C) hat", "(B) box")
    assert len(long.splitlines()) == 1 + 24 + 1
    assert long_answer in long.splitlines() and long_answer.endswith(") kind 39")


def test_instructions_are_drawn_by_seed_and_key():
    def drawn(seed):
        return [said(sample) for sample in of_subset("coco", seed=seed)]

    assert drawn(0) == drawn(0)
    assert any(drawn(0) != drawn(seed) for seed in range(1, 8))
    assert len({conversation[0][1] for seed in range(8) for conversation in drawn(seed)}) == 3


# ---------------------------------------------------------------------------------------------------- the images


def test_a_science_question_without_image_is_text():
    text, with_image = of_subset("science-qa")

    assert text.images == () and len(with_image.images) == 1
    assert texts("science-qa")[0] == ("Is ice cold?", "(A) yes")


@pytest.mark.parametrize("field", ["image", "image_str", "img_str", "image_base64_str", "image_base64"])
@pytest.mark.parametrize("value", [RED, [RED]])
def test_the_image_may_have_any_published_name_and_be_in_a_list(tmp_path, field, value):
    folder = write(tmp_path / "gqa", {"question": "What?", "answer": "Red.", field: value})

    (sample,) = samples(adapter("m3it", folder))

    assert sample.images[0].source == encoded("red")


def test_several_images_keep_their_order_in_subsets_that_have_them():
    (sample,) = of_subset("nlvr")

    assert list(map(colour, sample.images)) == [(255, 0, 0), (0, 0, 255)]


def test_an_image_of_docvqa_over_a_million_characters_is_filtered(tmp_path):
    rows = [LOADER_ROW | {"image_base64_str": ["A" * size]} for size in (1_000_000, 1_000_004)]

    found = outcomes(adapter("m3it", write(tmp_path / "docvqa", *rows)))

    assert isinstance(found[0], Sample)
    assert found[1] == "filtered: image over 1,000,000 characters of base64"


# ----------------------------------------------------------------------------------------------------- the files


def test_without_subsets_all_25_of_idefics_are_read(tmp_path):
    for name in SELECTION:
        write(tmp_path / "data/any" / {"coco-itm": "itm", "vqa-v2": "vqav2"}.get(name, name), LOADER_ROW)

    read = samples(adapter("m3it", tmp_path))

    assert [sample.key.split("/")[1] for sample in read] == list(SELECTION)
    assert len(SELECTION) == 25


def test_a_missing_subset_is_said_with_the_cure():
    with pytest.raises(UserError, match=r"M3IT subsets textcap,.*set subsets: \[coco, coco-goi"):
        adapter("m3it").files()


@pytest.mark.parametrize(
    ("subset", "split", "expected"),
    [
        ("okvqa", "train", "train_v2.jsonl"),
        ("shapes", "train", "train.large.jsonl"),
        ("science-qa", "train", "science_qa_train.jsonl"),
        ("snli-ve", "train", "esnlive_train.jsonl"),
        ("text-vqa", "val", "validation_new.jsonl"),
        ("text-vqa", "validation", "validation_new.jsonl"),
    ],
)
def test_one_file_of_a_split_is_taken_whatever_its_name(subset, split, expected):
    assert [file.name for file in adapter("m3it", split=split, subsets=[subset]).files()] == [expected]


def test_dated_files_are_no_split(tmp_path):
    write(tmp_path / "shapes", LOADER_ROW, name="train_2023-10-08.jsonl")

    with pytest.raises(UserError, match="no train file of the M3IT subsets shapes"):
        adapter("m3it", tmp_path, subsets=["shapes"]).files()


def test_two_candidates_for_a_split_are_refused(tmp_path):
    write(tmp_path / "gqa", LOADER_ROW, name="a_train.jsonl")
    write(tmp_path / "gqa", LOADER_ROW, name="b_train.jsonl")

    with pytest.raises(UserError, match=r"a_train\.jsonl and b_train\.jsonl could both be the train split"):
        adapter("m3it", tmp_path / "gqa").files()


@pytest.mark.parametrize(
    ("subsets", "message"),
    [
        (["okvqaa"], "unknown subset 'okvqaa'; did you mean 'okvqa'?"),
        (["shapes-rephrased"], "says the rows of 'shapes' again"),
        (["imagenet", "imagenet-open-ended"], "none whose rows are there twice"),
        ([], "expected one or more"),
    ],
)
def test_a_choice_of_subsets_that_makes_no_sense_is_refused(subsets, message):
    with pytest.raises(UserError, match=re.escape(message)):
        adapter("m3it", subsets=subsets).files()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("instructions.json", None, "its rows need instructions"),
        ("instructions.json", "[]", "its rows need instructions"),
        ("instructions.json", '["a", 7]', "expected a list of instructions"),
        ("mapping.txt", None, "expected the class names"),
        ("mapping.txt", "tench", "expected lines like"),
    ],
)
def test_a_side_file_that_is_missing_or_wrong_stops_the_source(tmp_path, name, content, message):
    folder = write(tmp_path / "imagenet", RAW_ROWS["imagenet"])
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)

    with pytest.raises(UserError, match=message):
        outcomes(adapter("m3it", folder))


def test_raw_rows_in_a_folder_of_another_name_need_the_name_of_their_subset(tmp_path):
    folder = write(tmp_path / "mine", RAW_ROWS["shapes"])

    with pytest.raises(UserError, match="no M3IT subset is named 'mine'; say which"):
        outcomes(adapter("m3it", folder))
    assert len(samples(adapter("m3it", folder, subsets=["shapes"]))) == 1


# --------------------------------------------------------------------------------------------------- bad records


@pytest.mark.parametrize(
    ("subset", "change", "reason"),
    [
        ("coco", {"meta": {"targets": []}}, "caption is not text"),
        ("coco", {"meta": {"targets": [None]}}, "caption is not text"),
        ("shapes", {"answer": "perhaps"}, "answer is neither true nor false"),
        ("docvqa", {"question": " "}, "no question"),
        ("docvqa", {"question": None}, "question is not text"),
        ("docvqa", {"answer": ["12"]}, "answer is not text"),
        ("docvqa", {"answer": "\n"}, "empty message"),
        ("docvqa", {"image_str": None}, "no image"),
        ("docvqa", {"image_str": [RED, RED]}, "more than one image"),
        ("docvqa", {"image_str": "%%%%"}, "image is not base64"),
        ("docvqa", {"image_str": {"path": "a.png"}}, "image has no bytes"),
        ("a-okvqa", {"answer": " "}, "empty message"),
        ("coco-goi", {"outputs": " "}, "empty message"),
        ("imagenet", {"label": 12}, "unknown label"),
        ("imagenet", {"label": "n99999999"}, "unknown label"),
        ("snli-ve", {"gold_label": "yes"}, "unknown gold_label"),
        ("vist", {"sentences": ["One.", None]}, "sentences is not a list of texts"),
        ("docvqa", {"video": "a.mp4"}, "record has video or audio"),
        ("docvqa", {"label": False}, "answer is labelled as bad"),
        ("docvqa", {"weight": 0}, "filtered: record or turn is marked as not to be learned"),
    ],
)
def test_a_bad_record_has_one_reason(tmp_path, subset, change, reason):
    folder = write(tmp_path / subset, RAW_ROWS[subset] | change)

    assert outcomes(adapter("m3it", folder)) == [reason]


def test_a_row_without_an_image_field_is_bad(tmp_path):
    row = {"question": "What?", "answer": "Red."}

    assert outcomes(adapter("m3it", write(tmp_path / "science_qa", row))) == ["no image field"]


@pytest.mark.parametrize("subset", ["gqa", *RAW_ROWS])
@pytest.mark.parametrize("junk", [None, 7, True, [], {}, [None], "", "\ud83d", float("inf")])
def test_no_field_makes_more_than_a_skip(tmp_path, subset, junk):
    good = RAW_ROWS.get(subset, LOADER_ROW)
    rows = [good | {field: junk} for field in good] + [
        {name: good[name] for name in good if name != field} for field in good
    ]

    found = outcomes(adapter("m3it", write(tmp_path / subset, *rows)))

    assert len(found) == len(rows)
