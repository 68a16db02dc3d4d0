"""How questions are put, what is shown before them, what a written answer names, and the file for MMBench's server."""

import hashlib
import math
from dataclasses import asdict

import pytest

from sft.core.errors import UserError
from sft.core.sample import ImageRef
from sft.evaluation.results import Outcome, Result
from sft.evaluation.task import without_images
from sft.evaluation.tasks.mmbench.benchmark import Benchmark, load_benchmark
from sft.evaluation.tasks.mmbench.multiple_choice import AskedRow, MMBench
from sft.evaluation.tasks.mmbench.named_option import find_letter
from sft.evaluation.tasks.mmbench.protocols import check_protocol, compared, group_rows, query, question_text
from sft.evaluation.tasks.mmbench.questions import PASS, Row
from sft.evaluation.tasks.mmbench.shots import draw_shots, split_support
from sft.evaluation.tasks.mmbench.submission import check_submission, write_submission

IMAGE = "<fake_token_around_image><image><fake_token_around_image>"


def a_row(index: int = 7, image: str = "farm", **fields: object) -> Row:
    head = dict(
        question="Which?", hint="", letters=("A", "B", "C"), options=("cat", "dog", "cow"), answer="B", category="",
        l2_category="",
    )  # fmt: skip
    sha256 = hashlib.sha256(image.encode()).hexdigest()
    return Row(index=index, image=ImageRef(source=image.encode()), image_sha256=sha256, **head | fields)


ASKED = "Context: On a farm.\nQuestion: Which?\nPossible answers:\nA: cat\nB: dog\nC: cow\nCorrect answer:"


def test_the_card_s_prompt_is_that_of_the_released_checkpoints_to_the_letter(template):
    asked, shot = a_row(hint="On a farm."), a_row(8, "sea", question="What?")
    text = template.text(query(asked, "card", "letter", shots=[shot]).messages, add_generation_prompt=True)
    assert text == (
        "<s>The user asks a multiple-choice question and the assistant uses the image to answer.\n"
        f"User:{IMAGE}Question: What?\nPossible answers:\nA: cat\nB: dog\nC: cow\nCorrect answer: <end_of_utterance>\n"
        "Assistant: B.<end_of_utterance>\n"
        f"User:{IMAGE}{ASKED} <end_of_utterance>\nAssistant:"
    )
    assert compared(asked, "card", "letter") == ("A", "B", "C", "D")


@pytest.mark.parametrize("protocol", ["vanilla", "circular"])
def test_other_protocols_ask_the_same_question_without_the_prefix(template, protocol):
    asked = a_row(hint="On a farm.")
    assert question_text(asked) == ASKED
    text = template.text(query(asked, protocol, "letter").messages, add_generation_prompt=True)
    assert text == f"<s>User:{IMAGE}{ASKED}<end_of_utterance>\nAssistant:"
    assert compared(asked, protocol, "letter") == ("A", "B", "C")
    assert compared(asked, protocol, "text") == ("cat", "dog", "cow")
    assert without_images(query(asked, protocol, "letter", shots=[a_row(8)])).images == ()


def test_the_answers_of_shots_are_those_that_are_ranked():
    said = [query(a_row(), "circular", rank, shots=[a_row(8)]).messages[1].content for rank in ("letter", "text")]
    assert said == [("B",), ("dog",)]


def test_the_card_ranks_letters_only():
    check_protocol("card", ("letter",))
    with pytest.raises(UserError, match="protocol card ranks letters, found text"):
        check_protocol("card", ("letter", "text"))
    with pytest.raises(UserError, match="protocol: unknown 'round'"):
        group_rows([], "round")


# --------------------------------------------------------------------------------------------------------- shots

ROWS = [a_row(number + by * PASS, f"image {number // 2}") for number in range(40) for by in range(3)]


