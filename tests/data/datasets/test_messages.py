"""Your own conversations, in the forms of other toolkits."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.adapters import DATA, adapter, encoded_base64, outcomes, said, samples
from helpers.stores import encoded

from sft.core.errors import UserError
from sft.core.sample import Sample, SkipSample

HERE = DATA / "messages"
TALK = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
ASKED = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A dog."}]


def read(folder, *records, **options) -> list[Sample | str]:
    """What becomes of records in a file beside the photos."""
    shutil.copytree(HERE / "photos", folder / "photos", dirs_exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return outcomes(adapter("messages", folder, **options))


# ---------------------------------------------------------------------------------------------------------- forms


def test_messages_with_markers_or_parts():
    hi, dog, two, parts, literal = samples(adapter("messages"))
    assert said(hi) == [("user", "Hi."), ("assistant", "Hello.")]
    assert said(dog) == [("user", "<dog.png>|What is this?"), ("assistant", "A dog.")]
    assert said(two) == [
        ("system", "Be brief."),
        ("user", "Is this|<dog.png>|a dog, or this:|<cat.png>"),
        ("assistant", "The first."),
    ]
    assert said(parts) == [("user", "And this?|<cat.png>"), ("assistant", "A cat.")]
    assert said(literal) == [("user", "What does <image> mean in HTML?"), ("assistant", "<image> is no HTML.")]


def test_the_form_of_llava_is_a_json_list_and_a_folder_of_images():
    before, after, text = samples(adapter("messages", HERE / "llava.json", image_folder="photos"))
    assert said(before) == [("user", "<dog.png>|What is this?"), ("assistant", "A dog.")]
    assert said(after)[0] == ("user", "And this?|<cat.png>")
    assert said(after)[2:] == [("user", "Sure?"), ("assistant", "Yes.")]
    assert said(text) == [("system", "Be kind."), ("user", "Hi."), ("assistant", "Hello, friend.")]


def test_other_spellings():
    parts, page, tokens, human = samples(adapter("messages", HERE / "forms.jsonl"))
    assert said(parts)[0] == ("user", "<cat.png>| Left as it is |<dog.png>")
    assert said(page) == [("document", "A page with|<dog.png>|a dog.")]
    assert said(tokens)[0] == ("user", "<3 bytes>|</s> Is <fake_token_around_image> text?")
    assert said(human) == [("user", "Hi."), ("assistant", "Hello.")]


EMPTY = ["", " \n", None, [], [{"type": "text", "text": ""}]]


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
def test_an_empty_system_text_is_none(tmp_path, empty, keys):
    talk = [dict(zip(keys, ("system", empty), strict=True)), *TALK]
    spoken = [("user", "Hi."), ("assistant", "Hello.")]
    alone, beside, both = read(
        tmp_path,
        {"messages": talk},
        {"messages": TALK, "system": empty},
        {"messages": talk, "system": "Be brief."},
    )
    assert (said(alone), said(beside)) == (spoken, spoken)
    assert said(both) == [("system", "Be brief."), *spoken]


RED = encoded("red")
DOG = ("user", "<dog.png>|What is it?")
PARTS = {
    "the next of the images": {"type": "image"},
    "an index": {"type": "image", "index": 0, "text": None},
    "image": {"type": "image", "image": "photos/dog.png"},
    "path": {"type": "image", "path": "photos/dog.png"},
    "url of a file": {"type": "image", "url": "photos/dog.png"},
    "value": {"type": "image", "value": "photos/dog.png"},
    "image_url": {"type": "image_url", "image_url": {"url": "photos/dog.png", "detail": "low"}},
    "image_url, a string": {"type": "image_url", "image_url": "photos/dog.png"},
    "no type": {"image": "photos/dog.png"},
    "an object": {"type": "image", "image": {"bytes": None, "path": "photos/dog.png"}},
}
BYTES = {
    "base64": {"type": "image", "base64": encoded_base64("red")},
    "bytes": {"type": "image", "bytes": encoded_base64("red")},
    "a data URL": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded_base64('red')}"}},
    "source": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": encoded_base64("red")}},
}


@pytest.mark.parametrize("form", [*PARTS, *BYTES])
def test_a_part_names_or_holds_its_image(tmp_path, form):
    part = (PARTS | BYTES)[form]
    turn = {"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}
    images = {"images": ["photos/dog.png"]} if form in ("the next of the images", "an index") else {}
    (sample,) = read(tmp_path, {"messages": [turn, ASKED[1]], **images})
    assert sample.images[0].source == (RED if form in BYTES else tmp_path / "photos/dog.png")


SPOKEN = [("user", "Hi."), ("assistant", "Hello.")]
MET = [("user", "<dog.png>|Hi."), ("assistant", "Hello.")]
TWO = [("user", "<dog.png>|<cat.png>|Hi."), ("assistant", "Hello.")]
BRIEF = [("system", "Be brief."), *SPOKEN]
FORMS = [
    ({"prompt": "Hi.", "completion": "Hello."}, SPOKEN),
    ({"prompt": TALK[:1], "completion": TALK[1:]}, SPOKEN),
    ({"query": "Hi.", "response": "Hello."}, SPOKEN),
    ({"question": ["Hi."] * 2, "answer": ["Hello."] * 2}, SPOKEN * 2),
    ({"messages": TALK, "conversations": TALK, "query": "Hm?", "response": "Hm."}, SPOKEN),
    ({"question": "Hi.", "answer": "Hello.", "image": "photos/dog.png"}, MET),
    ({"instruction": "Hi.", "input": "", "output": "Hello."}, SPOKEN),
    ({"instruction": "Say", "input": "Hi.", "output": "Hello."}, [("user", "Say\nHi."), SPOKEN[1]]),
    ({"instruction": "Hi.", "output": "Hello.", "history": [["One?", "Two."]], "system": "Be brief."}, None),
    ({"texts": [{"user": "Hi.", "assistant": "Hello.", "source": "a"}], "images": ["photos/dog.png"]}, MET),
    ({"texts": [{"user": "Hi.", "assistant": "Hello."}] * 2, "images": []}, SPOKEN * 2),
    ({"messages": TALK, "images": ["photos/dog.png", "photos/cat.png"]}, TWO),
    ({"messages": TALK, "image": ["photos/dog.png"]}, MET),
    ({"messages": TALK, "image": ""}, SPOKEN),
    ({"messages": TALK, "system": "Be brief."}, BRIEF),
    ({"messages": TALK, "system_prompt": ["Be brief."]}, BRIEF),
    ({"messages": TALK, "system_message": [{"type": "text", "text": "Be brief."}]}, BRIEF),
    ({"messages": [{"role": "system", "content": "Be brief."}, *TALK], "system": "Be brief."}, BRIEF),
    ({"messages": [{"role": "developer", "content": "Be brief."}, *TALK]}, BRIEF),
    ({"messages": [{"role": "USER", "content": "Hi."}, {"role": "GPT", "content": "Hello."}]}, SPOKEN),
    ({"conversations": [{"from": "Human", "value": "Hi."}, {"from": "bot", "value": "Hello."}]}, SPOKEN),
    ({"messages": [{"role": "user", "content": [{"type": "text", "value": "Hi."}]}, TALK[1]]}, SPOKEN),
    ({"messages": [{"role": "user", "content": "<img>photos/dog.png</img>Hi."}, TALK[1]]}, MET),
    ({"messages": [{"role": "user", "content": "<ImageHere>Hi."}, TALK[1]], "images": ["photos/dog.png"]}, MET),
    ({"messages": [{"role": "document", "content": "A dog."}], "images": ["photos/dog.png"]}, None),
]


@pytest.mark.parametrize(("record", "expected"), FORMS)
def test_forms_of_others_are_read_as_their_owners_read_them(tmp_path, record, expected):
    (sample,) = read(tmp_path, record)
    if expected is None:
        with_history = [("system", "Be brief."), ("user", "One?"), ("assistant", "Two."), *SPOKEN]
        expected = with_history if "history" in record else [("document", "<dog.png>|A dog.")]
    assert said(sample) == expected


PNG = encoded_base64("red")


@pytest.mark.parametrize(
    "image", [PNG, f"DATA:image/png;base64,{PNG}", {"image": [PNG]}, {"type": "image", "url": f"data:;base64,{PNG}"}]
)
def test_base64_is_an_image_wherever_it_stands(tmp_path, image):
    (sample,) = read(tmp_path, {"messages": ASKED, "images": [image]})
    assert sample.images[0].source == encoded("red")


def test_images_that_parts_bring_may_be_listed_too(tmp_path):
    dog, cat = ({"type": "image", "image": f"photos/{name}.png"} for name in ("dog", "cat"))
    record = {"messages": [{"role": "user", "content": [dog, cat, "Two?"]}, TALK[1]]}
    (sample,) = read(tmp_path, record | {"images": ["photos/dog.png", "photos/cat.png"]})
    assert said(sample)[0] == ("user", "<dog.png>|<cat.png>|Two?")
    for images in (["photos/cat.png", "photos/dog.png"], ["photos/dog.png"]):
        assert read(tmp_path, record | {"images": images}) == ["markers and images differ in number"]


def test_a_tag_around_a_word_is_text_where_no_record_has_images(tmp_path):
    record = {"messages": [{"role": "user", "content": "What is <img>x</img>?"}, TALK[1]]}
    assert said(read(tmp_path, record)[0])[0] == ("user", "What is <img>x</img>?")


def test_indices_say_which_image_stands_where(tmp_path):
    parts = [{"type": "image", "index": 1}, {"type": "image", "index": 0}]
    record = {"messages": [{"role": "user", "content": parts}, TALK[1]], "images": ["photos/dog.png", "photos/cat.png"]}
    (sample,) = read(tmp_path, record)
    assert said(sample)[0] == ("user", "<cat.png>|<dog.png>")
    assert read(tmp_path, record | {"images": ["photos/dog.png"]}) == ["image index out of range"]
    assert read(tmp_path, record | {"images": ["photos/dog.png", None]}) == ["image is not a local path"]


COLUMNS = [
    ({"user": "q", "assistant": "a", "image": "file_name"}, MET),
    ({"user": "q", "assistant": "a"}, SPOKEN),
    ({"user": "q", "image": "file_name"}, [MET[0], ("assistant", "Not this.")]),
    ({"document": "a", "image": "file_name"}, [("document", "<dog.png>|Hello.")]),
]


@pytest.mark.parametrize(("columns", "expected"), COLUMNS)
def test_columns_are_read_by_the_names_that_the_option_gives(tmp_path, columns, expected):
    record = {"q": "Hi.", "a": "Hello.", "file_name": "photos/dog.png", "answer": "Not this."}
    assert said(read(tmp_path, record, columns=columns)[0]) == expected
    assert read(tmp_path, {"q": "Hi."}, columns=columns) == ["no such column"]


def test_columns_replace_what_a_record_says_in_another_form(tmp_path):
    record = {"q": "Hi.", "a": "Hello.", "messages": ASKED, "image": "photos/cat.png", "file": "photos/dog.png"}
    (sample,) = read(tmp_path, record, columns={"user": "q", "assistant": "a", "image": "file"})
    assert said(sample) == MET
    with pytest.raises(UserError, match="option columns: unknown name 'pic'"):
        read(tmp_path, record, columns={"pic": "file"})


def test_metadata_of_a_folder_of_images_names_its_images(tmp_path):
    shutil.copytree(HERE / "photos", tmp_path, dirs_exist_ok=True)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "dog.png", "question": "Hi.", "answer": "Hello."}')
    for options in ({}, {"columns": {"image": "file_name"}}):
        assert [said(sample) for sample in samples(adapter("messages", tmp_path, **options))] == [MET]


def test_only_the_last_answer_is_learned_where_it_is_asked_for(tmp_path):
    (sample,) = read(tmp_path, {"messages": TALK * 2}, train_on="last")
    assert [message.is_trained for message in sample.messages] == [True, False, True, True]
    assert all(message.is_trained for message in read(tmp_path, {"messages": TALK * 2})[0].messages)


@pytest.mark.parametrize("record", [{}, {"image": ""}, {"images": []}, {"img": "photos/dog.png"}])
def test_a_marker_is_a_word_only_in_a_file_without_images(tmp_path, record):
    alone = {"messages": ASKED, **record}
    word = [[("user", "<image>What is it?"), ("assistant", "A dog.")]]
    assert [said(one) if isinstance(one, Sample) else one for one in read(tmp_path, alone)] == (
        ["image marker without an image"] if record else word
    )
    in_turn = {"messages": [ASKED[0] | {"images": ["photos/dog.png"]}, ASKED[1]]}
    assert read(tmp_path, in_turn) == ["turn has images"]
    first, second = read(tmp_path, alone, {"messages": ASKED, "images": ["photos/dog.png"]})
    assert (first, said(second)[0]) == ("image marker without an image", DOG)


def test_an_empty_system_text_alone_is_no_conversation(tmp_path):
    assert read(tmp_path, {"messages": [{"role": "system", "content": ""}]}) == ["no question with an answer"]


def test_parquet_holds_images_as_bytes_or_paths(tmp_path):
    shutil.copytree(HERE / "photos", tmp_path / "photos")
    red = encoded("red")
    images = [[{"bytes": red, "path": "red.png"}], [{"bytes": None, "path": "photos/dog.png"}], []]
    talks = [ASKED, ASKED, TALK]
    pq.write_table(pa.table({"messages": talks, "images": images}), tmp_path / "train-00000-of-00002.parquet")
    pq.write_table(pa.table({"messages": [ASKED], "image": [red]}), tmp_path / "train-00001-of-00002.parquet")
    first, second, third, fourth = samples(adapter("messages", tmp_path))
    assert first.images[0].source == red == fourth.images[0].source
    assert said(second)[0] == ("user", "<dog.png>|What is it?")
    assert said(third)[0] == ("user", "Hi.")
    assert fourth.key == "messages/train-00001-of-00002.parquet:1"


def test_a_key_is_the_line_in_the_file():
    by_file = samples(adapter("messages", HERE / "train.jsonl", "whatever"))
    assert [sample.key for sample in by_file] == [f"messages/train.jsonl:{line}" for line in (1, 2, 3, 4, 6)]


# ---------------------------------------------------------------------------------------------------- bad records


def test_every_bad_record_has_one_reason():
    assert outcomes(adapter("messages", HERE / "bad.jsonl")) == [
        "image file missing",
        "user and assistant do not alternate",
        "image path leaves the folder",
        "image is not a local path",
        "unknown role",
        "empty message",
        "no question with an answer",
        "no messages",
        "content is neither text nor a list of parts",
        "unknown content part",
        "images is not a list",
        "image is not a local path",
        "line is not JSON",
        "line is not a JSON object",
    ]


AT_HTTP = {"type": "image_url", "image_url": "http://x/a.png"}
NOT_FIRST = "system text is not first"
TWO_FORMS = "two forms of a conversation"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [{"role": "system", "content": "A."}, {"role": "system", "content": "B."}, *TALK]}, NOT_FIRST),
        ({"messages": [*TALK, {"role": "system", "content": "Be brief."}, *TALK]}, NOT_FIRST),
        ({"messages": [{"role": "system", "content": "A."}, *TALK], "system_prompt": "B."}, NOT_FIRST),
        ({"messages": [*TALK, TALK[0]]}, "last message is not the assistant's"),
        ({"messages": [TALK[1]]}, "user and assistant do not alternate"),
        ({"messages": [{"role": "document", "content": "A page."}, *TALK]}, "user and assistant do not alternate"),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, "no question with an answer"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": " "}]}, TALK[1]]}, "empty message"),
        ({"messages": ASKED, "images": [None]}, "image is not a local path"),
        ({"messages": ASKED, "images": [{"bytes": None, "path": None}]}, "image is not a local path"),
        ({"messages": ASKED, "images": ["x" * 300]}, "image is not a local path"),
        ({"messages": ASKED, "images": ["photos"]}, "image file missing"),
        ({"messages": ASKED, "images": ["photos/dog.png"], "image": "photos/cat.png"}, "images and image differ"),
        ({"messages": [{"role": "user", "content": "<img>a.png</img>"}, TALK[1]]}, "image file missing"),
        ({"messages": [{"role": "user", "content": "<ImageHere>What?"}, TALK[1]]}, "image marker without an image"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, TALK[1]]}, "image marker without an image"),
        ({"messages": [{"role": "user", "content": [AT_HTTP]}, TALK[1]]}, "image is not a local path"),
        ({"question": "Hi.", "instruction": "Be brief.", "answer": "Hello."}, "several questions or answers"),
        ({"messages": TALK, "conversations": ASKED}, TWO_FORMS),
        ({"messages": TALK, "texts": [{"user": "Hi.", "assistant": "Hm."}]}, TWO_FORMS),
        ({"document": "A page.", "question": "Hi.", "answer": "Hello."}, TWO_FORMS),
        ({"texts": [{"user": "Hi.", "assistant": "Hm."}], "question": "Hi.", "answer": "Hello."}, TWO_FORMS),
        ({"messages": [TALK[0] | {"value": "Hm?"}, TALK[1]]}, TWO_FORMS),
        ({"question": "Hi.", "answer": ["2", "two"]}, "several texts in a turn"),
        ({"messages": [TALK[0] | {"content": ["Hi.", "Ho."]}, TALK[1]]}, "several texts in a turn"),
        ({"messages": ASKED, "media": ["photos/dog.png"]}, "image marker without an image"),
        ({"messages": ASKED, "attachments": [{"path": "photos/dog.png"}]}, "image marker without an image"),
        ({"texts": [{"user": "Hi."}]}, "no messages"),
        ({"history": [["Hi.", "Hello."]]}, "no messages"),
        ({"query": "Hi.", "response": "Hello.", "history": ["Hi."]}, "history is not a list of pairs"),
        ({"messages": ASKED, "images": ["data:image/png;base64,A"]}, "image is not base64"),
    ],
)
def test_more_bad_records(tmp_path, record, reason):
    assert read(tmp_path, record) == [reason]


@pytest.mark.parametrize(
    ("record", "detail"),
    [
        (
            {"messages": [{"role": "asistant", "content": "Hi."}]},
            "'asistant'; did you mean 'assistant'? (known:",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "imag"}]}, TALK[1]]},
            "type 'imag', keys type; did you mean 'image'?",
        ),
        ({"messages": [{"speaker": "user", "text": "Hi."}]}, "no role or from; found speaker, text (known:"),
        ({"messages": [{"role": "user", "text": "Hi."}, TALK[1]]}, "of user; found role, text; expected content or"),
        ({"messages": "[]"}, "found messages; messages is str; expected messages or conversations, a list of turns"),
        ({"Question": "Hi.", "caption": "Hm."}, "found Question, caption; did you mean 'question'?; expected messages"),
        ({"mesages": TALK, "image": ""}, "found mesages, image; did you mean 'messages'?; expected messages or"),
        ({"text": "A page."}, "found text; expected messages or conversations, a list of turns; or a question"),
        (
            {"messages": ASKED, "img": "a.png"},
            "1 <image> marker but 0 images; img is not read, expected image",
        ),
    ],
)
def test_a_reason_about_a_name_says_what_was_found_and_the_nearest_known_one(tmp_path, record, detail):
    (tmp_path / "train.jsonl").write_text(json.dumps(record))
    of = adapter("messages", tmp_path)
    with pytest.raises(SkipSample) as left_out:
        of.to_sample(next(iter(of.rows(of.files()[0]))))
    assert left_out.value.detail.startswith(detail)


def test_a_missing_image_is_named(tmp_path):
    of = adapter("messages", HERE / "bad.jsonl")
    with pytest.raises(SkipSample) as left_out:
        of.to_sample(next(iter(of.rows(of.files()[0]))))
    assert left_out.value.detail == str(HERE / "photos" / "bird.png")


@pytest.mark.parametrize(
    ("content", "images", "found"),
    [
        ("<image><image>Same?", ["photos/dog.png"], "2 <image> markers but 1 image"),
        ("<image>Same?", ["photos/dog.png", "photos/cat.png"], "1 <image> marker but 2 images"),
        (
            [{"type": "text", "text": "<image>Hm?"}],
            ["photos/dog.png"],
            "0 <image> markers but 1 image; <image> is text here",
        ),
        ("<image_0>Hm?", ["photos/dog.png"], "0 <image> markers but 1 image; <image_0> is text here"),
        (
            [{"type": "image", "path": "photos/dog.png"}],
            ["photos/cat.png"],
            "0 <image> markers but 1 image; 1 more by name or in parts",
        ),
        (
            [{"type": "image", "index": 0}],
            ["photos/dog.png", "photos/cat.png"],
            "0 <image> markers but 1 image; indices name 1 more",
        ),
    ],
)
def test_markers_that_do_not_match_the_images_are_a_bad_record_with_both_numbers(tmp_path, content, images, found):
    wrong = {"messages": [{"role": "user", "content": content}, TALK[1]], "images": images}
    reason = "markers and images differ in number"
    before, *both, after = read(tmp_path, {"messages": TALK}, wrong, wrong, {"messages": TALK})
    assert both == [reason, reason]
    assert said(before) == said(after) == [("user", "Hi."), ("assistant", "Hello.")]
    of = adapter("messages", tmp_path)
    with pytest.raises(SkipSample) as left_out:
        of.to_sample(list(of.rows(of.files()[0]))[1])
    assert left_out.value.detail.startswith(f"{found}; write <image> in a string, or ")


@pytest.mark.parametrize("wrong", [None, 7, [], {}, "", "\ud83d", [None], [[]], {"role": []}, {"type": "image"}, b"?"])
def test_a_field_of_another_shape_is_a_bad_record(wrong):
    of, place = adapter("messages"), {"__from__": "train.jsonl:1"}
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi."}]}
    good = {"messages": [turn, TALK[1]], "images": ["photos/dog.png"], "system": "Be brief."}
    assert of.to_sample(good | place).images
    broken = [good | {key: wrong} for key in (*good, "conversations", "image", "tools")]
    broken += [good | {"messages": [turn | {key: wrong}, TALK[1]]} for key in turn]
    broken += [
        good | {"messages": [turn | {"content": [part | {key: wrong}]}]} for part in turn["content"] for key in part
    ]
    broken += [good | {"messages": [wrong]}, good | {"images": [wrong]}, good | {"images": [{"bytes": wrong}]}]
    for row in broken:
        try:
            assert isinstance(of.to_sample(row | place), Sample)
        except (SkipSample, UserError):
            continue


# ------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("train.jsonl", "", "train.jsonl: the file is empty; expected JSON lines, a JSON list"),
        ("train.txt", "{}", "no train.jsonl, train.json or train.parquet; the folder holds train.txt; name the file"),
        ("train.d/x", "", "the folder holds train.d/; name the file"),
        ("train.parquet", "PAR?", "train.parquet: not readable as parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_mistake(tmp_path, name, content, expected):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=expected):
        outcomes(adapter("messages", tmp_path))


def test_a_parquet_file_without_rows_is_a_mistake(tmp_path):
    pq.write_table(pa.table({"messages": pa.array([], pa.list_(pa.string()))}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"train.parquet: the file has no records"):
        outcomes(adapter("messages", tmp_path))


@pytest.mark.parametrize(
    "names",
    [
        ("train.json", "train.jsonl"),
        ("train-00000-of-00003.parquet", "train-00002-of-00003.parquet"),
        ("train-00000-of-00001.parquet", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"),
        ("train-00000-of-00001.jsonl", "train-00000-of-00001.parquet"),
        ("a-train.arrow", "b-train.arrow"),
        ("metadata.csv", "metadata.jsonl"),
    ],
)
def test_the_files_of_a_split_are_one_whole_set(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"holds {', '.join(names)}; expected one of them, or each part of one set"):
        adapter("messages", tmp_path).files()


def test_a_folder_without_a_file_of_the_split_says_what_it_holds():
    with pytest.raises(UserError, match=r"bad.jsonl, forms.jsonl, llava.json, photos/, train.jsonl; name the file"):
        adapter("messages", HERE, "test").files()


def test_a_folder_of_images_that_is_not_there_is_a_mistake():
    with pytest.raises(UserError, match=r"messages/pictures: no such folder; expected images \(option image_folder\)"):
        adapter("messages", HERE / "llava.json", image_folder="pictures").files()
    assert adapter("messages", HERE / "llava.json", image_folder=str(HERE / "photos")).files()
