"""Every statistic on numbers that can be checked by hand, or against scipy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sft.evaluation.statistics import clustered_standard_error
from sft.selection.bootstrap import (
    bootstrap_scores,
    choose_best,
    clearly_worse,
    compare_pair,
    cross_fitted,
    detectable_difference,
    not_worse,
    should_stop,
)
from sft.selection.clusters import Joint, joined, sum_by_cluster
from sft.selection.posterior import probability_best


def single(number: int) -> np.ndarray:
    """Each question is a cluster of its own."""
    return np.arange(number).astype(str)


def joint(values, clusters=None, weights=None) -> Joint:
    """One benchmark; each question is a cluster of its own where none are given."""
    clusters = single(values.shape[1]) if clusters is None else np.asarray(clusters)
    return Joint((sum_by_cluster(values, clusters, weights),))


def drawn(values, num_draws=10_000, **sums):
    """Scores and their draws."""
    own = joint(values, **sums)
    return own.scores, bootstrap_scores(own, seed=0, num_draws=num_draws)


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
    _, draws = drawn(values, 200)
    assert draws[:, 1] - draws[:, 0] == pytest.approx(0.25)


def test_whole_clusters_are_drawn():
    _, draws = drawn(np.array([[1, 1, 1, 0.0]]), 500, clusters=["a", "a", "a", "b"])
    assert set(np.unique(draws)) == {0, 0.75, 1}  # b twice, each once, a twice


def test_a_weight_counts_a_question_as_often():
    scores, draws = drawn(np.array([[1.0, 4.0]]), 200, weights=np.array([3.0, 1.0]))
    assert scores == pytest.approx(7 / 4)
    assert set(np.unique(draws)) == {1, 7 / 4, 4}


@pytest.mark.parametrize("questions_per_cluster", [1, 4])
def test_standard_errors_are_those_of_evaluate_and_of_the_bootstrap(questions_per_cluster):
    rng = np.random.default_rng(1)
    clusters = (np.arange(800) // questions_per_cluster).astype(str)
    values = (rng.random(800) + rng.random(800)[np.arange(800) // questions_per_cluster] < 1.3).astype(float)
    own = joint(values[None], clusters)
    assert own.figures()[0].standard_error == pytest.approx(clustered_standard_error(values, clusters.tolist()))
    assert bootstrap_scores(own, seed=0).std() == pytest.approx(own.figures()[0].standard_error, rel=0.03)


def test_a_paired_difference_has_the_error_of_its_disagreements():
    """SE = sqrt(d / n) where a share d of n questions is answered right by one of two equal models."""
    found = compare_pair(joint(discordant(58, 58, both=1048)), seed=0)
    assert found.difference == 0 and not found.is_better
    assert found.interval[1] == pytest.approx(stats.t.ppf(0.975, 1163) * np.sqrt(117 / 1164 / 1163), rel=1e-3)
    assert found.p_better == pytest.approx(0.5, abs=0.02)


def test_a_better_model_is_better_on_the_same_questions_in_either_order():
    values = discordant(40, 12, both=200)
    ahead, behind = (compare_pair(joint(own), seed=0) for own in (values, values[::-1]))
    assert ahead.is_better and not behind.is_better
    assert ahead.difference == -behind.difference == pytest.approx(28 / 252)
    assert ahead.p_better > 0.99 and behind.p_better < 0.01
    assert compare_pair(joint(values[:, :40]), seed=0).detectable_difference is None, "it is not said of 40 images"


# --------------------------------------------------------------------------------------------------------- P(best)


def test_where_no_score_has_an_error_the_highest_share_the_probability_of_being_best():
    assert probability_best(joint(np.array([[0.5] * 9, [0.5] * 9, [0.1] * 9])), seed=0).tolist() == [0.5, 0.5, 0]


def test_equal_models_are_not_called_better_by_the_luck_of_their_scores():
    by_bootstrap, said = [], []
    for seed in range(20):
        own = joint((np.random.default_rng(seed).random((6, 60)) < 0.7).astype(float))
        by_bootstrap.append(np.bincount(bootstrap_scores(own, seed=0, num_draws=500).argmax(axis=1)).max() / 500)
        said.append(probability_best(own, seed=0, is_curve=False, num_draws=500).max())
    assert np.mean(said) < np.mean(by_bootstrap) - 0.1


def test_a_neighbour_of_good_checkpoints_is_likelier_the_best_than_one_that_stands_alone():
    rng = np.random.default_rng(0)
    truth = np.array([0.5, 0.5, 0.66, 0.5, 0.5, 0.64, 0.66, 0.64])
    said = probability_best(joint(np.stack([rng.permutation(np.arange(200) < 200 * t) * 1.0 for t in truth])), seed=0)
    assert said[6] > 1.3 * said[2]
    alone = probability_best(joint(np.array([[1.0, 0, 1, 1, 0, 1]] * 3)), seed=0, is_curve=False)
    assert alone == pytest.approx(1 / 3)


# --------------------------------------------------------------------------------------------- several benchmarks


def test_a_flat_benchmark_counts_little_and_given_weights_count_as_given():
    rng = np.random.default_rng(0)
    steep = sum_by_cluster((rng.random((5, 400)) < np.linspace(0.2, 0.8, 5)[:, None]) * 1.0, single(400))
    flat = sum_by_cluster((rng.random((5, 400)) < 0.5) * 1.0, single(400))
    assert steep.reliability > 0.99 and flat.reliability < 0.6
    own, given = joined([steep, flat], [None, None]), joined([steep, flat], [1.0, 3.0])
    assert own.weights[0] > 0.6 and given.weights == (0.25, 0.75)
    z_scores = [(part.scores - part.scores.mean()) / part.scores.std() for part in (steep, flat)]
    assert given.scores == pytest.approx(0.25 * z_scores[0] + 0.75 * z_scores[1])
    assert joined([steep], [None]).scores == pytest.approx(steep.scores), "one alone keeps its own score"
    alike = sum_by_cluster(np.ones((5, 9)), single(9))
    assert joined([alike, alike], [None, None]).scores.tolist() == [0] * 5


def test_the_error_of_a_joint_score_is_that_of_items_drawn_within_each_benchmark():
    rng = np.random.default_rng(0)
    parts = [sum_by_cluster((rng.random((3, n)) < 0.6) * 1.0, single(n)) for n in (100, 300)]
    own = joined(parts, [0.5, 0.5])
    errors = [figure.standard_error for figure in own.figures()]
    assert bootstrap_scores(own, seed=0).std(axis=0) == pytest.approx(np.array(errors), rel=0.05)
    alone = Joint((parts[0],)).figures()[0]
    assert own._replace(parts=(parts[0],), factors=(1.0,), centers=(0.0,)).figures()[0] == alone


# ------------------------------------------------------------------------------- what may be the best, and what not


@pytest.mark.parametrize(("ahead", "behind"), [(30, 30), (38, 22), (40, 20), (45, 15)])
def test_of_two_models_the_worse_one_is_out_when_mcnemars_test_says_so(ahead, behind):
    scores, draws = drawn(discordant(ahead, behind, both=400))
    is_worse = stats.binomtest(behind, ahead + behind, alternative="less").pvalue < 0.05
    assert not_worse(scores, draws).tolist() == [True, not is_worse]
    assert clearly_worse(scores, draws, than=0).tolist() == [False, is_worse]
    assert clearly_worse(scores, draws, than=1).tolist() == [False, False]


@pytest.mark.parametrize("seed", range(8))
def test_of_several_models_those_are_out_that_dunnetts_test_finds_behind_some_other(seed):
    """Dunnett's test compares several independent groups with one of them, all at once."""
    rng = np.random.default_rng(seed)
    values = rng.normal(np.array([[0.0], [0.2], [0.3], [0.31]]), 1, (4, 400))
    kept = not_worse(*drawn(values))
    for number in range(4):
        others = [values[other] for other in range(4) if other != number]
        p = stats.dunnett(*others, control=values[number], alternative="greater", rng=0).pvalue.min()
        if abs(p - 0.05) > 0.02:  # where two tests of the same thing have to agree
            assert kept[number] == (p > 0.05)


