"""SVIT: one image, many conversations; held-out images, error texts and boxes."""

import json
import shutil

import pytest
from helpers.adapters import DATA, adapter, outcomes, said, samples

from sft.core.errors import UserError
from sft.core.sample import Sample

SVIT = DATA / "svit"
CORE = SVIT / "format" / "llava-v1.5" / "SVIT_core_150K.json"
TURNS = [{"from": "user", "value": "Why?"}, {"from": "gpt", "value": "So."}]
GOOD = {"image_id": 7, "conversations": [{"topic": "A kite", "content": TURNS}]}


def of_tasks(*tasks, **options):
    return outcomes(adapter("svit", tasks=list(tasks), **options))


def outcome_of(tmp_path, record, task="conversation"):
    """What becomes of a record with one conversation, its images being those of the fixture."""
    (tmp_path / f"{task}.json").write_text(json.dumps([record]))
    (outcome,) = outcomes(adapter("svit", tmp_path, tasks=[task], image_folder=str(SVIT)))
    return outcome


def outcome_of_turns(tmp_path, *turns, task="conversation"):
    content = [{"from": said_by, "value": value} for said_by, value in turns]
    return outcome_of(tmp_path, {"image_id": 7, "conversations": [{"content": content}]}, task)


# ----------------------------------------------------------------------------------------------- conversations


def test_each_conversation_is_a_sample_with_the_image_before_its_first_question():
    kite, weather, bread = of_tasks("conversation")
    assert said(kite) == [
        ("user", "<7.jpg>|What flies there?"),
        ("assistant", "A kite."),
        ("user", "Who holds it?"),
        ("assistant", "A boy on the hill."),
    ]
    assert said(weather) == [("user", "<7.jpg>|Is it windy?"), ("assistant", "Yes, the trees bend.")]
    assert said(bread) == [("user", "<21.jpg>|What is on the board?"), ("assistant", "Two loaves.")]


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"audio": "a.wav"}, "record has video or audio"),
        ({"weight": 0}, "filtered: record or turn is marked as not to be learned"),
    ],
)
def test_the_keys_of_one_conversation_are_judged_too(tmp_path, extra, reason):
    assert outcome_of(tmp_path, {"image_id": 7, "conversations": [{"content": TURNS, **extra}]}) == reason


def test_the_second_folder_of_visual_genome_is_looked_into_for_ids_of_either_kind():
    assert of_tasks("conversation")[2].images[0].source == SVIT / "VG_100K_2" / "21.jpg"


def test_keys_tell_record_image_and_conversation():
    keys = [sample.key for sample in samples(adapter("svit"))]
    assert keys[:3] == [f"svit/conversation.json:{place}" for place in ("1/7/0", "1/7/1", "2/21/0")]
    assert len(set(keys)) == len(keys)


def test_a_question_with_its_answer_may_be_a_sample():
    *asked, unanswered = of_tasks("conversation", unit="question")
    assert [said(sample)[0][1] for sample in asked] == [
        "<7.jpg>|What flies there?",
        "<7.jpg>|Who holds it?",
        "<7.jpg>|Is it windy?",
        "<21.jpg>|What is on the board?",
    ]
    assert asked[1].key == "svit/conversation.json:1/7/0/1"
    assert unanswered == "no question with an answer"


def test_conversation_and_reasoning_are_read_by_default():
    assert [file.name for file in adapter("svit").files()] == ["conversation.json", "complex_reasoning.json"]


def test_files_may_lie_in_the_folder_itself_or_be_the_path():
    in_folder = adapter("svit", SVIT / "data", image_folder="..")
    named = adapter("svit", SVIT / "data" / "conversation.json", image_folder="..")
    assert len(samples(in_folder)) == len(samples(adapter("svit")))
    assert samples(named) == samples(in_folder)[:3]


def test_a_missing_task_is_told(tmp_path):
    with pytest.raises(UserError, match=r"no data/referring_qa.json or referring_qa.json found"):
        adapter("svit", tmp_path, tasks=["referring_qa"]).files()


def test_an_unknown_task_is_told():
    with pytest.raises(UserError, match="option tasks"):
        adapter("svit", tasks=["captions"])


# ------------------------------------------------------------------------------------------------- left out


@pytest.mark.parametrize("place", ["data/test_image_ids.txt", "test_image_ids.txt"])
def test_held_out_images_are_left_out_unless_asked_for(tmp_path, place):
    shutil.copytree(SVIT, tmp_path, dirs_exist_ok=True)
    (tmp_path / place).write_text("7\n1234567\n")
    *held_out, bread = outcomes(adapter("svit", tmp_path, tasks=["conversation"]))
    assert held_out == ["filtered: held-out test image"] * 2
    assert isinstance(bread, Sample)
    assert len(samples(adapter("svit", tmp_path, tasks=["conversation"], keep_held_out=True))) == 3