@pytest.mark.parametrize("protocol", ["card", "circular"])
def test_support_and_questions_share_no_question_and_no_image(protocol):
    asked, support = split_support(group_rows(ROWS, protocol), num_shots=2, seed=0)
    assert {q.cluster for q in asked}.isdisjoint(q.cluster for q in support)
    assert len({q.first.question_index for q in support}) == 4  # a tenth
    assert len(asked) + len(support) == len(group_rows(ROWS, protocol))


def test_shots_depend_on_question_and_seed_alone_and_never_show_what_is_asked():
    questions = group_rows(ROWS, "circular")
    everything = [row for question in questions for row in question.rotations]
    for question in questions:
        shots = draw_shots(question, everything, num_shots=5, seed=0)
        assert len({shot.question_index for shot in shots}) == 5
        assert question.cluster not in {shot.image_sha256 for shot in shots}
        assert shots == draw_shots(question, everything, num_shots=5, seed=0)
    drawn = [draw_shots(questions[0], everything, num_shots=5, seed=seed) for seed in range(2)]
    assert drawn[0] != drawn[1]
    with pytest.raises(UserError, match="question 0 can be shown 38 others with answers, 39 are asked for"):
        draw_shots(questions[0], everything, num_shots=39, seed=0)


# ---------------------------------------------------------------------------------------------------- extraction


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B).", "B"),
        ("B. dog", "B"),
        ("The correct answer is B", "B"),
        ("The answer is A, since it meows.", "A"),
        ("A cat sits there.", "A"),  # by its text; the word is the article
        ("A big animal stands there", ""),
        ("It is a DOG", "B"),
        ("Some cattle", ""),  # a word of its own
        ("cat or dog", ""),
        ("A or B", ""),
        ("D", ""),  # no such option
        ("", ""),
        ("a dog, which is an animal that has lived with people for ten thousand years", ""),
    ],
)
def test_a_written_answer_names_an_option_or_none(answer, letter):
    assert find_letter(answer, ("A", "B", "C"), ("cat", "dog", "cow")) == letter


def test_an_option_inside_another_counts_for_the_longer_one():
    assert find_letter("the red dog", ("A", "B"), ("dog", "red dog")) == "B"


SHAPES = ("a red circle", "a blue square", "the star.")
VITAMINS = ("vitamin C", "vitamin D", "iron")
LETTERS_AS_TEXTS = ("C", "A", "B")
YES_NO = ("Yes", "No")


@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        # the text of an option, before any letter
        (SHAPES, "A blue square", "B"),
        (SHAPES, "A blue square.", "B"),
        (SHAPES, "a blue square", "B"),
        (SHAPES, "A BLUE SQUARE", "B"),
        (SHAPES, "A blue  square\n", "B"),
        (SHAPES, "**A blue square**", "B"),
        (SHAPES, '"A blue square"', "B"),
        (SHAPES, "Blue square", "B"),
        (SHAPES, "The blue square", "B"),
        (SHAPES, "It is a blue square.", "B"),
        (SHAPES, "Answer: A blue square", "B"),
        (SHAPES, "The answer is A blue square", "B"),
        (SHAPES, "A star", "C"),
        (SHAPES, "A red circle", "A"),
        (SHAPES, "A big star", "C"),
        (VITAMINS, "Vitamin C", "A"),
        (VITAMINS, "It is vitamin C", "A"),
        (VITAMINS, "The answer is vitamin C.", "A"),
        (VITAMINS, "Vitamin A", "A"),  # no option's text, so the letter
        (YES_NO, "No", "B"),
        (YES_NO, "No, it is", "B"),
        # a letter beside the text, which is the letter
        (SHAPES, "B. a blue square", "B"),
        (SHAPES, "(B) A blue square", "B"),
        (SHAPES, "B: blue square", "B"),
        (SHAPES, "A blue square, so B", "B"),
        (SHAPES, "A. a red circle", "A"),
        (SHAPES, "A) blue square", "A"),
        (SHAPES, "A\nblue square", "A"),
        (SHAPES, "B a red circle", "B"),
        (YES_NO, "No, the answer is A", "A"),
        # a letter alone
        (SHAPES, "A", "A"),
        (SHAPES, "A.", "A"),
        (SHAPES, "[C]", "C"),
        (SHAPES, "A is right", "A"),
        (SHAPES, "Answer: C", "C"),
        (LETTERS_AS_TEXTS, "A", "A"),
        (LETTERS_AS_TEXTS, "The answer is C", "C"),
        # none, or more than one
        (SHAPES, "A red circle or a blue square", ""),
        (SHAPES, "A green triangle lies there", ""),
        (SHAPES, "squares", ""),
    ],
)
def test_an_option_s_text_is_read_before_a_letter(options, answer, letter):
    assert find_letter(answer, "ABC"[: len(options)], options) == letter


