"""Adapters on a few hand-written rows in the published formats (tests/data)."""

import json
import random
from pathlib import Path

import pytest

from sft.datasets import Adapter, easy_vqa
from sft.errors import UserError
from sft.sample import ImageRef, Message, Sample, SkipSample

DATA = Path(__file__).parent / "data"
IMAGES = DATA / "easy_vqa" / "train" / "images"
QUESTIONS = json.loads((DATA / "easy_vqa" / "train" / "questions.json").read_text())
PHOTOS = DATA / "messages" / "photos"
BLUE_CIRCLE, RED_SOMETHING, GREEN_TRIANGLE = (ImageRef(source=IMAGES / f"{number}.png") for number in range(3))
DOG, CAT = (ImageRef(source=PHOTOS / name) for name in ("dog.png", "cat.png"))


def outcomes(adapter: Adapter) -> list[Sample | str]:
    """What becomes of each record: a sample, or the reason to leave it out."""
    found: list[Sample | str] = []
    for row in adapter.rows():
        try:
            if isinstance(row, SkipSample):
                raise row
            found.append(adapter.to_sample(row))
        except SkipSample as skip:
            found.append(skip.reason)
    return found


def turns(*contents: tuple[str | ImageRef, ...], first: str = "user") -> tuple[Message, ...]:
    roles = ["user", "assistant"] if first == "user" else [first, "user", "assistant"]
    return tuple(Message(role=role, content=items) for role, items in zip(roles, contents, strict=True))


# ------------------------------------------------------------------------------------------------------ easy_vqa


def easy_vqa_outcomes(split: str = "train", **options) -> list[Sample | str]:
    return outcomes(Adapter("easy_vqa", str(DATA / "easy_vqa"), split, options))


def easy_vqa_samples(split: str = "train", **options) -> list[Sample]:
    return [outcome for outcome in easy_vqa_outcomes(split, **options) if isinstance(outcome, Sample)]


def test_questions_are_a_turn_each():
    samples = easy_vqa_outcomes()
    assert len(samples) == 8
    assert samples[0].key == "easy_vqa/train/questions/0"
    assert samples[0].messages == turns((BLUE_CIRCLE, "what is the color of the shape?"), ("blue",))
    assert [sample.messages[1].content[0] for sample in samples[2:5]] == ["yes", "red", "no"]


def test_captions_are_written_only_where_colour_and_shape_are_told():
    blue, untold, green = easy_vqa_outcomes(form="captions")
    assert blue.messages == (Message(role="document", content=(BLUE_CIRCLE, "a blue circle")),)
    assert untold == "no answer tells colour and shape"
    assert green.messages == (Message(role="document", content=(GREEN_TRIANGLE, "a green triangle")),)


def test_choices_are_open_questions_asked_three_times_for_a_letter_and_once_for_the_text():
    samples = easy_vqa_samples(form="choices")
    asked = ("letter-0", "letter-1", "letter-2", "text")
    numbers = [n for n, (_, answer, _) in enumerate(QUESTIONS) if answer not in ("yes", "no")]
    assert [sample.key for sample in samples] == [f"easy_vqa/train/choices/{n}/{how}" for n in numbers for how in asked]
    letter, _, _, text = samples[:4]
    question = letter.messages[0].content[1]
    lines = question.split("\n")
    assert lines[:2] == ["Question: what is the color of the shape?", "Possible answers:"]
    assert 2 <= len(lines[2:-1]) <= 4
    assert [line[:3] for line in lines[2:-1]] == ["A: ", "B: ", "C: ", "D: "][: len(lines[2:-1])]
    assert lines[-1] == "Correct answer:"
    assert text.messages[1].content == ("blue",)
    assert len(samples) == 4 * 5, "yes/no questions have no options"
    left_out = [outcome for outcome in easy_vqa_outcomes(form="choices") if isinstance(outcome, str)]
    assert left_out == ["yes/no question"] * 3


@pytest.mark.parametrize(("form", "number"), [("questions", 0), ("choices", 3), ("captions", 1)])
def test_what_a_form_has_no_use_for_is_filtered_not_bad(form, number):
    rows = Adapter("easy_vqa", str(DATA / "easy_vqa"), "train", {"form": form}).rows()
    assert [row.filtered for row in rows if isinstance(row, SkipSample)] == [True] * number


