"""LRV-Instruction, and images of Visual Genome by their id."""

import pytest
from helpers.adapters import DATA, adapter, outcomes, said, samples
from helpers.stores import encoded

from sft.core.errors import UserError
from sft.core.sample import SkipSample
from sft.data.datasets._visual_genome import image_of

HERE = DATA / "lrv_instruction"
GOOD = {"__from__": "filter_cap.json:1", "image_id": "501", "question": "Is it?", "answer": "No.", "task": "negative"}


def outcome(record: dict, **options) -> str | None:
    try:
        adapter("lrv_instruction", **options).to_sample(record)
    except SkipSample as skip:
        return f"filtered: {skip.reason}" if skip.filtered else skip.reason
    return None


def test_a_record_is_a_question_about_an_image_and_its_answer():
    caption = samples(adapter("lrv_instruction"))[2]
    assert said(caption) == [
        ("user", "<503.jpg>|Say in one line what happens."),
        ("assistant", "A boy paints a fence."),
    ]
    assert caption.key == "lrv_instruction/filter_cap.json:3"
    assert caption.images[0].source == HERE / "image" / "503.jpg"


def test_answers_about_what_is_not_there_are_kept():
    assert said(samples(adapter("lrv_instruction"))[0]) == [
        ("user", "<501.jpg>|Is there a purple teapot on the chair?"),
        ("assistant", "There is no mention of a teapot on the chair."),
    ]


def test_a_bare_list_is_read_like_one_under_annotations():
    (statement,) = samples(adapter("lrv_instruction", HERE / "without_coordinates.json"))
    assert said(statement)[0] == ("user", "<501.jpg>|You might notice a candle by the window.")


def test_records_with_coordinates_are_left_out_on_request():
    keys = [one.key[-1] for one in samples(adapter("lrv_instruction"))]
    assert keys == ["1", "2", "3"]
    kept_first, left_out, kept_last = outcomes(adapter("lrv_instruction", with_coordinates=False))
    assert left_out == "filtered: coordinates in the text"
    assert [kept_first.key[-1], kept_last.key[-1]] == ["1", "3"]


@pytest.mark.parametrize(
    ("text", "has_coordinates"),
    [
        ("at X:105 Y:350 Width:258 Height:258", True),
        ("(X: 10.5, Y: 3, Width: 25, Height: 8)", True),
        ("x=10,y=20", True),
        ("a box of width: 25, height: 8", True),
        ("Malcolm X: 7 letters", False),
        ("seat X 12, row Z 3", False),
        ("the width of the road", False),
    ],
)
def test_coordinates_are_told_from_other_text(text, has_coordinates):
    expected = "filtered: coordinates in the text" if has_coordinates else None
    assert outcome(GOOD | {"question": text}, with_coordinates=False) == expected
    assert outcome(GOOD | {"answer": text}, with_coordinates=False) == expected
    assert outcome(GOOD | {"answer": text}) is None


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (GOOD | {"question": " "}, "no question"),
        (GOOD | {"question": ["Is it?"]}, "no question"),
        ({"__from__": "evaluation_set.json:1", "image_id": "501", "question": "Is it?"}, "no answer"),
        (GOOD | {"answer": None}, "no answer"),
        (GOOD | {"image_id": "demo1.png"}, "image id is not a number"),
        (GOOD | {"image_id": "777"}, "image file missing"),
    ],
)
def test_a_bad_record_is_skipped_by_name(record, reason):
    assert outcome(record) == reason


@pytest.mark.parametrize("junk", [None, 7, [], {}, "", "\ud83d"])
@pytest.mark.parametrize("field", ["image_id", "question", "answer", "task"])
def test_no_field_breaks_the_adapter(field, junk):
    reason = outcome(GOOD | {field: junk}, with_coordinates=False)
    assert reason is None or not reason.startswith("filtered")


def test_a_folder_without_the_list_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no filter_cap\.json found; expected a list of LRV-Instruction"):
        adapter("lrv_instruction", tmp_path).files()


@pytest.mark.parametrize("empty", ["[]", '{"annotations": []}', '{"records": []}'])
def test_a_file_without_records_is_refused(tmp_path, empty):
    (tmp_path / "filter_cap.json").write_text(empty)
    with pytest.raises(UserError, match=r"no JSON list of records|there are no records"):
        outcomes(adapter("lrv_instruction", tmp_path))


# ------------------------------------------------------------------------------------------------- Visual Genome


@pytest.fixture
def visual_genome(tmp_path):
    """Image 1 in all three places, 2 in two of them, 3 in the folder itself."""
    for name in ("VG_100K/1", "VG_100K_2/1", "1", "VG_100K_2/2", "2", "3"):
        file = tmp_path / f"{name}.jpg"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(encoded("red", "JPEG"))
    return tmp_path


@pytest.mark.parametrize(("image_id", "found"), [(1, "VG_100K/1.jpg"), ("2", "VG_100K_2/2.jpg"), (3, "3.jpg")])
def test_an_image_is_looked_for_in_both_parts_and_then_in_the_folder(visual_genome, image_id, found):
    assert image_of(image_id, visual_genome).source == visual_genome / found


@pytest.mark.parametrize(
    "image_id", [None, True, 1.0, -1, "1.jpg", "../1", "1\n", "", "١", "1" * 13, ["1"], {}, "\ud83d"]
)
def test_what_is_no_number_is_no_image_id(visual_genome, image_id):
    with pytest.raises(SkipSample, match="image id is not a number"):
        image_of(image_id, visual_genome)


def test_an_image_that_is_nowhere_is_missing(visual_genome):
    with pytest.raises(SkipSample, match="image file missing") as skip:
        image_of(4, visual_genome)
    assert skip.value.detail == "4.jpg"


def test_an_image_that_links_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(encoded("red", "JPEG"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "5.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(SkipSample, match="image path leaves the folder"):
        image_of(5, tmp_path / "images")