def test_options_that_differ_in_an_article_alone_are_compared_with_it():
    assert [find_letter(said, ("A", "B"), ("a cat", "the cat")) for said in ("the cat", "A cat", "cat")] == [
        "B",
        "A",
        "",
    ]


def test_other_rules_are_another_protocol_of_generated_answers_only(template, monkeypatch):
    asked = Benchmark(
        name="toy", protocol="vanilla", fingerprint="", questions=tuple(group_rows([a_row()], "vanilla")), rows=()
    )

    def hashes() -> list[str]:
        return [MMBench(asked, scoring).protocol_hash(template) for scoring in ("generate", "letter")]

    before = hashes()
    monkeypatch.setattr("sft.evaluation.tasks.mmbench.multiple_choice.RULES", 0)
    assert [now == then for now, then in zip(hashes(), before, strict=True)] == [False, True]


# ---------------------------------------------------------------------------------------------------- submission


def a_result(*predictions: tuple[int, str]) -> Result:
    return Result(
        benchmark="toy", protocol_hash="abc",
        outcomes=tuple(
            Outcome(
                item=index, cluster="x", image_sha256="x", category="", score=math.nan, details={"rotations": [
                    asdict(AskedRow(index=index, answer="", prediction=letter, log_probs={}, num_tokens={}))
                ]},
            )
            for index, letter in predictions
        ),
    )  # fmt: skip


def test_a_submission_has_a_line_for_each_row_and_formulas_stay_text(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    rows = [a_row(7, options=("=1+1", "None", "a\x01b")), a_row(8), a_row(9)]
    write_submission(tmp_path / "s.xlsx", rows, a_result((7, "C"), (8, "")))
    sheet = openpyxl.load_workbook(tmp_path / "s.xlsx").active
    assert list(sheet.iter_rows(values_only=True)) == [
        ("index", "question", "A", "B", "C", "D", "prediction"),
        (7, "Which?", "=1+1", "None", "ab", None, "C"),
        (8, "Which?", "cat", "dog", "cow", None, "Z"),
        (9, "Which?", "cat", "dog", "cow", None, "Z"),
    ]
    assert sheet["C2"].data_type == "s"


def test_a_submission_that_would_lack_rows_is_refused(tmp_path):
    pytest.importorskip("openpyxl")
    rows = [row for row in ROWS if row.index % PASS < 2]
    every, first = (
        Benchmark(name="toy", protocol=p, fingerprint="", questions=tuple(group_rows(rows, p)), rows=tuple(rows))
        for p in ("circular", "vanilla")
    )
    check_submission(tmp_path / "s.xlsx", every, ("letter",))
    with pytest.raises(UserError, match="every row of the file, 4 of 6 are not asked"):
        check_submission(tmp_path / "s.xlsx", first, ("letter",))
    with pytest.raises(UserError, match=r"expected the name of an \.xlsx file"):
        check_submission(tmp_path / "s.csv", every, ("letter",))
    with pytest.raises(UserError, match="one ranking, found letter, text"):
        check_submission(tmp_path / "s.xlsx", every, ("letter", "text"))


def test_an_empty_file_is_no_benchmark(tmp_path):
    (tmp_path / "empty.tsv").write_text("index\tquestion\tA\tB\timage\n")
    with pytest.raises(UserError, match=r"empty\.tsv: no questions found"):
        load_benchmark(tmp_path / "empty.tsv")
