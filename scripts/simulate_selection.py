#!/usr/bin/env python3
"""How well sft/selection/bootstrap.py tells checkpoints apart, on simulated runs whose truth is known.

scripts/simulate_selection.py [--json] [--runs 400]
scripts/simulate_selection.py --example     # one simulated run, as `idefics-sft select` shows it

A question is answered right when  quality of the checkpoint + what its image and the question itself do to every
checkpoint + what the image and the question do to this one  is over 0, all normal, variances 1 in sum. So checkpoints
agree on most questions, questions about one image depend on each other, and a checkpoint's true score is the normal
distribution function of its quality.

For each kind of run, over all simulated runs:
    coverage          share of 95 % intervals that hold the true score
    left out          how often the set leaves the truly best checkpoint out, 5 % at most is promised; where several are
                      best, the mean over them
    left out (naive)  the same when each checkpoint is compared with the winner alone, by its own 95 % interval
    set size          mean number of checkpoints in the set
    optimism          mean of the winner's score - its true score, in points
    cross-fitted      mean of the cross-fitted figure - the winner's true score, in points
    detectable        mean of `detectable_difference`, in points
    detected          share of checkpoints told apart from a single best one that is ahead of all others by that
                      difference; 80 % is promised
"""

import argparse
import json
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from sft.cli.select import show
from sft.cli.terminal import console
from sft.core.metric import ACCURACY
from sft.evaluation.draw_images import half_of
from sft.selection.bootstrap import (
    bootstrap_scores,
    choose_best,
    cross_fitted,
    detectable_difference,
    disagreements,
    intervals,
    mean_scores,
    not_worse,
)
from sft.selection.outcomes import Outcomes
from sft.selection.rules import choose

NUM_DRAWS = 1000
SHARES = {"image": 0.35, "question": 0.58, "image x checkpoint": 0.02, "question x checkpoint": 0.05}
"""Parts of the variance. Two checkpoints of the same true score, 66 %, then disagree on 11 % of the questions."""


class Kind(NamedTuple):
    """A kind of run."""

    true_scores: tuple[float, ...]
    num_questions: int
    questions_per_image: int


RISING = (0.40, 0.52, 0.59, 0.63, 0.65, 0.66, 0.665, 0.667, 0.668, 0.668, 0.667)
KINDS = {
    "11 equal, 1164 questions": Kind((0.66,) * 11, 1164, 1),
    "11 equal, 1164 questions, 4 an image": Kind((0.66,) * 11, 1164, 4),
    "22 equal, 1164 questions": Kind((0.66,) * 22, 1164, 1),
    "11 rising, 1164 questions": Kind(RISING, 1164, 1),
    "11 rising, 300 questions, 2 an image": Kind(RISING, 300, 2),
    "4 rising, 150 questions": Kind((0.75, 0.90, 0.95, 0.96), 150, 2),
    "4 equal, 60 questions": Kind((0.9,) * 4, 60, 1),
    "4 equal, 25 questions": Kind((0.9,) * 4, 25, 1),
}


def simulate(kind: Kind, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.str_]]:
    """Hits (K, Q) and the image of each question (Q,)."""
    num_checkpoints, num_questions = len(kind.true_scores), kind.num_questions
    image_of_Q = np.arange(num_questions) // kind.questions_per_image
    shapes = ((1, image_of_Q[-1] + 1), (1, num_questions), (num_checkpoints, image_of_Q[-1] + 1))
    effects = [
        np.sqrt(share) * rng.standard_normal(shape)
        for share, shape in zip(SHARES.values(), (*shapes, (num_checkpoints, num_questions)), strict=True)
    ]
    by_image, by_question, by_image_own, by_question_own = effects
    effects_KQ = (by_image + by_image_own)[:, image_of_Q] + by_question + by_question_own
    quality_K = norm.ppf(kind.true_scores)
    return (quality_K[:, None] + effects_KQ > 0).astype(np.float64), image_of_Q.astype(str)


