"""LLaVA-Instruct: its lists, its image marker and its untidy turns."""

import json
import shutil

import pytest
from helpers.adapters import DATA, adapter, outcomes, said, samples

from sft.core.errors import UserError
from sft.core.sample import Sample, SkipSample
from sft.data.formats.json_text import read_json_list

HERE = DATA / "llava_instruct"
MIX = HERE / "llava_v1_5_mix665k.json"
IMAGE = "000000000102.jpg"
GOOD = {"__from__": "list.json:1", "id": "7", "image": IMAGE}
GOOD["conversations"] = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A kite."}]


def talk(*turns: tuple[str, object], **fields) -> dict:
    """A record with these turns."""
    return GOOD | {"conversations": [{"from": role, "value": text} for role, text in turns]} | fields


def outcome(record: dict) -> list[tuple[str, str]] | str:
    try:
        return said(adapter("llava_instruct").to_sample(record))
    except SkipSample as skip:
        assert not skip.filtered
        return skip.reason


def test_a_folder_with_the_three_parts_is_read_as_all_three():
    of = adapter("llava_instruct")
    assert [file.name for file in of.files()] == [
        "conversation_58k.json",
        "detail_23k.json",
        "complex_reasoning_77k.json",
    ]
    assert len(samples(of)) == 4


def test_a_folder_with_the_merged_list_is_read_as_that_alone(tmp_path):
    for name in ("conversation_58k.json", "detail_23k.json", "complex_reasoning_77k.json"):
        shutil.copy(HERE / name, tmp_path)
    shutil.copy(HERE / "detail_23k.json", tmp_path / "llava_instruct_150k.json")
    assert [file.name for file in adapter("llava_instruct", tmp_path).files()] == ["llava_instruct_150k.json"]


def test_a_folder_that_lacks_a_part_is_refused(tmp_path):
    shutil.copy(HERE / "conversation_58k.json", tmp_path)
    with pytest.raises(UserError, match=r"detail_23k\.json: file not found; expected llava_instruct_150k\.json or all"):
        adapter("llava_instruct", tmp_path).files()


def test_the_marker_becomes_the_image_before_or_after_the_question():
    before, after, *_ = samples(adapter("llava_instruct"))
    assert said(before)[0] == ("user", "<000000000101.jpg>|What stands on the red carpet?")
    assert said(before)[1:] == [
        ("assistant", "A small wooden stool."),
        ("user", "How many legs does it have?"),
        ("assistant", "It has three legs."),
    ]
    assert said(after) == [
        ("user", "Which colour is the kite?|<000000000102.jpg>"),
        ("assistant", "The kite is green."),
    ]


def test_a_marker_in_a_later_turn_puts_the_image_there():
    assert said(samples(adapter("llava_instruct", MIX))[1]) == [
        ("user", "What is on the shelf?"),
        ("assistant", "A row of jars."),
        ("user", "Now look at it again.|<2305.jpg>"),
        ("assistant", "Jars, and one lid."),
    ]


def test_an_image_without_a_marker_comes_first():
    assert outcome(talk(("human", "What is it?"), ("gpt", "A kite."))) == [
        ("user", f"<{IMAGE}>|What is it?"),
        ("assistant", "A kite."),
    ]


def test_an_image_without_a_marker_stays_when_an_answer_before_it_is_dropped():
    turns = ("gpt", "Hello."), ("human", "What is it?"), ("gpt", "A kite.")
    assert outcome(talk(*turns)) == [("user", f"<{IMAGE}>|What is it?"), ("assistant", "A kite.")]


def test_a_marker_amid_the_text_splits_it():
    record = talk(("human", "In <image> what is red?"), ("gpt", "The kite."))
    assert outcome(record) == [("user", f"In|<{IMAGE}>|what is red?"), ("assistant", "The kite.")]


@pytest.mark.parametrize(
    ("images", "question", "shown"),
    [
        ([IMAGE], "<image>\nWhat?", f"<{IMAGE}>|What?"),
        ([IMAGE, "000000000101.jpg"], "<image>\n<image>\nWhat?", f"<{IMAGE}>|<000000000101.jpg>|What?"),
        ([IMAGE, "000000000101.jpg"], "What?", f"<{IMAGE}>|<000000000101.jpg>|What?"),
        ("", "What?", "What?"),
        ([], "What?", "What?"),
    ],
)
def test_several_images_stand_where_their_markers_do(images, question, shown):
    assert outcome(talk(("human", question), ("gpt", "A kite."), image=images))[0] == ("user", shown)


@pytest.mark.parametrize("beside", [True, False])
def test_a_system_text_comes_first(beside):
    turns = [("human", "<image>What is it?"), ("gpt", "A kite.")]
    record = talk(*turns, system="Be brief.") if beside else talk(("system", "Be brief."), *turns)
    assert outcome(record)[:2] == [("system", "Be brief."), ("user", f"<{IMAGE}>|What is it?")]


def test_a_question_may_be_the_image_alone():
    assert outcome(talk(("human", "<image>"), ("gpt", "A kite.")))[0] == ("user", f"<{IMAGE}>")


def test_records_without_an_image_are_conversations_in_text():
    of = adapter("llava_instruct", MIX)
    assert said(samples(of)[2]) == [
        ("user", "Name a prime number."),
        ("assistant", "Seven."),
        ("user", "Another one?"),
        ("assistant", "Eleven."),
    ]
    assert not samples(of)[2].images


def test_a_last_question_without_an_answer_is_dropped():
    assert said(samples(adapter("llava_instruct", MIX))[3]) == [("user", "Name a tree."), ("assistant", "The elm.")]


