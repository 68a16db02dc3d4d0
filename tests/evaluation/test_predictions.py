"""Predictions of other programs: the forms that are read, and what is wrong with them."""

import json

import pytest
from conftest import status_of
from helpers.training import printed
from test_card_tasks import WRITERS

FORMS = [
    ("okvqa", [{"question_id": 10 * n, "answer": "dog" if n > 1 else "cat"} for n in (1, 2, 3, 4)], 0.75),
    ("vizwiz", [{"image": f"VizWiz_val_{n:08d}.jpg", "answer": "Unanswerable."} for n in range(4)], 1.0),
    ("scienceqa", [{"id": n, "answer": "A"} for n in range(3)], 2 / 3),
    ("hateful_memes", [{"id": 1000 + n, "scores": [n % 2, 0.5]} for n in range(6)], 1.0),
    ("winoground", [{"id": n, "scores": [[0, -1], [-2, 0 if n else -3]]} for n in range(3)], 2 / 3),
    ("visdial", [{"image_id": 7 + n, "round_id": r, "ranks": [2, 1, *range(3, 101)]} for n in range(3) for r in (1, 2)],
     1.0),
    ("fairface", [{"id": f"val/{n}.jpg", "gender": "male"} for n in range(3)], 2 / 3),
]  # fmt: skip


@pytest.mark.parametrize(("name", "lines", "score"), FORMS, ids=[form[0] for form in FORMS])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_official_forms_are_scored_without_images(tmp_path, capsys, name, lines, score, suffix):
    WRITERS[name](tmp_path)
    for image in [*tmp_path.rglob("*.jpg"), *tmp_path.rglob("*.png")]:
        image.unlink()
    file = tmp_path / f"predictions{suffix}"
    file.write_text(json.dumps(lines) if suffix == ".json" else "\n".join(map(json.dumps, lines)))
    summary, said = printed(capsys, "score", name, "--predictions", file, "--data", tmp_path)
    assert summary["score"] == pytest.approx(score)
    assert ("3 of 6 predictions are of no item of visdial, the first is 7 round 1" in said) == (name == "visdial")


def test_a_csv_of_probabilities_is_scored(tmp_path, capsys):
    WRITERS["hateful_memes"](tmp_path)
    rows = [f"{1000 + n},{0.9 if n == 1 else 0.2},{n % 2}" for n in range(6)]
    (tmp_path / "p.csv").write_text("\n".join(["id,proba,label", *rows]))
    summary, _ = printed(capsys, "score", "hateful_memes", "--predictions", tmp_path / "p.csv", "--data", tmp_path)
    assert summary["score"] == pytest.approx((3 + 6 * 0.5) / 9)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([], "4 items have no prediction, the first is 10"),
        ([{"answer": "dog"}], "prediction 1 has no id; expected one of id, question_id"),
        ([{"question_id": 10, "answer": "a"}] * 2, "question_id 10 has two predictions"),
        ([{"question_id": 10 * n, "text": "dog"} for n in (1, 2, 3, 4)], "has no answer or caption"),
        (3, "not of the official layout"),
    ],
)
def test_what_is_wrong_with_predictions_is_one_line(tmp_path, capsys, lines, problem):
    WRITERS["okvqa"](tmp_path)
    (tmp_path / "p.json").write_text(json.dumps(lines))
    assert status_of("score", "okvqa", "--predictions", tmp_path / "p.json", "--data", tmp_path) == 2
    assert problem in capsys.readouterr().err.replace("\n", " ")


def test_scores_that_are_no_numbers_are_one_line(tmp_path, capsys):
    WRITERS["scienceqa"](tmp_path)
    (tmp_path / "p.json").write_text(json.dumps([{"id": n, "scores": ["high", "low"]} for n in range(3)]))
    assert status_of("score", "scienceqa", "--predictions", tmp_path / "p.json", "--data", tmp_path) == 2
    assert "not of the official layout (could not convert string to float" in capsys.readouterr().err.replace("\n", " ")
