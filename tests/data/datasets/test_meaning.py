"""Keys that change what a record means, and keys that are not read, in every adapter of conversations."""

import json
from importlib import import_module

import pytest
from helpers.adapters import adapter, outcomes

from sft.core.sample import Sample, SkipSample
from sft.data.datasets import adapter_names

VIDEO, TOOLS = "record has video or audio", "record has tools or calls"
PREFERENCES, BAD, BOXES = "record is of preferences", "answer is labelled as bad", "record has boxes"
NOT_LEARNED = "filtered: record or turn is marked as not to be learned"
CHANGING = [
    *[({key: "a.mp4"}, VIDEO) for key in ("video", "Audios", "video_path", "video_bytes", "wav_path")],
    *[({key: [{"name": "f"}]}, TOOLS) for key in ("tools", "tool", "tool_calls", "functions", "function_call")],
    *[({key: "No."}, PREFERENCES) for key in ("rejected", "chosen", "response_rejected", "reject")],
    *[({key: value}, BAD) for key, value in (("label", False), ("kto_tag", 0), ("label", "no"), ("desirable", "-1"))],
    *[({key: [[1, 2, 3, 4]]}, BOXES) for key in ("objects", "bbox", "bboxes")],
    *[({"weight": value}, NOT_LEARNED) for value in (0, "0.00", "off")],
    (
        {"audio": False, "video": 0, "tools": "none", "videos": [[]], "object": "chat.completion", "function": "vqa"},
        None,
    ),
    ({"label": True, "videos": [], "tools": "[]", "objects": {"bbox": []}, "train": True}, None),
]
RECORDS = {
    "messages": {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]},
    "llava_instruct": {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]},
    "ultrachat": {"data": ["Hi.", "Hello."]},
    "svit": {"id": 1, "conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]},
    "m3it": {"instruction": "Say.", "inputs": "Hi.", "outputs": "Hello.", "image": None, "__subset__": "science-qa"},
}
AT = {"__from__": "train.jsonl:1", "__key__": "m3it/1"}


def outcome(name: str, record: dict) -> str | None:
    """Why a record is left out, by the adapter of this name; None where it is read."""
    of = adapter(name)
    of.rows, of.files = lambda file: [record | AT], lambda: [None]
    (found,) = outcomes(of)
    return None if isinstance(found, Sample) else found


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize(("extra", "reason"), CHANGING)
def test_a_key_that_changes_the_meaning_is_a_reason_in_every_adapter_of_conversations(name, extra, reason):
    assert outcome(name, RECORDS[name] | extra) == reason


TURN = {"role": "assistant", "content": "Hello."}


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (TURN | {"tool_calls": [{}]}, TOOLS),
        (TURN | {"role": "tool"}, TOOLS),
        (TURN | {"images": ["0.png"]}, "turn has images"),
        (TURN | {"role": "function"}, TOOLS),
        (TURN | {"role": "observation"}, TOOLS),
        (TURN | {"label": False}, BAD),
        (TURN | {"content": [{"type": "video", "video": "a.mp4"}]}, VIDEO),
        (TURN | {"content": [{"type": "input_audio"}]}, VIDEO),
        (TURN | {"content": [{"type": "text", "text": "Hello.", "audios": ["a.wav"]}]}, VIDEO),
        (TURN | {"content": [{"type": "text", "text": "Hello.", "video": None}]}, None),
    ],
)
def test_turns_and_parts_are_looked_at_too(turn, reason):
    assert outcome("messages", {"messages": [{"role": "user", "content": "Hi."}, turn]}) == reason


PLACEHOLDER = "placeholder of an image that is not read"
OTHERS = (
    "<start_of_image>",
    "[IMG]",
    "<image/>",
    "</image>",
    "<Img>",
    "![](1.png)",
    "<|image_1|>",
    "<image_0>",
    "<image1>",
)


@pytest.mark.parametrize(
    ("said", "extra", "reason"),
    [
        ("<video>What?", {"videos": []}, VIDEO),
        ("<bbox>?", {"objects": {}}, BOXES),
        ("What is <video> in HTML?", {}, None),
        ("<video>v.mp4</video>What?", {}, VIDEO),
        ("<|audio|>What?", {"__images__": True}, VIDEO),
        ("<|box_start|>?", {"__images__": True}, BOXES),
        *[(f"{mark}What?", {"__images__": True}, PLACEHOLDER) for mark in OTHERS],
        *[(f"{mark}What?", {"image": ""}, PLACEHOLDER) for mark in OTHERS],
        *[(f"{mark}What?", {}, None) for mark in OTHERS],
    ],
)
def test_a_marker_beside_an_empty_key_stands_for_what_is_lost(said, extra, reason):
    assert outcome("messages", {"messages": [{"role": "user", "content": said}, TURN], **extra}) == reason