def naive_set(scores_K: NDArray[np.float64], draws_RK: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Each against the winner: whether the 95 % percentile interval of the difference holds 0."""
    low_K, high_K = np.quantile(draws_RK - draws_RK[:, [choose_best(scores_K)]], [0.025, 0.975], axis=0)
    return (low_K <= 1e-12) & (high_K >= -1e-12)


def figures(kind: Kind, num_runs: int, seed: int) -> dict[str, float]:
    """All figures of one kind of run."""
    rng = np.random.default_rng(seed)
    truth_K = np.array(kind.true_scores)
    is_best_K = truth_K == truth_K.max()
    rows = []
    for _ in range(num_runs):
        hits_KQ, images_Q = simulate(kind, rng)
        scores_K = mean_scores(hits_KQ)
        draws_RK = bootstrap_scores(hits_KQ, images_Q, seed=int(rng.integers(2**31)), num_draws=NUM_DRAWS)
        low_K, high_K = intervals(draws_RK).T
        best = choose_best(scores_K)
        halves_Q = rng.integers(0, 2, int(images_Q.astype(int).max()) + 1)[images_Q.astype(int)]
        fitted_Q = cross_fitted(hits_KQ, halves_Q, lambda mask, hits=hits_KQ: choose_best(mean_scores(hits[:, mask])))
        kept_K = not_worse(scores_K, draws_RK)
        rows.append(
            {
                "coverage": ((low_K <= truth_K) & (truth_K <= high_K)).mean(),
                "left out": 1 - kept_K[is_best_K].mean(),
                "left out (naive)": 1 - naive_set(scores_K, draws_RK)[is_best_K].mean(),
                "set size": kept_K.sum(),
                "optimism": 100 * (scores_K[best] - truth_K[best]),
                "cross-fitted": 100 * (fitted_Q.mean() - truth_K[best]),
                "detectable": 100 * detectable_difference(scores_K, draws_RK, disagreements_K=disagreements(hits_KQ)),
            }
        )
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return means | {"detected": detected(kind, means["detectable"] / 100, num_runs, seed)}


def detected(kind: Kind, difference: float, num_runs: int, seed: int) -> float:
    """Share of checkpoints that are told apart from the best one, which is ahead of all of them by `difference`."""
    best, *others = [max(kind.true_scores)] * len(kind.true_scores)
    planted = kind._replace(true_scores=(best, *(other - difference for other in others)))
    rng = np.random.default_rng(seed + 1)
    shares = []
    for _ in range(num_runs):
        hits_KQ, images_Q = simulate(planted, rng)
        draws_RK = bootstrap_scores(hits_KQ, images_Q, seed=int(rng.integers(2**31)), num_draws=NUM_DRAWS)
        shares.append(1 - not_worse(mean_scores(hits_KQ), draws_RK)[1:].mean())
    return float(np.mean(shares))


EXAMPLE = Kind((0.52, 0.62, 0.655, 0.667, 0.667), 1164, 1)


def example(seed: int) -> Outcomes:
    """The answers of one simulated run with a checkpoint every 2,000 steps."""
    hits_KQ, images_Q = simulate(EXAMPLE, np.random.default_rng(seed))
    return Outcomes(
        benchmark="mmbench_dev_en",
        metric=ACCURACY,
        ranks=("letter",),
        steps=tuple(2000 * number for number in range(1, len(hits_KQ) + 1)),
        values_KQ=hits_KQ,
        weights_Q=np.ones(EXAMPLE.num_questions),
        clusters_Q=images_Q,
        halves_Q=np.array([half_of(image, seed) for image in images_Q]),
        categories_Q=np.full(EXAMPLE.num_questions, ""),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=400, help="simulated runs of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--example", action="store_true", help="one run, as `idefics-sft select` shows it")
    arguments = parser.parse_args()
    if arguments.example:
        show(choose(example(arguments.seed), by="mmbench", rule="earliest_not_worse"), console())
        return
    found = {name: figures(kind, arguments.runs, arguments.seed) for name, kind in KINDS.items()}
    if arguments.json:
        print(json.dumps({"runs": arguments.runs, "kinds": found}))
        return
    names = list(next(iter(found.values())))
    shares = {"coverage", "left out", "left out (naive)", "detected"}
    print("| checkpoints, questions | " + " | ".join(names) + " |")
    print("|---|" + "---:|" * len(names))
    for kind, row in found.items():
        cells = [f"{100 * row[name]:.0f} %" if name in shares else f"{row[name]:.1f}" for name in names]
        print(f"| {kind} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
