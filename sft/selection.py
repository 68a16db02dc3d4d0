"""Choosing a checkpoint by a benchmark, and saying how sure one can be.

Checkpoints are compared on the same questions. The choice is made on one half of the images; every figure that is
reported comes from the other half, since the best of several noisy scores looks better than it is.

Shape letters: K checkpoints, Q questions, C clusters (images), R bootstrap draws.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sft.errors import UserError
from sft.evaluation.results import Result, clustered_standard_error, half_of, read_result
from sft.files import write_atomically

Array = NDArray[np.float64]

NUM_DRAWS = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointScore:
    """One checkpoint on the reporting half."""

    checkpoint: str
    step: int
    score: float
    standard_error: float
    p_best: float
    """Share of bootstrap draws in which it is the best; equals share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What `selection.json` holds (design.md section 5), and which halves it came from."""

    by: str
    rule: str
    selected: str
    scores: tuple[CheckpointScore, ...]
    tied: tuple[str, ...]
    """Checkpoints whose 95 % interval of the difference to the selected one holds 0, itself among them."""
    cross_fitted: float
    benchmark: str
    ranks: tuple[str, ...]
    seed: int
    questions: tuple[int, int]
    """Number of questions it was chosen on, and number that the figures come from."""


def select(
    run: Path,
    *,
    benchmark: str,
    seed: int,
    protocol_hashes: Collection[str] | None = None,
    num_draws: int = NUM_DRAWS,
) -> Selection:
    """Choose among all evaluated checkpoints of a run, write `selection.json` there and return it.

    `benchmark` is the name of a folder under RUN/evaluations. A checkpoint's score is its mean accuracy over the
    rankings that were asked with images. `protocol_hashes` names the evaluations that count, where there are others.

    Raises:
        UserError: there are no results, or checkpoints were asked different questions.
    """
    results = read_results(run, benchmark, protocol_hashes)
    selection = select_best(results, benchmark=benchmark, seed=seed, num_draws=num_draws)
    write_atomically(run / "selection.json", json.dumps(asdict(selection), indent=2) + "\n")
    return selection


def read_results(
    run: Path, benchmark: str, protocol_hashes: Collection[str] | None = None
) -> dict[int, tuple[Result, ...]]:
    """Step -> its results with images, one for each ranking, sorted by step and ranking.

    Raises:
        UserError: there are none, or a ranking was asked under several protocols or parts of the benchmark.
    """
    folder = run / "evaluations" / benchmark
    by_step: dict[int, list[Result]] = {}
    for file in folder.glob("*/checkpoint-*.json"):
        result = read_result(file)
        if not result.blind and (protocol_hashes is None or result.protocol_hash in protocol_hashes):
            by_step.setdefault(int(file.stem.removeprefix("checkpoint-")), []).append(result)
    if not by_step:
        raise UserError(f"{folder}: no evaluations of checkpoints found; run `idefics-sft evaluate` first")
    hashes: dict[str, set[str]] = {}
    for result in (result for results in by_step.values() for result in results):
        hashes.setdefault(result.rank, set()).add(result.protocol_hash)
    several = [rank for rank, found in hashes.items() if len(found) > 1]
    if several:
        raise UserError(f"{folder}: evaluations by {several[0]} of several protocols found; keep one of its folders")
    missing = [f"checkpoint-{step}" for step, results in sorted(by_step.items()) if len(results) < len(hashes)]
    if missing:
        raise UserError(f"{folder}: {missing[0]} lacks some of the rankings {', '.join(sorted(hashes))}; evaluate it")
    return {step: tuple(sorted(results, key=lambda r: r.rank)) for step, results in sorted(by_step.items())}


def select_best(
    results: dict[int, tuple[Result, ...]], *, benchmark: str, seed: int, num_draws: int = NUM_DRAWS
) -> Selection:
    """The rule `best`: the highest score on half 0, the earlier of equals; all figures from half 1.

    Raises:
        UserError: a half has no questions, or checkpoints were asked different questions.
    """
    steps = list(results)
    names = [f"checkpoint-{step}" for step in steps]
    scores_KQ, clusters_Q, halves_Q = _table(results, seed)
    sizes = (int((halves_Q == 0).sum()), int((halves_Q == 1).sum()))
    if not all(sizes):
        raise UserError(f"{benchmark}: a half of its images has no questions; selection needs more images")

    best = choose_best(scores_KQ[:, halves_Q == 0])
    reported_KQ, reported_Q = scores_KQ[:, halves_Q == 1], clusters_Q[halves_Q == 1]
    draws_RK = bootstrap_scores(reported_KQ, reported_Q, seed=seed, num_draws=num_draws)
    p_best = share_best(draws_RK)
    return Selection(
        by="mmbench",
        rule="best",
        selected=names[best],
        scores=tuple(
            CheckpointScore(
                checkpoint=name,
                step=step,
                score=float(scores_Q.mean()),
                standard_error=clustered_standard_error(scores_Q, reported_Q.tolist()),
                p_best=float(p),
            )
            for name, step, scores_Q, p in zip(names, steps, reported_KQ, p_best, strict=True)
        ),
        tied=tuple(name for name, tied in zip(names, tied_with(draws_RK, best), strict=True) if tied),
        cross_fitted=cross_fitted_score(scores_KQ, halves_Q),
        benchmark=benchmark,
        ranks=tuple(result.rank for result in results[steps[0]]),
        seed=seed,
        questions=sizes,
    )


def choose_best(scores_KQ: Array) -> int:
    """Number of the checkpoint with the highest mean score; the earlier of equals."""
    means_K = scores_KQ.mean(axis=1)
    return int(np.flatnonzero(np.isclose(means_K, means_K.max(), rtol=0, atol=1e-12))[0])


def bootstrap_scores(scores_KQ: Array, clusters_Q: NDArray[np.str_], *, seed: int, num_draws: int) -> Array:
    """Mean scores (R, K) of all checkpoints on R resamples of the clusters, the same resample for all of them.

    Paired cluster bootstrap: C clusters are drawn with replacement, each with all its questions;
    score = sum of drawn scores / number of drawn questions (Davison and Hinkley 1997, sections 2.4 and 3.8).
    """
    names, cluster_of_Q = np.unique(clusters_Q, return_inverse=True)
    num_clusters = len(names)
    sizes_C = np.bincount(cluster_of_Q)
    sums_KC = np.stack([np.bincount(cluster_of_Q, weights=scores_Q) for scores_Q in scores_KQ])
    rng = np.random.default_rng(seed)
    times_RC = rng.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), size=num_draws)
    means_RK: Array = (times_RC @ sums_KC.T) / (times_RC @ sizes_C)[:, None]
    return means_RK


def share_best(draws_RK: Array) -> Array:
    """P(best) of each checkpoint (K,): the share of draws in which it has the highest score; equals share a draw."""
    is_best_RK = np.isclose(draws_RK, draws_RK.max(axis=1, keepdims=True), rtol=0, atol=1e-12)
    shares: Array = (is_best_RK / is_best_RK.sum(axis=1, keepdims=True)).mean(axis=0)
    return shares


def tied_with(draws_RK: Array, best: int) -> NDArray[np.bool_]:
    """For each checkpoint (K,), whether its difference to the best could be 0.

    The percentile interval of the paired bootstrap differences: its 2.5 % and 97.5 % quantiles.
    """
    tail = (1 - CONFIDENCE) / 2
    low_K, high_K = np.quantile(draws_RK - draws_RK[:, [best]], [tail, 1 - tail], axis=0)
    tied: NDArray[np.bool_] = (low_K <= 1e-12) & (high_K >= -1e-12)
    return tied


def cross_fitted_score(scores_KQ: Array, halves_Q: NDArray[np.int64]) -> float:
    """What choosing by this benchmark is worth: chosen on one half, scored on the other, both ways averaged."""
    figures = []
    for chosen_on in (0, 1):
        best = choose_best(scores_KQ[:, halves_Q == chosen_on])
        figures.append(scores_KQ[best, halves_Q != chosen_on].mean())
    return float(np.mean(figures))


def _table(results: dict[int, tuple[Result, ...]], seed: int) -> tuple[Array, NDArray[np.str_], NDArray[np.int64]]:
    """Scores (K, Q) averaged over rankings, the cluster of each question (Q,) and its half (Q,)."""
    asked = [question.question for question in next(iter(results.values()))[0].questions]
    for step, ranked in results.items():
        for result in ranked:
            if [question.question for question in result.questions] != asked:
                raise UserError(f"checkpoint-{step}: was asked other questions than the others; evaluate it again")
    questions = next(iter(results.values()))[0].questions
    scores_KQ = np.array(
        [np.mean([[question.hit for question in r.questions] for r in ranked], axis=0) for ranked in results.values()],
        dtype=np.float64,
    )
    clusters_Q = np.array([question.cluster for question in questions])
    halves_Q = np.array([half_of(question.image_sha256, seed) for question in questions])
    return scores_KQ, clusters_Q, halves_Q


def table_lines(selection: Selection) -> Sequence[str]:
    """The scores as lines of text: `*` marks the selected checkpoint, `=` those it cannot be told apart from."""
    lines = ["  checkpoint          score   ± s.e.   P(best)"]
    for score in selection.scores:
        mark = "*" if score.checkpoint == selection.selected else "=" if score.checkpoint in selection.tied else " "
        lines.append(
            f"{mark} {score.checkpoint:<18}{score.score:7.1%}  {score.standard_error:7.1%}  {score.p_best:8.1%}"
        )
    return lines
