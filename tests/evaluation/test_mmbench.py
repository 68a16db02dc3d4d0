"""Reading files of MMBench layout, their rotations and prompts, and the benchmark made of easy-vqa."""

import base64
import csv
import io
import random
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from sft.core.errors import UserError
from sft.core.sample import ImageRef
from sft.evaluation.tasks.mmbench import from_easy_vqa
from sft.evaluation.tasks.mmbench.protocols import group_rows
from sft.evaluation.tasks.mmbench.questions import PASS, read_tsv, rotate

COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category"]


def png(color: str) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def a_row(**fields: object) -> dict[str, object]:
    return dict(index=7, question="Which?", A="cat", B="dog", C="cow", answer="B", image=png("red")) | fields


def write(path: Path, *rows: dict[str, object], columns: list[str] = COLUMNS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def tsv(tmp_path: Path) -> Path:
    return tmp_path / "toy.tsv"


def test_options_spelled_none_and_na_are_options_and_empty_ones_are_not(tsv):
    (row,) = read_tsv(write(tsv, a_row(A="None", B="NA", C="null", D="")))
    assert row.letters == ("A", "B", "C")
    assert row.options == ("None", "NA", "null")


def test_an_image_field_may_be_the_index_of_the_row_that_holds_the_image(tsv):
    rows = read_tsv(write(tsv, a_row(index=7 + PASS, image=7), a_row(), a_row(index=8, image=png("blue"))))
    assert rows[0].image == rows[1].image != rows[2].image
    assert rows[0].image_sha256 == rows[1].image_sha256 != rows[2].image_sha256


def test_a_field_may_be_larger_than_the_csv_modules_limit(tsv):
    noise = Image.frombytes("RGB", (300, 300), random.Random(0).randbytes(270_000))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    assert len(buffer.getvalue()) > 131_072, "the limit of the module"
    (row,) = read_tsv(write(tsv, a_row(image=base64.b64encode(buffer.getvalue()).decode())))
    assert row.image == ImageRef(source=buffer.getvalue())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": "9"}, "line 2: image is '9', but no row of that index holds an image"),
        ({"image": "no image!"}, "line 2: image is neither base64 nor the index of a row"),
        ({"image": base64.b64encode(b"not a picture").decode()}, "line 2: image does not decode"),
        ({"answer": "D"}, "line 2: answer is 'D', expected one of A, B, C"),
        ({"B": "", "C": ""}, "line 2: found 1 options, expected at least A and B"),
        ({"index": "x"}, "line 2: index is 'x', expected a whole number"),
    ],
)
def test_a_wrong_row_is_one_line_that_names_file_and_line(tsv, fields, message):
    with pytest.raises(UserError) as error:
        read_tsv(write(tsv, a_row(**fields)))
    assert str(error.value) == f"{tsv}, {message}"


def test_missing_columns_are_named_with_those_found(tsv):
    with pytest.raises(UserError, match=r"missing columns image; found index, question, A, B$"):
        read_tsv(write(tsv, a_row(), columns=["index", "question", "A", "B"]))


