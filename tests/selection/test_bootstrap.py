"""Every statistic on numbers that can be checked by hand, or against scipy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sft.evaluation.results import clustered_standard_error
from sft.selection.bootstrap import (
    bootstrap_scores,
    choose_best,
    cross_fitted,
    detectable_difference,
    disagreements,
    intervals,
    mean_scores,
    not_worse,
    share_best,
    should_stop,
    standard_errors,
)


def single(number: int) -> np.ndarray:
    """Each question is a cluster of its own."""
    return np.arange(number).astype(str)


def discordant(only_first: int, only_second: int, both: int = 0) -> np.ndarray:
    """Two models: questions that only the first, only the second, or both answer right."""
    first = [1] * only_first + [0] * only_second + [1] * both
    second = [0] * only_first + [1] * only_second + [1] * both
    return np.array([first, second], dtype=float)


# --------------------------------------------------------------------------------------------------- the bootstrap


def test_the_earlier_of_equal_models_is_chosen():
    assert choose_best(np.array([0.2, 0.1 + 0.2, 0.3])) == 1


def test_a_draw_is_the_same_for_all_models():
    values = np.random.default_rng(0).random((2, 50))
    values[1] = values[0] + 0.25
    draws = bootstrap_scores(values, single(50), seed=0, num_draws=200)
    assert draws[:, 1] - draws[:, 0] == pytest.approx(0.25)


def test_whole_clusters_are_drawn():
    values = np.array([[1, 1, 1, 0.0]])
    draws = bootstrap_scores(values, np.array(["a", "a", "a", "b"]), seed=0, num_draws=500)
    assert set(np.unique(draws)) == {0, 0.75, 1}  # b twice, each once, a twice


def test_a_weight_counts_a_question_as_often():
    values, weights = np.array([[1.0, 4.0]]), np.array([3.0, 1.0])
    assert mean_scores(values, weights) == pytest.approx(7 / 4)
    draws = bootstrap_scores(values, single(2), weights_Q=weights, seed=0, num_draws=200)
    assert set(np.unique(draws)) == {1, 7 / 4, 4}


@pytest.mark.parametrize("questions_per_cluster", [1, 4])
def test_standard_errors_are_those_of_the_formula_for_clusters(questions_per_cluster):
    rng = np.random.default_rng(1)
    clusters = (np.arange(800) // questions_per_cluster).astype(str)
    values = (rng.random(800) + rng.random(800)[np.arange(800) // questions_per_cluster] < 1.3).astype(float)
    draws = bootstrap_scores(values[None], clusters, seed=0)
    assert standard_errors(draws)[0] == pytest.approx(clustered_standard_error(values, clusters.tolist()), rel=0.03)


def test_intervals_are_those_of_scipy():
    rng = np.random.default_rng(2)
    sums, sizes = rng.integers(0, 4, 300).astype(float), np.full(300, 3.0)
    found = intervals(bootstrap_scores((sums / sizes)[None], single(300), seed=0))[0]
    expected = stats.bootstrap((sums / sizes,), np.mean, n_resamples=10_000, method="percentile", rng=0)
    assert found == pytest.approx(np.array(expected.confidence_interval), abs=0.002)


def test_a_paired_difference_has_the_error_of_its_disagreements():
    """SE = sqrt(d / n) where a share d of n questions is answered right by one of two equal models."""
    draws = bootstrap_scores(discordant(58, 58, both=1048), single(1164), seed=0)
    assert standard_errors(draws[:, [0]] - draws[:, [1]])[0] == pytest.approx(np.sqrt(116 / 1164**2), rel=0.03)


def test_equals_share_the_probability_of_being_best():
    assert share_best(np.array([[0.5, 0.5, 0.1], [0.2, 0.4, 0.3]])).tolist() == [0.25, 0.75, 0]


# ------------------------------------------------------------------------------- what may be the best, and what not


@pytest.mark.parametrize(("ahead", "behind"), [(30, 30), (38, 22), (40, 20), (45, 15)])
def test_of_two_models_the_worse_one_is_out_when_mcnemars_test_says_so(ahead, behind):
    values = discordant(ahead, behind, both=400)
    draws = bootstrap_scores(values, single(values.shape[1]), seed=0)
    is_worse = stats.binomtest(behind, ahead + behind, alternative="less").pvalue < 0.05
    assert not_worse(mean_scores(values), draws).tolist() == [True, not is_worse]


@pytest.mark.parametrize("seed", range(8))
def test_of_several_models_those_are_out_that_dunnetts_test_finds_behind_some_other(seed):
    """Dunnett's test compares several independent groups with one of them, all at once."""
    rng = np.random.default_rng(seed)
    values = rng.normal(np.array([[0.0], [0.2], [0.3], [0.31]]), 1, (4, 400))
    kept = not_worse(mean_scores(values), bootstrap_scores(values, single(400), seed=0))
    for number in range(4):
        others = [values[other] for other in range(4) if other != number]
        p = stats.dunnett(*others, control=values[number], alternative="greater", rng=0).pvalue.min()
        if abs(p - 0.05) > 0.02:  # where two tests of the same thing have to agree
            assert kept[number] == (p > 0.05)


