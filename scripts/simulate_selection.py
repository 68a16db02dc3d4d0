#!/usr/bin/env python3
"""How true is what `idefics-sft select` and `compare` print: simulated runs whose truth is known.

scripts/simulate_selection.py [--json] [--runs 1000] [--fast]
scripts/simulate_selection.py --example     # one simulated run, as `idefics-sft select` shows it

A question is answered right when  quality of the checkpoint + what its image and the question itself do to every
checkpoint + what the image and the question do to this one  is over 0, all normal, variances 1 in sum. So checkpoints
agree on most questions, questions about one image depend on each other, and a checkpoint's true score is the normal
distribution function of its quality. An image has 1 to 5 questions.

A setting is a number of images and a mean score. Its runs have 4, 8 or 16 checkpoints whose true scores are without
order, smooth over steps, half of each, rising, or a power law, with a standard deviation of up to 10 points. There is a
row for every figure that is printed:

    coverage        share of 95 % intervals that hold the truth
    said -> true    mean probability that was said, and how often it was true, by what was said; the number of cases
    left out        how often the set `=` leaves a truly best checkpoint out, 5 % at most is promised
    bias            mean of a figure - the truth, in points
    detected        share of checkpoints told apart from a best one that is ahead of all others by the detectable
                    difference; 80 % is promised
    although equal  how often a model is called better or worse that is neither, 5 % at most is promised
"""

import argparse
import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from sft.cli.select import show
from sft.cli.terminal import console
from sft.core.metric import ACCURACY
from sft.selection.bootstrap import (
    MIN_IMAGES,
    bootstrap_scores,
    choose_best,
    clearly_worse,
    compare_pair,
    cross_fitted,
    detectable_difference,
    not_worse,
)
from sft.selection.clusters import Clusters, Joint, joined, sum_by_cluster
from sft.selection.outcomes import Outcomes
from sft.selection.posterior import probability_best
from sft.selection.rules import choose

Array = NDArray[np.float64]

NUM_DRAWS = 1000
SHARES = {"image": 0.35, "question": 0.58, "image x checkpoint": 0.02, "question x checkpoint": 0.05}
"""Parts of the variance. Two checkpoints of the same true score, 66 %, then disagree on 11 % of the questions."""
IMAGES, MEANS = (25, 60, 150, 400), (0.5, 0.9)
SIZES = (4, 8, 16)
"""Numbers of checkpoints."""
BINS = {"P(best)": (0.3, 0.6, 0.9), "P(A better)": (0.5, 0.7, 0.9)}
"""Where the bins of what is said begin."""


# ------------------------------------------------------------------------------------------------------ the truth


CURVES: dict[str, tuple[int, ...]] = {
    "without order": (0, 1, 3, 6),
    "smooth": (1, 3, 6),
    "half smooth": (1, 3, 6),
    "rising": (1, 3, 10),
    "power law": (1, 3, 10),
}
"""How true scores go over steps, and their standard deviations in points."""


def qualities(curve: str, number: int, mean: float, rng: np.random.Generator, spread: int | None = None) -> Array:
    """The qualities (K,) of the checkpoints of a run."""
    at = (1 + np.arange(number)) / number
    noise = rng.standard_normal(number)
    if curve == "without order":
        shape = noise
    elif curve == "rising":
        shape = -3 * np.exp(-at * rng.uniform(3, 7)) - 0.4 * rng.uniform(-0.5, 1.5) * at + 0.02 * noise
        shape /= shape.std()
    elif curve == "power law":
        shape = -(at ** -rng.uniform(0.3, 1.2))
        shape = shape / shape.std() + rng.uniform(0.02, 0.25) * noise
        shape /= shape.std()
    else:
        covariance = np.exp(-0.5 * ((at[:, None] - at) / 0.35) ** 2) + 1e-8 * np.eye(number)
        smooth = np.linalg.cholesky(covariance) @ rng.standard_normal(number)
        smooth -= smooth.mean()
        shape = 1.6 * smooth if curve == "smooth" else 1.2 * smooth + 0.7 * noise
    points = rng.choice(CURVES[curve]) if spread is None else spread
    if curve in ("rising", "power law"):
        shape -= shape.mean()
    return norm.ppf(mean) + points / 100 / norm.pdf(norm.ppf(mean)) * shape


def of_a_run(number: int, mean: float, rng: np.random.Generator) -> Array:
    """The qualities (K,) of the checkpoints of one of the simulated runs."""
    return qualities(list(CURVES)[number % len(CURVES)], SIZES[number % len(SIZES)], mean, rng)


def answers(quality_K: Array, image_of_Q: NDArray[np.int64], rng: np.random.Generator) -> Array:
    """Hits (K, Q)."""
    num_checkpoints, num_images, num_questions = len(quality_K), image_of_Q[-1] + 1, len(image_of_Q)
    shapes = ((1, num_images), (1, num_questions), (num_checkpoints, num_images), (num_checkpoints, num_questions))
    by_image, by_question, by_image_own, by_question_own = (
        np.sqrt(share) * rng.standard_normal(shape) for share, shape in zip(SHARES.values(), shapes, strict=True)
    )
    effects_KQ = (by_image + by_image_own)[:, image_of_Q] + by_question + by_question_own
    return (quality_K[:, None] + effects_KQ > 0).astype(np.float64)


