"""UltraChat: roles by place, and the filtered copy where they are named."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.adapters import DATA, adapter, outcomes, said, samples

from sft.core.errors import UserError

BASIL, RIVER, *_, PART_1 = samples(adapter("ultrachat"))
TALK = [{"content": "Hello.", "role": "user"}, {"content": "Good day.", "role": "assistant"}]
SPLITS_200K = ["train_sft", "test_sft", "train_gen", "test_gen"]


def outcome_of(tmp_path, record):
    (tmp_path / "train_0.jsonl").write_text(json.dumps(record) + "\n")
    (outcome,) = outcomes(adapter("ultrachat", tmp_path))
    return outcome


def write_200k(folder, *parts, messages=TALK):
    folder.mkdir(exist_ok=True)
    for part in parts:
        row = {"prompt": "Hello.", "prompt_id": "f00", "messages": messages}
        pq.write_table(pa.Table.from_pylist([row]), folder / f"{part}.parquet")


def test_user_and_assistant_take_turns_from_the_first_text_on():
    assert said(BASIL) == [
        ("user", "How do I keep basil alive?"),
        ("assistant", "Water it when the soil is dry."),
        ("user", "And in winter?"),
        ("assistant", "Put it on a sunny sill."),
    ]


def test_a_last_question_without_answer_is_dropped():
    assert said(RIVER) == [("user", "Name a river."), ("assistant", "The Elbe.")]


def test_an_empty_last_question_is_dropped_before_texts_are_checked(tmp_path):
    assert len(outcome_of(tmp_path, {"data": ["Hello.", "Good day.", ""]}).messages) == 2


def test_a_long_dialogue_stays_whole(tmp_path):
    assert len(outcome_of(tmp_path, {"data": ["word " * 1000] * 40}).messages) == 40


def test_bad_dialogues_have_one_reason_each():
    assert outcomes(adapter("ultrachat"))[2:-1] == [
        "no question with an answer",
        "empty message",
        "no question with an answer",
        "dialogue is not a list",
        "dialogue is not a list",
        "message is not text",
        "line is not JSON",
    ]


def test_keys_differ_where_ids_do_not():
    assert BASIL.key == "ultrachat/train_0.jsonl:1"
    assert PART_1.key == "ultrachat/train_1.jsonl:1"


@pytest.mark.parametrize("value", [None, 7, [], {}, "", "\ud83d", [None], [[]], ["a", {}], ["a", None]])
@pytest.mark.parametrize("field", ["id", "data", "messages"])
def test_no_value_of_a_field_is_an_error(tmp_path, field, value):
    outcome_of(tmp_path, {"id": "0", "data": ["Hello.", "Good day."]} | {field: value})


# ------------------------------------------------------------------------------------------------------- parts


def part_numbers(folder, *numbers):
    for number in numbers:
        shutil.copy(DATA / "ultrachat" / "train_1.jsonl", folder / f"train_{number}.jsonl")
    return [file.name for file in adapter("ultrachat", folder).files()]


def test_the_first_part_alone_is_enough(tmp_path):
    assert part_numbers(tmp_path, 0) == ["train_0.jsonl"]


def test_ten_parts_are_read_in_order(tmp_path):
    assert part_numbers(tmp_path, *range(9, -1, -1)) == [f"train_{number}.jsonl" for number in range(10)]


@pytest.mark.parametrize("numbers", [(0, 1, 3), (1, 2)])
def test_a_gap_between_parts_is_told(tmp_path, numbers):
    with pytest.raises(UserError, match=f"has parts {', '.join(map(str, numbers))}; expected 0, 1, 2"):
        part_numbers(tmp_path, *numbers)


def test_any_one_part_may_be_named(tmp_path):
    part_numbers(tmp_path, 0, 1)
    assert adapter("ultrachat", tmp_path / "train_1.jsonl").files() == [tmp_path / "train_1.jsonl"]


def test_a_folder_without_parts_is_told(tmp_path):
    with pytest.raises(UserError, match="expected parts of UltraChat"):
        adapter("ultrachat", tmp_path).files()


# ---------------------------------------------------------------------------------------------- ultrachat_200k


def test_named_roles_are_read_from_parquet(tmp_path):
    write_200k(tmp_path / "data", "train_sft-00000-of-00002-a1", "train_sft-00001-of-00002-b2")
    first, second = samples(adapter("ultrachat", tmp_path))
    assert said(first) == [("user", "Hello."), ("assistant", "Good day.")]
    assert second.key == "ultrachat/train_sft-00001-of-00002-b2.parquet:1"


@pytest.mark.parametrize("split", SPLITS_200K)
def test_other_splits_have_the_names_of_the_hub(tmp_path, split):
    write_200k(tmp_path / "data", *(f"{each}-00000-of-00001-a1" for each in SPLITS_200K))
    (file,) = adapter("ultrachat", tmp_path, split).files()
    assert file.name == f"{split}-00000-of-00001-a1.parquet"


def test_two_revisions_of_a_part_are_not_read_twice(tmp_path):
    write_200k(tmp_path, "train_sft-00000-of-00001-a1", "train_sft-00000-of-00001-b2")
    with pytest.raises(UserError, match="has parts 0, 0"):
        adapter("ultrachat", tmp_path).files()


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "dialogue is not a list"),
        ("Hello.", "dialogue is not a list"),
        (["Hello."], "dialogue is not a list"),
        ([], "no question with an answer"),
        (TALK[::-1], "turns do not alternate"),
        ([{"role": "system", "content": "Be brief."}, *TALK], "turns do not alternate"),
        ([TALK[0], {"role": "assistant", "content": None}], "message is not text"),
        ([TALK[0], {"role": "assistant", "content": "\n"}], "empty message"),
    ],
)
def test_bad_messages_have_one_reason_each(tmp_path, messages, reason):
    assert outcome_of(tmp_path, {"prompt": "Hello.", "messages": messages}) == reason
