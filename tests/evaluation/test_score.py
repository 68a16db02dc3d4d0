"""Scores, their errors, and their files, on toys that can be checked by hand."""

import math

import numpy as np
import pytest

from sft.core.errors import UserError
from sft.evaluation.results import (
    Asked,
    QuestionResult,
    Result,
    clustered_standard_error,
    effective_size,
    find_result,
    half_of,
    in_random_order,
    read_result,
    wilson_interval,
    write_result,
)


def question(number: int, image: str, predictions: str, answers: str = "AB", category: str = "toy") -> QuestionResult:
    return QuestionResult(
        question=number,
        cluster=image,
        image_sha256=image,
        category=category,
        rotations=tuple(
            Asked(index=number, answer=a, prediction=p, log_probs={"A": -1.0, "B": -2.0}, num_tokens={"A": 1, "B": 1})
            for a, p in zip(answers, predictions, strict=True)
        ),
    )


def result(*questions: QuestionResult, **fields: object) -> Result:
    head = dict(benchmark="toy", protocol="circular", protocol_hash="abc", rank="letter", blind=False)
    return Result(questions=questions, **head | fields)


def test_a_question_is_hit_only_when_every_rotation_is_right():
    toy = result(question(1, "x", "AB"), question(2, "x", "AA"), question(3, "y", "BA"), question(4, "z", "AB"))
    assert [q.hit for q in toy.questions] == [True, False, False, True]
    assert toy.accuracy == 0.5
    assert toy.chance == 0.5
    assert toy.letters == {"A": 5 / 8, "B": 3 / 8}


def test_categories_have_their_own_accuracy():
    toy = result(question(1, "x", "AB", category="b"), question(2, "x", "AA", category="b"), question(3, "y", "AB"))
    assert toy.categories == {"b": {"questions": 2, "accuracy": 0.5}, "toy": {"questions": 1, "accuracy": 1.0}}


def test_guessing_anew_in_every_rotation_is_less_than_staying_with_an_option():
    toy = result(question(1, "x", "AB"), question(2, "y", "A", answers="A"))
    assert (toy.chance, toy.independent_chance) == (0.5, (1 / 4 + 1 / 2) / 2)


def test_without_answers_there_is_no_score():
    toy = result(question(1, "x", "AB", answers=("", "")))
    summary = toy.summary()
    assert not toy.has_answers
    assert [summary[key] for key in ("accuracy", "standard_error", "interval", "categories")] == [None, None, None, {}]
    assert (summary["questions"], summary["rows"], summary["letters"]) == (1, 2, {"A": 0.5, "B": 0.5})


def test_an_empty_half_is_refused_rather_than_scored():
    toy = result(question(1, "x", "AB"))
    with pytest.raises(UserError, match="toy: a half of its images has no questions"):
        toy.on_half(1 - half_of("x", seed=0), seed=0)


def test_rows_asked_by_themselves_have_the_error_of_their_question():
    rows = [question(n, f"image {n}", p, answers="A") for n in range(4) for p in ("AAA" if n < 2 else "BBB")]
    toy = result(*rows, protocol="card")
    assert toy.accuracy == 0.5
    assert toy.standard_error == pytest.approx(math.sqrt(0.25 / 4))  # of four questions, not of twelve rows
    assert (toy.summary()["questions"], toy.summary()["rows"]) == (4, 12)


def test_categories_count_questions_as_the_whole_does():
    rows = [question(n, "image", p, answers="A") for n in range(2) for p in "AAB"]
    summary = result(*rows, protocol="card").summary()
    assert sum(part["questions"] for part in summary["categories"].values()) == summary["questions"] == 2


def test_one_image_says_nothing_of_the_spread_between_images():
    rows = [question(n, "image", "A" if n % 3 else "B", answers="A") for n in range(14)]
    toy = result(*rows)
    assert toy.standard_error == pytest.approx(0, abs=1e-12)
    assert toy.interval == pytest.approx(wilson_interval(toy.accuracy, 1))


def test_a_summary_compares_with_the_same_rows_without_images():
    seen, blind = result(question(1, "x", "AB")), result(question(1, "x", "AB"), question(2, "y", "AA"), blind=True)
    assert blind.accuracy == 0.5
    assert blind.on_questions_of(seen).accuracy == 1


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


def test_effective_size_of_independent_questions_is_their_number():
    assert effective_size(0.25, math.sqrt(0.25 * 0.75 / 40), num_clusters=40) == pytest.approx(40)
    assert effective_size(1.0, 0.0, num_clusters=7) == 7


def test_the_interval_covers_the_truth_although_questions_share_images():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        shares = rng.beta(4, 2, size=60)  # images differ in difficulty; the mean is 2/3
        hits = (rng.random((60, 4)) < shares[:, None]).ravel().astype(float)
        error = clustered_standard_error(hits, np.repeat(np.arange(60), 4).astype(str).tolist())
        low, high = wilson_interval(hits.mean(), effective_size(hits.mean(), error, 60))
        covered += low <= 2 / 3 <= high
    assert covered / 400 == pytest.approx(0.95, abs=0.03)


def test_halves_keep_an_image_together_and_depend_on_the_seed():
    images = [f"image {i}" for i in range(1000)]
    halves = [half_of(image, seed=0) for image in images]
    assert halves == [half_of(image, seed=0) for image in images] != [half_of(image, seed=1) for image in images]
    assert sum(halves) == pytest.approx(500, abs=60)
    toy = result(*(question(i, image, "AB") for i, image in enumerate(images[:20])))
    first, second = toy.on_half(0, seed=0), toy.on_half(1, seed=0)
    assert len(first.questions) + len(second.questions) == 20
    assert {q.image_sha256 for q in first.questions}.isdisjoint(q.image_sha256 for q in second.questions)


def test_random_order_depends_on_content_and_seed_alone():
    assert in_random_order(["a", "b", "c", "a"], 0) == in_random_order(["c", "b", "a"], 0)
    assert len({tuple(in_random_order(["a", "b", "c"], seed)) for seed in range(30)}) == 6


def test_what_is_written_is_read_back(tmp_path):
    toy = result(question(1, "x", "AB"), question(2, "y", "AA"), weights="w1", filtered={"too long": (3,)}, shots=2)
    file = write_result(toy, tmp_path, "checkpoint-20")
    assert file == tmp_path / "evaluations" / "toy" / "abc" / "checkpoint-20.json"
    assert sorted(path.name for path in file.parent.iterdir()) == ["checkpoint-20.json", "checkpoint-20.jsonl"]
    assert read_result(file) == toy


def test_a_result_of_other_weights_is_not_found(tmp_path):
    toy = result(question(1, "x", "AB"), weights="w1")
    write_result(toy, tmp_path, "base")
    assert find_result(tmp_path, "toy", "abc", "base", weights="w1") == toy
    assert find_result(tmp_path, "toy", "abc", "base", weights="w2") is None
    assert find_result(tmp_path, "toy", "abc", "checkpoint-20", weights="w1") is None


def test_the_summary_has_the_keys_of_the_contract():
    summary = result(question(1, "x", "AB")).summary(blind_accuracy=0.25)
    contract = "benchmark protocol protocol_hash rank shots questions accuracy standard_error interval chance blind"
    assert summary.keys() >= {*contract.split(), "categories", "letters"}
    assert summary["blind"] == 0.25
