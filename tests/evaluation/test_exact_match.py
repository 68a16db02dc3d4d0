"""Questions of one's own with short answers: their file, and how answers are compared."""

import json
import os
from pathlib import Path

import pytest
from conftest import REPOSITORY
from PIL import Image

from sft.core.errors import UserError
from sft.core.sample import ImageRef
from sft.evaluation.metrics.vqa_accuracy import normalise_freely
from sft.evaluation.prompts import Prompt
from sft.evaluation.tasks.exact_match import is_match, read_questions


@pytest.mark.parametrize(
    ("said", "normalised"),
    [
        ("The  red bus.", "red bus"),
        ("Two", "2"),
        ("a 10,000", "10000"),
        ("3.5 metres", "3.5 metres"),
        ("don't", "dont"),
        ("blue/green", "blue green"),
        ("yes , it is", "yes it is"),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_vqa_does(said, normalised):
    assert normalise_freely(said) == normalised


def test_an_answer_matches_any_of_those_given():
    assert is_match("A Dark-red.", ("red", "dark red")) and is_match("ten", ("10",))
    assert not is_match("reddish", ("red",)) and not is_match("", ("red",))


@pytest.mark.skipif("IDEFICS_SFT_SAMPLES" not in os.environ, reason="IDEFICS_SFT_SAMPLES names no real samples")
def test_real_answers_match_where_m4s_score_is_not_zero():
    """With ten human answers, m4's VQA accuracy is over 0 as soon as one of them is the answer."""
    folder = Path(os.environ["IDEFICS_SFT_SAMPLES"]) / "vqa_accuracy"
    said, scored = (json.loads((folder / f"textvqa_{name}.json").read_text()) for name in
                    ("predictions_400", "per_question_scores"))  # fmt: skip
    annotations = json.loads((folder / "textvqa_annotations_400.json").read_text())["annotations"]
    answers = {line["question_id"]: tuple(answer["answer"] for answer in line["answers"]) for line in annotations}
    scores = {line["question_id"]: line["m4_gt_vision_lab_oe"] for line in scored}
    assert len(said) == 400
    for line in said:
        number = line["question_id"]
        assert is_match(line["answer"], answers[number]) == (scores[number] > 0), line


def test_questions_are_read_and_mistakes_are_named(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text(
        '{"question": " Is\u2028\x85it? ", "answer": "no"}\n\n{"question": "q", "answers": ["a", "b"], "id": "x"}\n'
    )
    first, second = read_questions(file)
    assert (first.id, first.text, first.answers, first.category) == ("1", "Is\u2028\x85it?", ("no",), "")
    assert (second.id, second.where, second.answers) == ("x", f"{file}:3", ("a", "b"))
    for line, expected in (
        ("{", ":1: not JSON"),
        ("[]", ':1: expected an object with "question" and "answer" or "answers", found an empty list'),
        ('{"messages": [], "images": []}', ":1: expected an object .*, found one with messages, images"),
        ('{"question": "q"}', ":1: no answer"),
        ('{"question": "q", "answer": 3}', ':1: expected "answer" as a text'),
        ('{"question": "q", "answer": "a", "anwser": 1}', ":1: unknown key 'anwser'"),
        ('{"question": "q", "answer": "a", "image": "../x.png"}', ":1: image path leaves the folder"),
        ('{"question": "q", "answer": "a", "image": "none.png"}', ":1: image file missing"),
        ('{"question": "q", "answer": "a", "id": 1}\n{"question": "q", "answer": "a", "id": 1}', ":2: id '1' is that"),
        ("", "no questions found"),
    ):
        file.write_text(line)
        with pytest.raises(UserError, match=f"own.jsonl.*{expected}"):
            read_questions(file)
    with pytest.raises(UserError, match=r"nowhere\.jsonl: No such file"):
        read_questions(tmp_path / "nowhere.jsonl")


def test_the_examples_of_the_documentation_are_read(tmp_path):
    page = (REPOSITORY / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (tmp_path / "own.jsonl").write_text(page.partition("```json\n")[2].partition("```")[0])
    for name in ("photos/bus.jpg", "street.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 6), "red").save(tmp_path / name)
    bus, street = read_questions(tmp_path / "own.jsonl")
    assert bus.answers == ("red", "dark red") and len(bus.images) == 1
    assert (street.id, street.category, street.image_sha256) == ("rain-1", "yes/no", bus.image_sha256)
    assert [type(item) for item in Prompt().asked(bus)] == [ImageRef, str]