def test_the_letter_points_to_the_right_option():
    answers = ["blue", "circle", "red", "triangle", "green"]
    samples = easy_vqa_samples(form="choices")
    for number, sample in enumerate(samples):
        question, answer = sample.messages[0].content[1], answers[number // 4]
        options = dict(line.split(": ") for line in question.split("\n")[2:-1])
        assert len(set(options.values())) == len(options) and answer in options.values()
        (given,) = sample.messages[1].content
        assert given == answer if sample.key.endswith("/text") else options[given] == answer


def test_options_are_drawn_by_key_and_seed_alone():
    assert easy_vqa_samples(form="choices") == easy_vqa_samples(form="choices")
    adapter = Adapter("easy_vqa", str(DATA / "easy_vqa"), "train", {"form": "choices"})
    last = [row for row in adapter.rows() if isinstance(row, dict)][-1]
    assert adapter.to_sample(last) == easy_vqa_samples(form="choices")[-1], "whatever was drawn before"
    assert easy_vqa_samples(form="choices", seed=1) != easy_vqa_samples(form="choices")


def test_a_shape_has_three_options_and_a_colour_four():
    rng = random.Random(0)
    assert sorted(easy_vqa.draw_options("circle", rng)) == ["circle", "rectangle", "triangle"]
    colours = easy_vqa.draw_options("teal", rng)
    assert "teal" in colours
    assert len(set(colours)) == 4 and set(colours) <= set(easy_vqa.COLOURS)


def test_the_split_is_a_folder():
    assert [sample.messages[1].content for sample in easy_vqa_samples("test")] == [("rectangle",), ("no",)]
    with pytest.raises(UserError, match=r"dev/questions.json: file not found"):
        easy_vqa_samples("dev")
    with pytest.raises(UserError, match="expected questions, choices or captions"):
        easy_vqa_samples(form="poems")


def test_the_package_brings_its_data():
    first = next(iter(Adapter("easy_vqa", None, "train", {}).rows()))
    assert first["image"] == 0 and first["answer"]


# ------------------------------------------------------------------------------------------------------ messages


def test_messages_in_every_form():
    hi, dog, two, parts, literal = outcomes(Adapter("messages", str(DATA / "messages"), "train", {}))
    assert hi.messages == turns(("Hi.",), ("Hello.",))
    assert dog.messages == turns((DOG, "What is this?"), ("A dog.",))
    assert two.messages == turns(
        ("Be brief.",), ("Is this", DOG, "a dog, or this:", CAT), ("The first.",), first="system"
    )
    assert parts.messages == turns(("And this?", CAT), ("A cat.",))
    assert literal.messages == turns(("What does <image> mean in HTML?",), ("<image> is no HTML.",))


def test_a_key_is_the_line_in_the_file():
    by_file = outcomes(Adapter("messages", str(DATA / "messages" / "train.jsonl"), "train", {}))
    assert [sample.key for sample in by_file] == [f"messages/train/{line}" for line in (1, 2, 3, 4, 6)]


def test_every_bad_record_has_one_reason():
    reasons = outcomes(Adapter("messages", str(DATA / "messages" / "bad.jsonl"), "train", {}))
    assert reasons == [
        "number of image markers differs from number of images",
        "number of image markers differs from number of images",
        "image path leaves the folder",
        "image is not a local path",
        "unknown role",
        "empty message",
        "no assistant message",
        "no messages",
        "content is neither text nor a list of parts",
        "unknown content part",
        "images is not a list",
        "image is not a local path",
        "line is not JSON",
        "line is not a JSON object",
    ]


# ------------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize(
    ("name", "path", "options", "expected"),
    [
        ("mesages", ".", {}, "unknown dataset 'mesages'; did you mean 'messages'?"),
        ("messages", None, {}, "dataset 'messages': needs `path`"),
        ("messages", "nowhere.jsonl", {}, "dataset 'messages': path nowhere.jsonl does not exist"),
        ("messages", ".", {"from": 1}, r"dataset 'messages': unknown option 'from' \(known: none\)"),
        ("easy_vqa", None, {"frm": 1}, "dataset 'easy_vqa': unknown option 'frm'; did you mean 'form'?"),
        ("no.such", ".", {}, "dataset 'no.such': no such module can be imported"),
        ("os.path", ".", {}, "dataset 'os.path': the module has no function 'rows'"),
    ],
)
def test_what_an_adapter_cannot_be_made_of_is_named(name, path, options, expected):
    with pytest.raises(UserError, match=expected.replace("?", r"\?")):
        Adapter(name, path, "train", options)


def test_a_stamp_tells_changed_raw_files(tmp_path):
    def stamp():
        return Adapter("messages", str(tmp_path), "train", {}).stamp()

    (tmp_path / "photos").mkdir()
    for name in ("train.jsonl", "photos/dog.png"):
        (tmp_path / name).write_text("raw")
    stamps = [stamp()]
    assert stamp() == stamps[0]
    (tmp_path / "photos" / "dog.png").write_text("other")
    stamps.append(stamp())
    (tmp_path / "photos" / "cat.png").write_text("new")
    stamps.append(stamp())
    (tmp_path / "train.jsonl").rename(tmp_path / "test.jsonl")
    stamps.append(stamp())
    assert len(set(stamps)) == 4


def test_a_module_of_your_own_is_an_adapter(tmp_path, monkeypatch):
    (tmp_path / "poets").mkdir()
    (tmp_path / "poets" / "haiku.py").write_text(
        "from sft.sample import Message, Sample\n"
        "def rows(path, split, *, number=1):\n"
        "    return [{'line': f'{split} {n}'} for n in range(number)]\n"
        "def to_sample(row, path, *, title='Haiku'):\n"
        "    return Sample(key=row['line'], messages=(Message(role='document', content=(title, row['line'])),))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    samples = outcomes(Adapter("poets.haiku", str(tmp_path), "spring", {"number": 2, "title": "Frog"}))
    assert [sample.messages[0].content for sample in samples] == [("Frog", "spring 0"), ("Frog", "spring 1")]