@pytest.mark.parametrize("content", ["", "<!DOCTYPE html>"])
def test_a_list_of_held_out_images_that_is_none_is_told(tmp_path, content):
    (tmp_path / "test_image_ids.txt").write_text(content)
    with pytest.raises(UserError, match="expected an image id a line"):
        outcome_of(tmp_path, GOOD)


def test_error_texts_are_left_out():
    kite, error = of_tasks("detail_description")
    assert said(kite)[1] == ("assistant", "A boy flies a kite from a hill.")
    assert error == "filtered: error text for an answer"


# ------------------------------------------------------------------------------------------------------- boxes


def test_sound_boxes_stay_in_the_text():
    sound, malformed = of_tasks("referring_qa")
    assert said(sound)[0] == ("user", "<21.jpg>|What is <st>this<ed> [0.1, 0.2, 0.5, 0.8]?")
    assert malformed == "malformed box"


@pytest.mark.parametrize(
    "answer",
    [
        "<st>It<ed> [0.1, 0.2, 0.3]",
        "<st>It<ed> [0.1, 0.2, 0.3, 0.4, 0.5]",
        "<st>It<ed> [0.1, 0.2, 0.3, 1.4]",
        "<st>It<ed> [-0.1, 0.2, 0.3, 0.4]",
        "<st>It<ed> [0.3, 0.2, 0.3, 0.4]",
        "<st>It<ed> [0.1, 0.2, 0.3, nan]",
        "<st>It<ed> [0.1, 0.2, 0..3, 0.4]",
        "<st>It<ed> [x1, y1, x2, y2]",
        "<st>It<ed> [0.1, 0.2, 0.3, 0.4",
        "<st>It<ed> []",
        "<st>It [0.1, 0.2, 0.3, 0.4]",
        "It<ed> [0.1, 0.2, 0.3, 0.4]",
    ],
)
def test_boxes_are_checked_in_answers_too_but_only_where_they_are_published(tmp_path, answer):
    turns = ("user", "What?"), ("gpt", answer)
    assert outcome_of_turns(tmp_path, *turns, task="referring_qa") == "malformed box"
    assert isinstance(outcome_of_turns(tmp_path, *turns, task="conversation"), Sample)


# ------------------------------------------------------------------------------------------------- bad records


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "no question with an answer"),
        ([("user", "Why?")], "no question with an answer"),
        ([("user", "Why?"), ("user", "Why?")], "no question with an answer"),
        ([("user", "Why?"), ("narrator", "So.")], "unknown role"),
        ([("user", "Why?"), (None, "So.")], "unknown role"),
        ([("user", "Why?"), ("gpt", None)], "empty message"),
        ([("user", "Why?"), ("gpt", " ")], "empty message"),
        ([("user", " "), ("gpt", "So.")], "empty message"),
    ],
)
def test_bad_turns_have_one_reason_each(tmp_path, turns, reason):
    assert outcome_of_turns(tmp_path, *turns) == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_id": None}, "image id is not a number"),
        ({"image_id": "../7"}, "image id is not a number"),
        ({"image_id": 404}, "image file missing"),
        ({"conversations": None}, "no conversations"),
        ({"conversations": []}, "no conversations"),
        ({"conversations": ["Why?"]}, "no messages"),
        ({"conversations": [{"topic": "A kite"}]}, "no messages"),
    ],
)
def test_bad_records_have_one_reason_each(tmp_path, change, reason):
    assert outcome_of(tmp_path, GOOD | change) == reason


def test_llavas_name_of_the_user_is_known(tmp_path):
    assert isinstance(outcome_of_turns(tmp_path, ("human", "Why?"), ("gpt", "So.")), Sample)


VALUES = [None, 7, [], {}, "", "\ud83d", [None], [{}], [{"content": [None]}], [{"content": [{"from": []}]}]]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("field", ["image_id", "conversations", "id", "image", "turns", "held_out", "task"])
@pytest.mark.parametrize("unit", ["conversation", "question"])
def test_no_value_of_a_field_is_an_error(tmp_path, field, value, unit):
    core = json.loads(CORE.read_text())[0]
    (tmp_path / "some.json").write_text(json.dumps([GOOD | {field: value}, core | {field: value}]))
    assert outcomes(adapter("svit", tmp_path / "some.json", unit=unit, image_folder=str(SVIT)))


# ------------------------------------------------------------------------------------------------ LLaVA's form


def test_the_core_is_read_in_llavas_form():
    bread, cheese = samples(adapter("svit", CORE, image_folder="../.."))
    assert said(bread) == [("user", "What is baked?|<21.jpg>"), ("assistant", "Bread.")]
    assert said(cheese) == [("user", "Name a cheese."), ("assistant", "Brie.")]
    assert bread.key == "svit/SVIT_core_150K.json:1"