def test_models_that_answer_alike_are_never_told_apart():
    values = np.tile((np.arange(60) % 3 == 0).astype(float), (3, 1))
    assert not_worse(*drawn(values, 500)).all()
    assert not clearly_worse(*drawn(values, 500), than=0).any()
    assert detectable_difference(*drawn(values, 500), 100) == 0


def test_a_lead_on_every_question_is_certain():
    values = np.array([[0.5] * 20, [0.6] * 20])
    assert not_worse(*drawn(values, 500)).tolist() == [False, True]


def test_those_that_are_clearly_behind_do_not_make_the_set_larger():
    rng = np.random.default_rng(0)
    quality = np.r_[np.full(20, 0.2), 0.7, 0.78]
    values = (rng.random((22, 400)) < quality[:, None]).astype(float)
    scores, draws = drawn(values)
    assert not_worse(scores, draws).sum() == 2 and not_worse(scores, draws, 400).sum() == 1


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(2, 40))
def test_the_best_is_always_among_those_that_may_be(seed, num_models, num_questions):
    values = (np.random.default_rng(seed).random((num_models, num_questions)) < 0.5).astype(float)
    scores, draws = drawn(values, 100)
    assert not_worse(scores, draws, num_questions)[choose_best(scores)]


def test_the_detectable_difference_of_two_is_that_of_a_one_sided_z_test():
    error = np.sqrt(116 / 1164**2)
    drawn_scores = drawn(discordant(60, 56, both=1048))
    difference = detectable_difference(*drawn_scores, 1164)
    assert detectable_difference(*drawn_scores, 99) is None, "it is not said of few images"
    assert difference == pytest.approx((stats.norm.ppf(0.95) + stats.norm.ppf(0.8)) * error, rel=0.04)
    assert stats.norm.sf(stats.norm.ppf(0.95) - difference / error) == pytest.approx(0.8, abs=0.03)


# ------------------------------------------------------------------------------------------ what choosing is worth


def worth(values, clusters=None) -> float:
    return cross_fitted(joint(values, clusters), lambda half: choose_best(half.scores), seed=0)[0]


def test_each_half_is_scored_by_the_choice_on_the_other():
    values = np.array([[1, 1, 0, 0], [0, 0, 1, 0.5]])
    assert worth(values, ["a", "a", "b", "b"]) == 0, "what is best on one of two images is worst on the other"
    assert worth(values[:, ::-1], ["b", "b", "a", "a"]) == 0


def test_the_order_of_the_questions_does_not_matter():
    rng = np.random.default_rng(0)
    values, order = (rng.random((5, 40)) < 0.6).astype(float), rng.permutation(40)
    assert worth(values[:, order], single(40)[order]) == worth(values)


def test_the_best_of_equal_models_is_reported_without_optimism():
    rng = np.random.default_rng(0)
    chosen_on, fitted = [], []
    for _ in range(100):
        hits = (rng.random((8, 100)) < 0.6).astype(float)
        chosen_on.append(joint(hits).scores.max())
        fitted.append(worth(hits))
    assert np.mean(chosen_on) > 0.65  # what the best of 8 looks like
    assert np.mean(fitted) == pytest.approx(0.6, abs=0.015)


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
