"""easy-vqa's questions, choices and captions."""

import json
import random

import pytest
from helpers.adapters import DATA, adapter, outcomes

from sft.core.errors import UserError
from sft.core.sample import ImageRef, Message, Sample
from sft.data.datasets import Adapter, easy_vqa

IMAGES = DATA / "easy_vqa" / "train" / "images"
QUESTIONS = json.loads((DATA / "easy_vqa" / "train" / "questions.json").read_text())
BLUE_CIRCLE, RED_SOMETHING, GREEN_TRIANGLE = (ImageRef(source=IMAGES / f"{number}.png") for number in range(3))


def turns(*contents: tuple[str | ImageRef, ...]) -> tuple[Message, ...]:
    return tuple(Message(role=role, content=items) for role, items in zip(("user", "assistant"), contents, strict=True))


def easy_vqa_outcomes(split: str = "train", **options) -> list[Sample | str]:
    return outcomes(adapter("easy_vqa", split=split, **options))


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
    assert untold == "filtered: no answer tells colour and shape"
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
    assert left_out == ["filtered: yes/no question"] * 3


@pytest.mark.parametrize(("form", "number"), [("questions", 0), ("choices", 3), ("captions", 1)])
def test_what_a_form_has_no_use_for_is_filtered_not_bad(form, number):
    found = easy_vqa_outcomes(form=form)
    reasons = [outcome for outcome in found if isinstance(outcome, str)]
    assert len(reasons) == number and all(reason.startswith("filtered: ") for reason in reasons)


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
    of = adapter("easy_vqa", form="choices")
    last = [row for row in of.rows(of.files()[0]) if isinstance(row, dict)][-1]
    assert of.to_sample(last) == easy_vqa_samples(form="choices")[-1], "whatever was drawn before"
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
    with pytest.raises(UserError, match="form is 'poems'; expected 'questions', 'choices' or 'captions'"):
        easy_vqa_samples(form="poems")


def test_the_package_brings_its_data():
    of = Adapter("easy_vqa", None, "train", {})
    first = next(iter(of.rows(of.files()[0])))
    assert first["image"] == 0 and first["answer"]
