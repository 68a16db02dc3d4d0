"""Choosing a checkpoint, on arrays that can be checked by hand and on simulated runs of known truth."""

import json

import numpy as np
import pytest

from sft.errors import UserError
from sft.evaluation.results import Asked, QuestionResult, Result, half_of, write_result
from sft.selection import (
    bootstrap_scores,
    choose_best,
    cross_fitted_score,
    read_results,
    select,
    select_best,
    share_best,
    table_lines,
    tied_with,
)


def result(hits: str, rank: str = "text", **fields: object) -> Result:
    """`x` is a hit; each question has an image of its own."""
    head = dict(benchmark="toy", protocol="circular", protocol_hash=f"hash-{rank}", rank=rank, blind=False)
    return Result(
        questions=tuple(
            QuestionResult(
                question=number,
                cluster=f"image {number}",
                image_sha256=f"image {number}",
                category="toy",
                rotations=(
                    Asked(
                        index=number,
                        answer="A",
                        prediction="A" if hit == "x" else "B",
                        log_probs={"A": -1.0, "B": -1.0},
                        num_tokens={},
                    ),
                ),
            )
            for number, hit in enumerate(hits)
        ),
        **head | fields,
    )


def test_the_earlier_of_equal_checkpoints_is_chosen():
    assert choose_best(np.array([[0, 1, 0], [1, 0, 1], [1, 1, 0]], dtype=float)) == 1


def test_a_bootstrap_draw_is_the_same_for_all_checkpoints():
    scores = np.random.default_rng(0).random((2, 50))
    scores[1] = scores[0] + 0.25
    draws = bootstrap_scores(scores, np.arange(50).astype(str), seed=0, num_draws=200)
    assert draws[:, 1] - draws[:, 0] == pytest.approx(0.25)


def test_a_bootstrap_draws_whole_clusters():
    scores = np.array([[1, 1, 1, 0.0]])
    draws = bootstrap_scores(scores, np.array(["a", "a", "a", "b"]), seed=0, num_draws=500)
    assert set(np.unique(draws)) == {0, 0.75, 1}  # b twice, each once, a twice


def test_the_spread_of_the_bootstrap_is_the_standard_error():
    hits = (np.random.default_rng(1).random((1, 400)) < 0.7).astype(float)
    draws = bootstrap_scores(hits, np.arange(400).astype(str), seed=0, num_draws=2000)
    assert draws.std() == pytest.approx(np.sqrt(hits.mean() * (1 - hits.mean()) / 400), rel=0.05)


def test_equals_share_the_probability_of_being_best():
    assert share_best(np.array([[0.5, 0.5, 0.1], [0.2, 0.4, 0.3]])).tolist() == [0.25, 0.75, 0]


def test_tied_are_those_whose_difference_to_the_best_may_be_zero():
    rng = np.random.default_rng(0)
    best = rng.normal(0.8, 0.01, 1000)
    draws = np.stack([best, best - rng.normal(0.01, 0.02, 1000), best - 0.1], axis=1)
    assert tied_with(draws, 0).tolist() == [True, True, False]


def test_cross_fitting_scores_each_half_by_the_choice_on_the_other():
    scores = np.array([[1, 1, 0, 0], [0, 0, 1, 0.5]])
    # Chosen on half 0: the first, which scores 0 on half 1. Chosen on half 1: the second, 0 on half 0.
    assert cross_fitted_score(scores, np.array([0, 0, 1, 1])) == 0
    assert cross_fitted_score(scores, np.array([0, 1, 0, 1])) == pytest.approx((0.5 + 0.5) / 2)


def test_choice_comes_from_one_half_and_figures_from_the_other():
    halves = [half_of(f"image {number}", seed=0) for number in range(40)]
    good_on_0 = "".join("-x"[half == 0] for half in halves)
    good_on_1 = "".join("-x"[half == 1] for half in halves)
    selection = select_best({10: (result(good_on_0),), 20: (result(good_on_1),)}, benchmark="toy", seed=0)
    assert selection.selected == "checkpoint-10"
    assert [score.score for score in selection.scores] == [0, 1]
    assert [score.p_best for score in selection.scores] == [0, 1]
    assert selection.tied == ("checkpoint-10",)
    assert selection.cross_fitted == 0
    assert selection.questions == (halves.count(0), halves.count(1))


def test_the_score_is_the_mean_over_rankings():
    results = {10: (result("-" * 40, "letter"), result("x" * 40)), 20: (result("-" * 40, "letter"), result("-" * 40))}
    selection = select_best(results, benchmark="toy", seed=0)
    assert [score.score for score in selection.scores] == [0.5, 0]
    assert selection.ranks == ("letter", "text")


def test_a_run_is_read_chosen_from_and_written(tmp_path):
    for step, hits in {10: "x---" * 10, 20: "xxx-" * 10, 100: "xx--" * 10}.items():
        for rank in ("text", "letter"):
            write_result(result(hits, rank), tmp_path, f"checkpoint-{step}")
    write_result(result("xxxx" * 10, blind=True, protocol_hash="blind"), tmp_path, "checkpoint-10")
    write_result(result("xxxx" * 10), tmp_path, "base")
    selection = select(tmp_path, benchmark="toy", seed=0)
    assert selection.selected == "checkpoint-20"
    written = json.loads((tmp_path / "selection.json").read_text())
    assert written.keys() >= {"by", "rule", "selected", "scores", "tied", "cross_fitted"}
    assert [score["checkpoint"] for score in written["scores"]] == ["checkpoint-10", "checkpoint-20", "checkpoint-100"]
    assert written["scores"][0].keys() == {"checkpoint", "step", "score", "standard_error", "p_best"}
    assert [line[0] for line in table_lines(selection)][2] == "*"
    assert select(tmp_path, benchmark="toy", seed=0) == selection


def test_a_run_without_comparable_evaluations_is_refused(tmp_path):
    with pytest.raises(UserError, match="no evaluations of checkpoints found"):
        read_results(tmp_path, "toy")
    write_result(result("xx"), tmp_path, "checkpoint-10")
    write_result(result("xx", "letter"), tmp_path, "checkpoint-10")
    write_result(result("xx"), tmp_path, "checkpoint-20")
    with pytest.raises(UserError, match="checkpoint-20 lacks some of the rankings letter, text"):
        read_results(tmp_path, "toy")
    write_result(result("xx", "letter", protocol_hash="other"), tmp_path, "checkpoint-20")
    with pytest.raises(UserError, match="evaluations by letter of several protocols found"):
        read_results(tmp_path, "toy")
    assert list(read_results(tmp_path, "toy", ["hash-text"])) == [10, 20]


def test_checkpoints_that_were_asked_other_questions_are_refused():
    with pytest.raises(UserError, match="checkpoint-20: was asked other questions"):
        select_best({10: (result("x" * 40),), 20: (result("x" * 39),)}, benchmark="toy", seed=0)
    with pytest.raises(UserError, match="a half of its images has no questions"):
        select_best({10: (result("x"),)}, benchmark="toy", seed=0)


def test_the_best_of_equal_checkpoints_is_reported_without_optimism():
    rng = np.random.default_rng(0)
    chosen_on, cross_fitted = [], []
    halves = np.arange(100) % 2
    for _ in range(300):
        hits = (rng.random((8, 100)) < 0.6).astype(float)
        chosen_on.append(hits[choose_best(hits)].mean())
        cross_fitted.append(cross_fitted_score(hits, halves))
    assert np.mean(chosen_on) > 0.65  # what the best of 8 looks like
    assert np.mean(cross_fitted) == pytest.approx(0.6, abs=0.01)