def simulate(quality_K: Array, num_images: int, rng: np.random.Generator) -> Clusters:
    """The hits of each checkpoint, summed by image."""
    image_of_Q = np.repeat(np.arange(num_images), rng.integers(1, 6, num_images))
    return sum_by_cluster(answers(quality_K, image_of_Q, rng), image_of_Q.astype(str))


# ------------------------------------------------------------------------------------------- figures and the truth


class Tally:
    """What was said in all runs of a setting, beside what is true."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}
        self.said: dict[str, list[tuple[Array, Array]]] = {}

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.values.setdefault(name.replace("_", " "), []).append(float(value))

    def rows(self) -> dict[str, object]:
        """Means of the values; for probabilities (said, true, number of cases) by what was said."""
        rows: dict[str, object] = {name: float(np.mean(values)) for name, values in self.values.items()}
        for name, cases in self.said.items():
            said, true = (np.concatenate([case[side] for case in cases]) for side in (0, 1))
            bins = BINS["P(A better)" if "A better" in name else "P(best)"]
            for low, high in zip(bins, (*bins[1:], 1.01), strict=True):
                own = (said >= low) & (said < high)
                if own.any():
                    limits = f"{low:.1f} to {high:.1f}" if high <= 1 else f"{low:.1f} and more"
                    rows[f"{name}, {limits}"] = (float(said[own].mean()), float(true[own].mean()), int(own.sum()))
        return rows


def share_of_best(truth_K: Array) -> Array:
    """Equally good ones share the truth."""
    is_best_K = truth_K >= truth_K.max() - 1e-12
    return is_best_K / is_best_K.sum()


def holds(interval: tuple[float, float], truth: float) -> bool:
    return interval[0] <= truth <= interval[1]


def fit(joint: Joint, truth_K: Array, seed: int) -> tuple[bool, float]:
    """Whether the interval of the cross-fitted figure holds the true mean score of what the halves choose, and the
    figure's error."""
    total, own = sum(part.weights_C.sum() for part in joint.parts), []

    def chosen(half: Joint) -> int:
        best = choose_best(half.scores)
        own.append(2 * truth_K[best] * (1 - sum(part.weights_C.sum() for part in half.parts) / total))
        return best

    figures, best = cross_fitted(joint, chosen, seed), choose_best(joint.scores)
    figure = joint.figure(figures, best)
    return holds(figure.interval, np.mean(own)), float(figure.score - np.mean(own))


def a_run(number: int, num_images: int, mean: float, rng: np.random.Generator, tally: Tally) -> None:
    """What `select` prints of one run."""
    quality_K = of_a_run(number, mean, rng)
    truth_K, joint = norm.cdf(quality_K), Joint((simulate(quality_K, num_images, rng),))
    scores_K, best = joint.scores, choose_best(joint.scores)
    covered = [holds(figure.interval, truth) for figure, truth in zip(joint.figures(), truth_K, strict=True)]
    p_best_K = probability_best(joint, seed=number, num_draws=NUM_DRAWS)
    tally.said.setdefault("P(best)", []).append((p_best_K, share_of_best(truth_K)))
    is_held, bias = fit(joint, truth_K, number)
    tally.add(
        interval_of_a_score=np.mean(covered),
        bias_of_the_highest_score=100 * (scores_K[best] - truth_K[best]),
        cross_fitted_figure=is_held,
        bias_of_the_cross_fitted_figure=100 * bias,
    )
    if number % 2:
        kept_K = not_worse(scores_K, bootstrap_scores(joint, seed=number, num_draws=NUM_DRAWS), num_images)
        tally.add(best_one_left_out=1 - (kept_K @ share_of_best(truth_K)), share_in_the_set=kept_K.mean())


def a_pair(number: int, num_images: int, mean: float, rng: np.random.Generator, tally: Tally) -> None:
    """What `compare` prints of two models, and `--average` decides of two equal ones."""
    spread = (0, 1, 3, 6)[number % 4]
    quality_K = qualities("without order", 2, mean, rng, spread)
    truth_K, joint = norm.cdf(quality_K), Joint((simulate(quality_K, num_images, rng),))
    found = compare_pair(joint, seed=number, num_draws=NUM_DRAWS)
    tally.add(difference_of_two=holds(found.interval, truth_K[0] - truth_K[1]))
    said, true = found.p_better, share_of_best(truth_K)[0]
    case = (said, true) if said >= 0.5 else (1 - said, 1 - true)
    tally.said.setdefault("P(A better)", []).append((np.array([case[0]]), np.array([case[1]])))
    if not spread:
        tally.add(called_better_although_equal=found.is_better)


