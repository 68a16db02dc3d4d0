"""LLaVAR: only its own records of a list that repeats LLaVA-Instruct."""

import json

import pytest
from helpers.adapters import DATA, adapter, outcomes, said, samples

from sft.core.errors import UserError
from sft.core.sample import Sample, SkipSample
from sft.data.formats.json_text import read_json_list

HERE = DATA / "llavar"
PUBLISHED, OWN = HERE / "llava_instruct_150k_llavar_16k.json", HERE / "own_records.json"
GOOD = next(read_json_list(OWN))
LLAVA = "filtered: record of LLaVA-Instruct"


def numbered(path, num_records: int):
    """A list of so many records, its images named by their places."""
    path.write_text(json.dumps([{**GOOD, "image": f"{number}.jpg"} for number in range(num_records)]))
    return path


def test_the_records_of_llava_at_its_beginning_are_left_out():
    assert [one if isinstance(one, str) else one.key for one in outcomes(adapter("llavar", own_records=2))] == [
        LLAVA,
        LLAVA,
        LLAVA,
        "llavar/llava_instruct_150k_llavar_16k.json:4",
        "llavar/llava_instruct_150k_llavar_16k.json:5",
    ]


@pytest.mark.parametrize(("size", "num_own"), [("16k", 15_500), ("20k", 19_800)])
def test_a_published_list_has_a_known_number_of_own_records(tmp_path, size, num_own):
    numbered(tmp_path / f"llava_instruct_150k_llavar_{size}.json", num_own + 3)
    of = adapter("llavar", tmp_path)
    (file,) = of.files()
    rows = list(of.rows(file))
    assert [row.reason for row in rows if isinstance(row, SkipSample)] == ["record of LLaVA-Instruct"] * 3
    assert [row["image"] for row in rows[3:]] == [f"{number}.jpg" for number in range(3, num_own + 3)]


def test_a_list_of_another_name_is_taken_whole():
    assert all(isinstance(one, Sample) for one in outcomes(adapter("llavar", OWN)))
    assert len(samples(adapter("llavar", OWN))) == 2


def test_a_list_with_fewer_records_than_its_name_promises_is_taken_whole(tmp_path):
    numbered(tmp_path / "llava_instruct_150k_llavar_16k.json", 4)
    assert len(samples(adapter("llavar", tmp_path))) == 4


def test_a_folder_with_both_lists_is_read_as_the_one_that_idefics_was_trained_on(tmp_path):
    for size in ("20k", "16k"):
        numbered(tmp_path / f"llava_instruct_150k_llavar_{size}.json", 1)
    assert [file.name for file in adapter("llavar", tmp_path).files()] == ["llava_instruct_150k_llavar_16k.json"]


def test_a_folder_without_them_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected a list of LLaVAR"):
        adapter("llavar", tmp_path).files()


def test_conversations_are_those_of_llava_with_images_from_finetune():
    title, book = samples(adapter("llavar", own_records=2))
    assert said(title) == [
        ("user", "<1000000000001.jpg>|What is the title on the poster?"),
        ("assistant", "Night of the Lanterns"),
    ]
    assert said(book) == [
        ("user", "Who wrote the book?|<1000000000002.jpg>"),
        ("assistant", "A. Nobody"),
        ("user", "What is its subtitle?"),
        ("assistant", "A Short Walk"),
    ]
    assert [image.source.parent for image in title.images + book.images] == [HERE / "finetune"] * 2


def test_the_image_folder_may_be_another_one():
    of = adapter("llavar", OWN, image_folder=str(HERE / "elsewhere"))
    assert of.to_sample(GOOD).images[0].source == HERE / "elsewhere" / "1000000000001.jpg"


@pytest.mark.parametrize("junk", [None, 7, [], {}, "", "\ud83d"])
@pytest.mark.parametrize(
    ("field", "reasons"),
    [
        ("id", {None}),
        ("image", {"image is not a local path"}),
        ("conversations", {"no messages", "no question with an answer"}),
    ],
)
def test_no_field_breaks_the_adapter(field, reasons, junk):
    try:
        adapter("llavar").to_sample(GOOD | {field: junk})
        assert reasons == {None}
    except SkipSample as skip:
        assert skip.reason in reasons