def test_models_that_answer_alike_are_never_told_apart():
    values = np.tile((np.arange(60) % 3 == 0).astype(float), (3, 1))
    draws = bootstrap_scores(values, single(60), seed=0, num_draws=500)
    assert not_worse(mean_scores(values), draws).all()
    assert detectable_difference(mean_scores(values), draws) == 0


def test_a_lead_on_every_question_is_certain():
    values = np.array([[0.5] * 20, [0.6] * 20])
    draws = bootstrap_scores(values, single(20), seed=0, num_draws=500)
    assert not_worse(mean_scores(values), draws).tolist() == [False, True]


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(2, 40))
def test_the_best_is_always_among_those_that_may_be(seed, num_models, num_questions):
    values = (np.random.default_rng(seed).random((num_models, num_questions)) < 0.5).astype(float)
    draws = bootstrap_scores(values, single(num_questions), seed=seed, num_draws=100)
    scores = mean_scores(values)
    assert not_worse(scores, draws)[choose_best(scores)]


def test_the_detectable_difference_of_two_is_that_of_a_one_sided_z_test():
    values = discordant(60, 56, both=1048)
    draws = bootstrap_scores(values, single(1164), seed=0)
    error = np.sqrt(116 / 1164**2)
    difference = detectable_difference(mean_scores(values), draws)
    assert difference == pytest.approx((stats.norm.ppf(0.95) + stats.norm.ppf(0.8)) * error, rel=0.04)
    assert stats.norm.sf(stats.norm.ppf(0.95) - difference / error) == pytest.approx(0.8, abs=0.03)


def test_a_model_that_is_further_behind_disagrees_more():
    values = discordant(30, 30, both=540)  # a share of 0.1 of 600 questions
    assert disagreements(values).tolist() == pytest.approx([0, 0.1])
    draws = bootstrap_scores(values, single(600), seed=0)
    difference = detectable_difference(mean_scores(values), draws, disagreements_K=disagreements(values))
    error = np.sqrt((np.hypot(0.1, difference) - difference**2) / 600)
    assert difference == pytest.approx((stats.norm.ppf(0.95) + stats.norm.ppf(0.8)) * error, rel=0.04)


# ------------------------------------------------------------------------------------------ what choosing is worth


def figure(values, halves) -> float:
    fitted = cross_fitted(values, np.array(halves), lambda mask: choose_best(mean_scores(values[:, mask])))
    return float(fitted.mean())


def test_each_half_is_scored_by_the_choice_on_the_other():
    values = np.array([[1, 1, 0, 0], [0, 0, 1, 0.5]])
    # Chosen on half 0: the first, which scores 0 on half 1. Chosen on half 1: the second, 0 on half 0.
    assert figure(values, [0, 0, 1, 1]) == 0
    assert figure(values, [0, 1, 0, 1]) == pytest.approx((0.5 + 0.5) / 2)


def test_the_best_of_equal_models_is_reported_without_optimism():
    rng = np.random.default_rng(0)
    chosen_on, fitted = [], []
    for _ in range(300):
        hits = (rng.random((8, 100)) < 0.6).astype(float)
        chosen_on.append(mean_scores(hits).max())
        fitted.append(figure(hits, np.arange(100) % 2))
    assert np.mean(chosen_on) > 0.65  # what the best of 8 looks like
    assert np.mean(fitted) == pytest.approx(0.6, abs=0.01)


# ------------------------------------------------------------------------------------------------------- patience


@pytest.mark.parametrize(
    ("scores", "patience", "stops"),
    [
        ([0.1, 0.2, 0.3], 1, False),
        ([0.1, 0.3, 0.2], 1, True),
        ([0.1, 0.3, 0.3], 1, True),  # no better is no progress
        ([0.1, 0.3, 0.2], 2, False),  # the best is one evaluation ago
        ([0.3, 0.2, 0.1], 2, True),
        ([0.3, 0.2, 0.4], 2, False),
        ([0.3], 1, False),
        ([], 3, False),
    ],
)
def test_training_stops_after_so_many_scores_without_a_better_one(scores, patience, stops):
    assert should_stop(scores, patience) is stops