@pytest.mark.parametrize("mark", ["<image>", "<|image_1|>", "[IMG]"])
def test_a_placeholder_in_a_file_without_images_is_counted(mark):
    of = adapter("messages")
    row = {"messages": [{"role": "user", "content": f"{mark}Hm?"}, TURN]} | AT
    assert list(of.not_read(row, of.to_sample(row))) == [(f"{mark.replace('1', '0')} as text", f"{mark}Hm?")]


@pytest.mark.parametrize("name", ["lrv_instruction", "ultrachat"])
def test_a_placeholder_beside_an_image_is_a_reason_where_texts_have_no_markers(name, tmp_path, monkeypatch):
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "1.jpg").touch()
    row = {"image_id": 1, "question": "<image>Hm?", "answer": "A.", "data": ["<image>Hm?", "A."], "image": "a.png"}
    with pytest.raises(SkipSample, match=PLACEHOLDER):
        adapter(name, tmp_path).to_sample(row | AT)


FLAGS = [
    ("train", "no"),
    ("loss", "off"),
    ("weight", "0.00"),
    ("weight", 0),
    ("loss", False),
    ("loss_weight", 0.0),
    ("train", "false"),
    ("loss_scale", 0),
]


@pytest.mark.parametrize(("key", "no"), FLAGS)
@pytest.mark.parametrize("name", ["messages", "llava_instruct"])
def test_a_turn_that_is_marked_is_not_learned(name, key, no):
    first, second = next(iter(RECORDS[name].values()))
    holder = next(iter(RECORDS[name]))
    sample = adapter(name).to_sample({holder: [first, second | {key: no}, first, second | {key: 1}]} | AT)
    assert [message.is_trained for message in sample.messages] == [True, False, True, True]
    assert outcome(name, {holder: [first, second | {key: no}]}) == "filtered: no answer is to be learned"


def test_a_marked_turn_leaves_the_record_out_where_turns_have_no_marks():
    turns = [{"role": "user", "content": "Hi."}, TURN | {"weight": 0}]
    assert outcome("ultrachat", {"messages": turns}) == NOT_LEARNED


def test_what_is_not_read_is_named_by_its_place():
    text = {"type": "text", "text": "Hi.", "cache": 1}
    record = {
        "id": 7,
        "label": True,
        "images": [],
        "mood": "",
        "query": "Hi.",
        "messages": [{"role": "user", "content": [text]}, TURN | {"weight": "0.5"}],
    }
    assert dict(adapter("messages").not_read(record | AT)) == {
        "label": True,
        "query": "Hi.",
        "parts: cache": 1,
        "turns: weight other than 0 and 1": "0.5",
    }
    assert not dict(adapter("messages").not_read({"query": "Hi.", "response": "Hello."} | AT))


def test_an_image_that_a_record_lacks_beside_others_is_counted(tmp_path):
    rows = [{"image": image, "query": "Hi."} for image in ("", "0.png", "", None, [], "1.png")] + [{"query": "Hi."}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    of = adapter("messages", tmp_path)
    counted = [list(dict(of.not_read(row))) for row in of.rows(tmp_path / "train.jsonl")]
    assert counted == [["empty image"], [], ["empty image"], ["empty image"], ["empty image"], [], []]


def test_an_option_names_what_is_read(tmp_path):
    of = adapter("messages", tmp_path, columns={"user": "asked"})
    assert [key for key, _ in of.not_read({"asked": "Hi.", "heard": "Ho."})] == ["heard"]
    (tmp_path / "video").mkdir()
    with pytest.raises(SkipSample, match=VIDEO):
        adapter("messages", tmp_path, image_folder="video").to_sample(RECORDS["messages"] | {"video": "a.mp4"} | AT)


@pytest.mark.parametrize("name", adapter_names())
def test_every_adapter_declares_its_keys(name):
    assert import_module(f"sft.data.datasets.{name}").KEYS.record


def test_an_adapter_of_ones_own_need_not_declare_keys(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "tools.py").write_text(
        "from sft.core.sample import Message, Sample\n"
        "def rows(file, split):\n    return [{'tools': 'A hammer.'}]\n"
        "def to_sample(row, path):\n"
        "    return Sample(key='own/1', messages=(Message(role='document', content=(row['tools'],)),))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    of = adapter("own.tools", tmp_path)
    assert isinstance(outcomes(of)[0], Sample)
    assert not list(of.not_read({"tools": "A hammer."}))
