"""Scores, their errors, and their files, on toys that can be checked by hand."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from sft.core.metric import ACCURACY, LOSS
from sft.core.sample import ImageRef
from sft.evaluation.draw_images import in_random_order
from sft.evaluation.results import Outcome, Result, find_result, result_file, write_result
from sft.evaluation.statistics import clustered_standard_error, score_interval, t_quantile, wilson_interval
from sft.evaluation.tasks.mmbench.benchmark import Benchmark
from sft.evaluation.tasks.mmbench.multiple_choice import (
    AskedRow,
    MMBench,
    chance,
    independent_chance,
    predicted_letters,
)
from sft.evaluation.tasks.mmbench.questions import Question, Row


def question(number: int, image: str, predictions: str, answers: str = "AB", category: str = "toy") -> Outcome:
    """A question with a row for each prediction; it is a hit when all of them are right, null without answers."""
    rows = [
        AskedRow(index=number, answer=a, prediction=p, log_probs={"A": -1.0, "B": -2.0}, num_tokens={"A": 1, "B": 1})
        for a, p in zip(answers, predictions, strict=True)
    ]
    hit = all(row.answer == row.prediction for row in rows) if all(answers) else None
    return Outcome(
        item=number,
        cluster=image,
        image_sha256=image,
        category=category,
        score=math.nan if hit is None else float(hit),
        details={"rotations": [asdict(row) | {"letters": []} for row in rows], "l2_category": "", "hit": hit},
    )


def result(*questions: Outcome, **fields: object) -> Result:
    return Result(outcomes=questions, **dict(benchmark="toy", protocol_hash="abc") | fields)


def task(protocol: str = "circular") -> MMBench:
    row = Row(
        index=0, question="", hint="", letters=("A", "B"), options=("a", "b"), answer="A", category="",
        l2_category="", image=ImageRef(source=b""), image_sha256="",
    )  # fmt: skip
    only = (Question(rotations=(row,), cluster="x"),)
    return MMBench(Benchmark(name="toy", protocol=protocol, fingerprint="", questions=only), "letter")


def summary(toy: Result, protocol: str = "circular", **options: object) -> dict:
    return task(protocol).summary(toy, **options)


def interval(toy: Result) -> tuple[float, float]:
    return toy.interval(ACCURACY)


def find(run, checkpoint: str, weights: str) -> Result | None:
    return find_result(run, "toy", "abc", checkpoint, weights=weights, num_rows=task().num_rows)


def test_a_question_is_hit_only_when_every_rotation_is_right():
    toy = result(question(1, "x", "AB"), question(2, "x", "AA"), question(3, "y", "BA"), question(4, "z", "AB"))
    assert [outcome.score for outcome in toy.outcomes] == [1.0, 0.0, 0.0, 1.0]
    assert toy.score == 0.5
    assert chance(toy) == 0.5
    assert predicted_letters(toy) == {"A": 5 / 8, "B": 3 / 8}


def test_categories_have_their_own_accuracy():
    toy = result(question(1, "x", "AB", category="b"), question(2, "x", "AA", category="b"), question(3, "y", "AB"))
    assert summary(toy)["categories"] == {
        "b": {"questions": 2, "accuracy": 0.5},
        "toy": {"questions": 1, "accuracy": 1.0},
    }


def test_guessing_anew_in_every_rotation_is_less_than_staying_with_an_option():
    toy = result(question(1, "x", "AB"), question(2, "y", "A", answers="A"))
    assert (chance(toy), independent_chance(toy)) == (0.5, (1 / 4 + 1 / 2) / 2)


def test_without_answers_there_is_no_score():
    toy = result(question(1, "x", "AB", answers=("", "")))
    found = summary(toy)
    assert not toy.has_answers
    assert [found[key] for key in ("accuracy", "standard_error", "interval", "categories")] == [None, None, None, {}]
    assert (found["questions"], found["rows"], found["letters"]) == (1, 2, {"A": 0.5, "B": 0.5})


def test_rows_asked_by_themselves_have_the_error_of_their_question():
    rows = [question(n, f"image {n}", p, answers="A") for n in range(4) for p in ("AAA" if n < 2 else "BBB")]
    toy = result(*rows)
    assert toy.score == 0.5
    assert toy.standard_error == pytest.approx(math.sqrt(0.25 / 4))  # of four questions, not of twelve rows
    assert (summary(toy, "card")["questions"], summary(toy, "card")["rows"]) == (4, 12)


def test_categories_count_questions_as_the_whole_does():
    rows = [question(n, "image", p, answers="A") for n in range(2) for p in "AAB"]
    found = summary(result(*rows), "card")
    assert sum(part["questions"] for part in found["categories"].values()) == found["questions"] == 2


def test_one_image_says_nothing_of_the_spread_between_images():
    rows = [question(n, "image", "A" if n % 3 else "B", answers="A") for n in range(14)]
    toy = result(*rows)
    assert toy.standard_error == pytest.approx(0, abs=1e-12)
    assert interval(toy) == pytest.approx(wilson_interval(toy.score, 1, t_quantile(1)))
    assert interval(toy)[1] - interval(toy)[0] > 0.98


def test_a_summary_compares_with_the_same_rows_without_images():
    seen, blind = result(question(1, "x", "AB")), result(question(1, "x", "AB"), question(2, "y", "AA"))
    assert blind.score == 0.5
    assert blind.on_items_of(seen).score == 1


def test_standard_error_of_single_clusters_is_the_binomial_one():
    assert clustered_standard_error([1, 0, 0, 1, 1], list("abcde")) == pytest.approx(math.sqrt(0.6 * 0.4 / 5))


def test_questions_that_always_agree_within_a_cluster_count_as_one():
    assert clustered_standard_error([1, 1, 0, 0], list("aabb")) == pytest.approx(math.sqrt(0.25 / 2))
    assert clustered_standard_error([1, 0, 1, 0], list("aabb")) == 0
    assert clustered_standard_error([], []) == 0


def test_wilson_interval_is_that_of_scipy():
    scipy_stats = pytest.importorskip("scipy.stats")
    for hits in (0, 3, 10):
        expected = scipy_stats.binomtest(hits, 10).proportion_ci(method="wilson")
        assert wilson_interval(hits / 10, 10) == pytest.approx((expected.low, expected.high))
    assert wilson_interval(0.0, 0) == (0.0, 1.0)


def test_students_quantile_is_that_of_scipy():
    scipy_stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 5, 24, 1000):
        assert t_quantile(freedom) == pytest.approx(scipy_stats.t.ppf(0.975, freedom), abs=0.004)


@pytest.mark.parametrize(
    ("score", "error", "is_share", "size"),
    [
        (0.25, math.sqrt(0.25 * 0.75 / 40), True, 39),  # each image one question: as many as there are, but one
        (0.25, 0.01, True, 60),  # never more than were asked
        (0.25, math.sqrt(0.25 * 0.75 / 10), True, 9.75),  # questions that agree within an image count as fewer
        (1.0, 0.0, True, 40),  # nothing is known of the spread: each image counts once
        (2.5, 0.1, False, None),
    ],
)
def test_an_interval_is_wilsons_on_the_effective_number_of_questions_or_that_of_student(score, error, is_share, size):
    found = score_interval(score, error, num_clusters=40, num_questions=60, is_share=is_share)
    t, wide = t_quantile(39), error * math.sqrt(40 / 39)
    expected = wilson_interval(score, size, t) if size else (score - t * wide, score + t * wide)
    assert found == pytest.approx(expected)


def test_the_interval_covers_the_truth_although_questions_share_images():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        shares = rng.beta(4, 2, size=60)  # images differ in difficulty; the mean is 2/3
        hits = (rng.random((60, 4)) < shares[:, None]).ravel().astype(float)
        error = clustered_standard_error(hits, np.repeat(np.arange(60), 4).astype(str).tolist())
        low, high = score_interval(hits.mean(), error, 60, 240, is_share=True)
        covered += low <= 2 / 3 <= high
    assert covered / 400 == pytest.approx(0.95, abs=0.03)


def test_random_order_depends_on_content_and_seed_alone():
    assert in_random_order(["a", "b", "c", "a"], 0) == in_random_order(["c", "b", "a"], 0)
    assert len({tuple(in_random_order(["a", "b", "c"], seed)) for seed in range(30)}) == 6


def test_what_is_written_is_read_back(tmp_path):
    toy = result(question(1, "x", "AB"), question(2, "y", "AA"), weights="w1", filtered={"too long": [3]})
    file = write_result(toy, summary(toy), tmp_path, "checkpoint-20")
    assert file == tmp_path / "evaluations" / "toy" / "abc" / "checkpoint-20.json"
    assert sorted(path.name for path in file.parent.iterdir()) == ["checkpoint-20.json", "checkpoint-20.jsonl"]
    assert find(tmp_path, "checkpoint-20", "w1") == toy
    lines = file.with_suffix(".jsonl").read_text().splitlines()
    assert [json.loads(line)["hit"] for line in lines] == [True, False]
    file.with_suffix(".jsonl").write_text(lines[0] + "\n")
    assert find(tmp_path, "checkpoint-20", "w1") is None, "a line is missing"


def test_a_result_of_other_weights_is_not_found(tmp_path):
    toy = result(question(1, "x", "AB"), weights="w1")
    write_result(toy, summary(toy), tmp_path, "base")
    assert find(tmp_path, "base", "w1") == toy
    assert find(tmp_path, "base", "w2") is None
    assert find(tmp_path, "checkpoint-20", "w1") is None


def test_a_score_may_be_any_number_and_counts_by_its_weight(tmp_path):
    own = [Outcome(item=n, cluster=str(n), image_sha256="", category="", score=n / 4) for n in range(4)]
    toy = result(*own[:3], replace(own[3], weight=2.0))
    write_result(toy, {}, tmp_path, "base")
    lines = result_file(tmp_path, "toy", "abc", "base").with_suffix(".jsonl").read_text().splitlines()
    assert json.loads(lines[3]) == {
        "question": 3, "cluster": "3", "image_sha256": "", "category": "", "score": 0.75, "weight": 2.0,
    }  # fmt: skip
    assert find_result(tmp_path, "toy", "abc", "base", weights="") == toy
    assert toy.score == 0.45
    assert result(*own).standard_error == pytest.approx(np.std([0, 0.25, 0.5, 0.75]) / 2)
    losses = [replace(one, score=score, weight=weight) for one, score, weight in zip(own, (1, 4), (3, 1), strict=False)]
    assert result(*losses).score == 1.75
    low, high = result(*losses).interval(LOSS)
    assert low < 1.75 < high and high > 1


def test_the_summary_has_the_keys_of_the_contract():
    found = summary(result(question(1, "x", "AB")), blind_score=0.25)
    contract = "benchmark protocol protocol_hash rank shots questions accuracy standard_error interval chance blind"
    assert found.keys() >= {*contract.split(), "categories", "letters"}
    assert found["blind"] == 0.25