LEGACY = ("index", "question", "hint", "A", "B", "C", "D", "answer", "image")
LAYOUTS = {
    "20230712, every row with its image": lambda rows: rows,
    "legacy, without categories": lambda rows: [{name: row[name] for name in LEGACY} for row in rows],
    "V11, the row that has the image": lambda rows: [rows[0], *(row | {"image": rows[0]["index"]} for row in rows[1:])],
    "CN, a capital and another order": lambda rows: [
        {name.replace("l2", "L2"): row[name] for name in reversed(row)} for row in rows
    ],
    "test, answers empty": lambda rows: [row | {"answer": ""} for row in rows],
    "test, no column of answers": lambda rows: [{k: v for k, v in row.items() if k != "answer"} for row in rows],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_release_is_read(tsv, layout):
    base = a_row(question="动物是什么?", hint="", D="", category="animal", **{"l2-category": "nature"})
    turns = ({}, dict(A="dog", B="cow", C="cat", answer="A"), dict(A="cow", B="cat", C="dog", answer="C"))
    passes = LAYOUTS[layout]([base | turn | {"index": 7 + k * PASS} for k, turn in enumerate(turns)])
    rows = read_tsv(write(tsv, *passes, columns=list(passes[0])))
    assert [row.options for row in rows] == [("cat", "dog", "cow"), ("dog", "cow", "cat"), ("cow", "cat", "dog")]
    assert [row.answer for row in rows] == ([""] * 3 if "test" in layout else ["B", "A", "C"])
    assert {row.l2_category for row in rows} == {"" if "legacy" in layout else "nature"}
    assert len({row.image for row in rows}) == 1
    (question,) = group_rows(rows, "circular")
    assert question.rotations == tuple(rows) == tuple(rotate(rows[0], by) for by in range(3))
    assert rotate(rows[2], 1) == rows[0]


def test_a_file_with_a_few_answers_missing_is_named(tsv):
    with pytest.raises(UserError, match="line 3: answer is '', expected one of A, B, C"):
        read_tsv(write(tsv, a_row(), a_row(index=8, answer="")))


def test_missing_files_and_repeated_indices_are_named(tsv):
    with pytest.raises(UserError, match=r"toy\.tsv: No such file"):
        read_tsv(tsv)
    with pytest.raises(UserError, match="line 3: index 7 appears twice"):
        read_tsv(write(tsv, a_row(), a_row()))


def test_rotating_moves_options_and_answer_together(tsv):
    (row,) = read_tsv(write(tsv, a_row()))
    assert [(r.index, r.options, r.answer) for r in (rotate(row, by) for by in range(3))] == [
        (7, ("cat", "dog", "cow"), "B"),
        (7 + PASS, ("dog", "cow", "cat"), "A"),
        (7 + 2 * PASS, ("cow", "cat", "dog"), "C"),
    ]


def test_circular_makes_rotations_where_the_file_has_none_and_keeps_its_own(tsv):
    rows = read_tsv(write(tsv, a_row(), a_row(index=8, C="", answer="A")))
    made = group_rows(rows, "circular")
    assert [len(question.rotations) for question in made] == [3, 2]
    everything = [row for question in made for row in question.rotations]
    assert group_rows(everything[::-1], "circular")[::-1] == made
    assert [question.rotations for question in group_rows(everything, "vanilla")] == [(rows[0],), (rows[1],)]
    assert [question.rotations for question in group_rows(everything, "card")] == [(row,) for row in everything]
    assert {question.cluster for question in group_rows(everything, "card")} == {rows[0].image_sha256}


def test_an_unknown_protocol_is_named():
    with pytest.raises(UserError, match="protocol: unknown 'round'"):
        group_rows([], "round")


@pytest.fixture(scope="module")
def real_benchmark(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("easy_vqa") / "easy_vqa_test.tsv"
    assert from_easy_vqa.write_benchmark(path, seed=0) == 2537
    return path


def test_easy_vqa_gives_every_open_test_question_in_all_rotations(real_benchmark):
    rows = read_tsv(real_benchmark)
    questions = group_rows(rows, "circular")
    assert len(questions) == 2537 and sum(len(q.rotations) for q in questions) == len(rows)
    assert Counter((q.first.category, len(q.rotations)) for q in questions) == {("shape", 3): 1257, ("color", 4): 1280}
    assert len({row.image_sha256 for row in rows}) <= 1000
    for question in questions[:200]:
        assert question.rotations == tuple(rotate(question.first, by) for by in range(len(question.rotations)))


def test_the_right_letter_of_easy_vqa_is_uniform_and_wrong_colours_differ_from_the_right_one(real_benchmark):
    firsts = [q.first for q in group_rows(read_tsv(real_benchmark), "vanilla")]
    for category, share in {"shape": 1 / 3, "color": 1 / 4}.items():
        answers = Counter(row.answer for row in firsts if row.category == category)
        assert all(abs(count / answers.total() - share) < 0.04 for count in answers.values())
    assert all(len(set(row.options)) == len(row.options) for row in firsts)


def test_the_same_seed_writes_the_same_file_and_another_seed_another(real_benchmark, tmp_path):
    from_easy_vqa.write_benchmark(tmp_path / "same.tsv", seed=0)
    from_easy_vqa.write_benchmark(tmp_path / "other.tsv", seed=1)
    assert (tmp_path / "same.tsv").read_bytes() == real_benchmark.read_bytes()
    assert (tmp_path / "other.tsv").read_bytes() != real_benchmark.read_bytes()