def test_an_empty_last_question_is_dropped_too():
    assert len(outcome(talk(("human", "What?"), ("gpt", "A kite."), ("human", "")))) == 2


def test_a_leading_answer_is_dropped():
    assert said(samples(adapter("llava_instruct", MIX))[4]) == [("user", "Say it once more."), ("assistant", "Gladly.")]


@pytest.mark.parametrize("empty", ["", " \n", None])
def test_an_empty_system_text_is_none(empty):
    turns = [("system", empty), ("human", "<image>\nWhat is it?"), ("gpt", "A kite.")]
    assert outcome(talk(*turns)) == [("user", f"<{IMAGE}>|What is it?"), ("assistant", "A kite.")]


def test_keys_differ_where_ids_do_not():
    of = adapter("llava_instruct")
    first, _, detail, _ = samples(of)
    assert first.images == detail.images
    assert first.key == "llava_instruct/conversation_58k.json:1"
    assert detail.key == "llava_instruct/detail_23k.json:1"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("000000000101.jpg", "train2017/000000000101.jpg"),
        ("000000000102.jpg", "000000000102.jpg"),
        ("000000000104.jpg", "coco/train2017/000000000104.jpg"),
        ("coco/train2017/000000000104.jpg", "coco/train2017/000000000104.jpg"),
        ("vg/VG_100K/2305.jpg", "vg/VG_100K/2305.jpg"),
        ("000000000103.jpg", "000000000103.jpg"),  # is nowhere
        ("long" * 100, "long" * 100),
    ],
)
def test_images_are_found_by_bare_names_and_by_those_of_the_mix(name, found):
    assert adapter("llava_instruct").to_sample(GOOD | {"image": name}).images[0].source == HERE / found


def test_the_image_folder_is_relative_to_the_data_or_absolute():
    for path in (HERE, MIX):
        for folder in ("train2017", str(HERE / "train2017")):
            of = adapter("llava_instruct", path, image_folder=folder)
            assert of.to_sample(GOOD | {"image": "000000000101.jpg"}).images[0].source.is_file()


LAST = "last message is not the assistant's"
ALTERNATE = "user and assistant do not alternate"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (talk(("human", "<image>\n<image>\nWhat?"), ("gpt", "A kite.")), "markers and images differ in number"),
        (
            talk(("human", "<image> What?"), ("gpt", "Hm."), ("human", "<image>"), ("gpt", "A kite.")),
            "markers and images differ in number",
        ),
        (talk(("human", "<image> What?"), ("gpt", "A kite."), image=None), "image marker without an image"),
        (talk(("human", "What?"), ("gpt", "<image> A kite.")), "image marker in an answer"),
        (talk(("human", "What?"), ("human", "What?"), ("gpt", "A kite.")), ALTERNATE),
        (talk(("human", "What?"), ("gpt", "A"), ("gpt", "kite.")), ALTERNATE),
        (talk(("gpt", "Hello."), ("gpt", "A kite."), ("human", "What?")), ALTERNATE),
        (talk(("human", "What?"), ("gpt", "A kite."), ("human", "Why?"), ("human", "Why?")), LAST),
        (talk((None, "What?"), ("gpt", "A kite.")), "unknown role"),
        (talk(([], "What?"), ("gpt", "A kite.")), "unknown role"),
        (talk(("human", None), ("gpt", "A kite.")), "empty message"),
        (talk(("human", "What?"), ("gpt", 7)), "content is neither text nor a list of parts"),
        (talk(("human", "What?"), ("gpt", " \n")), "empty message"),
        (talk(("human", " "), ("gpt", "Seven."), image=None), "empty message"),
        (talk(("human", "What?")), "no question with an answer"),
        (talk(("gpt", "A kite.")), "no question with an answer"),
        (GOOD | {"conversations": []}, "no question with an answer"),
        (GOOD | {"conversations": ["What?"]}, "unknown role"),
        (GOOD | {"conversations": {}}, "no messages"),
        ({"__from__": "list.json:1", "id": 7}, "no messages"),
        (GOOD | {"image": [["a.jpg"]]}, "image is not a local path"),
        (GOOD | {"image": "\ud83d.jpg"}, "image is not a local path"),
        (GOOD | {"image": "https://example.org/a.jpg"}, "image is not a local path"),
        (GOOD | {"image": "../a.jpg"}, "image path leaves the folder"),
    ],
)
def test_a_bad_record_is_skipped_by_name(record, reason):
    assert outcome(record) == reason


@pytest.mark.parametrize("junk", [None, 7, [], {}, "", "\ud83d"])
@pytest.mark.parametrize("field", ["id", "image", "conversations", "from", "value"])
def test_no_field_breaks_the_adapter(field, junk):
    first, second = GOOD["conversations"]
    junked = GOOD | {field: junk} if field in GOOD else GOOD | {"conversations": [first | {field: junk}, second]}
    assert outcome(junked)


def test_a_list_that_is_cut_off_is_refused_after_its_last_whole_record(tmp_path):
    file = tmp_path / "cut.json"
    file.write_text(json.dumps([GOOD, GOOD])[:-40])
    with pytest.raises(UserError, match="not readable as JSON after record 1"):
        outcomes(adapter("llava_instruct", file))


def test_every_fixture_becomes_a_sample():
    assert all(isinstance(one, Sample) for one in outcomes(adapter("llava_instruct", MIX)))
    assert len(list(read_json_list(MIX))) == 5