def a_base(number: int, num_images: int, mean: float, rng: np.random.Generator, tally: Tally) -> None:
    """Checkpoints that are no worse than the base, which is the first model; and one that is ahead of its like."""
    equal_K = np.full(5, norm.ppf(mean))
    part = simulate(equal_K, num_images, rng)
    scores_K, draws_RK = part.scores, bootstrap_scores(Joint((part,)), seed=number, num_draws=NUM_DRAWS)
    difference = detectable_difference(scores_K, draws_RK, max(num_images, MIN_IMAGES)) or 0.0
    tally.add(
        worse_than_the_base_although_equal=clearly_worse(scores_K, draws_RK, than=0).any(),
        detectable_difference=100 * difference,
    )


def a_lead(number: int, num_images: int, mean: float, rng: np.random.Generator, tally: Tally) -> None:
    """How often the others are told apart from one that is ahead of all of them by the detectable difference."""
    difference = np.mean(tally.values["detectable difference"]) / 100
    truth_K = np.array([mean + difference / 2, *[mean - difference / 2] * 4])
    if truth_K.max() < 0.995:
        part = simulate(norm.ppf(truth_K), num_images, rng)
        draws_RK = bootstrap_scores(Joint((part,)), seed=number, num_draws=NUM_DRAWS)
        tally.add(detected=1 - not_worse(part.scores, draws_RK, num_images)[1:].mean())


def an_index(number: int, num_images: int, mean: float, rng: np.random.Generator, tally: Tally) -> None:
    """What `select` prints of a choice by three benchmarks, one of them flat."""
    first_K = of_a_run(number, mean, rng)
    other_K = norm.ppf(0.66) + (first_K - first_K.mean()) * 0.7 + 0.05 * rng.standard_normal(len(first_K))
    by_benchmark = [first_K, other_K, np.full(len(first_K), norm.ppf(mean))]
    joint = joined([simulate(quality_K, num_images, rng) for quality_K in by_benchmark], [None] * 3)
    truth_K = joint.of([norm.cdf(quality_K) for quality_K in by_benchmark])
    p_best_K = probability_best(joint, seed=number, num_draws=NUM_DRAWS)
    tally.said.setdefault("P(best) by three benchmarks", []).append((p_best_K, share_of_best(truth_K)))
    covered = [holds(figure.interval, truth) for figure, truth in zip(joint.figures(), truth_K, strict=True)]
    tally.add(index_of_three_benchmarks=np.mean(covered), cross_fitted_index=fit(joint, truth_K, number)[0])


PARTS: dict[Callable[[int, int, float, np.random.Generator, Tally], None], float] = {
    a_run: 1, a_pair: 1, a_base: 0.5, a_lead: 0.3, an_index: 0.5,
}  # fmt: skip
"""What is simulated, and in which share of the runs."""


def figures(num_images: int, mean: float, num_runs: int, seed: int) -> dict[str, object]:
    """All rows of one setting."""
    rng, tally = np.random.default_rng([seed, num_images, int(100 * mean)]), Tally()
    for part, share in PARTS.items():
        for number in range(int(num_runs * share)):
            part(number, num_images, mean, rng, tally)
    return tally.rows()


# --------------------------------------------------------------------------------------------------------- output


class Example(NamedTuple):
    """The run of the documentation: a checkpoint every 2,000 steps."""

    true_scores: tuple[float, ...] = (0.52, 0.62, 0.655, 0.667, 0.667)
    num_questions: int = 1164


def example(seed: int) -> Outcomes:
    """The answers of one simulated run, each question about an image of its own."""
    truth, number = Example()
    images = np.arange(number).astype(str)
    return Outcomes(
        task="mmbench",
        benchmark="mmbench_dev_en",
        metric=ACCURACY,
        ranks=("letter",),
        steps=tuple(2000 * step for step in range(1, len(truth) + 1)),
        items=tuple(range(number)),
        values_KQ=answers(norm.ppf(truth), np.arange(number), np.random.default_rng(seed)),
        weights_Q=np.ones(number),
        clusters_Q=images,
        categories_Q=np.full(number, ""),
    )


def cell(row: str, value: object) -> str:
    if isinstance(value, tuple):
        said, true, cases = value
        return f"{said:.2f} → {true:.2f} ({cases})"
    if not isinstance(value, float):
        return ""
    return f"{value:.1f}" if row.startswith(("bias", "detectable")) else f"{100 * value:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000, help="simulated runs of each setting")
    parser.add_argument("--fast", action="store_true", help="100 runs of each setting: seconds, and rough")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--example", action="store_true", help="one run, as `idefics-sft select` shows it")
    arguments = parser.parse_args()
    if arguments.example:
        show(choose(example(arguments.seed), rule="earliest_not_worse"), console())
        return
    num_runs = 100 if arguments.fast else arguments.runs
    found = {
        f"{images} images, {100 * mean:.0f} %": figures(images, mean, num_runs, arguments.seed)
        for mean in MEANS
        for images in IMAGES
    }
    if arguments.json:
        print(json.dumps({"runs": num_runs, "settings": found}))
        return
    print("| figure | " + " | ".join(found) + " |\n|---|" + "---:|" * len(found))
    for row in dict.fromkeys(row for rows in found.values() for row in rows):
        print(f"| {row} | " + " | ".join(cell(row, rows.get(row)) for rows in found.values()) + " |")


if __name__ == "__main__":
    main()
