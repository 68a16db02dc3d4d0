"""What a model scored on a task, item by item, and the files of a run that keep it:

    RUN/evaluations/<benchmark>/<protocol_hash>/<checkpoint>.json     the summary
    RUN/evaluations/<benchmark>/<protocol_hash>/<checkpoint>.jsonl    one line per item

Without torch, so that choosing among finished evaluations is instant.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sft.core.files import text_lines, write_atomically
from sft.core.metric import Metric
from sft.evaluation.statistics import clustered_standard_error, score_interval, weighted_mean


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a model scored on one item: a line of the file that keeps it."""

    item: int | str
    cluster: str
    image_sha256: str
    category: str
    score: float
    """Not a number where the benchmark keeps the answers back."""
    weight: float = 1.0
    """How much it counts in the mean."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else the line holds, as JSON: the prediction, the log-probabilities."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcomes of one model on one task."""

    benchmark: str
    protocol_hash: str
    outcomes: tuple[Outcome, ...]
    weights: str = ""
    """What identifies the model's weights, where the caller gave it: a result of other weights is not reused."""
    filtered: Mapping[str, Sequence[int | str]] = field(default_factory=dict)
    """Items that were not asked, by reason."""

    @property
    def has_answers(self) -> bool:
        """Whether it can be scored: test splits cannot."""
        return not any(math.isnan(outcome.score) for outcome in self.outcomes)

    @property
    def score(self) -> float:
        """Weighted mean of the items' scores."""
        return _mean(self.outcomes)

    @property
    def standard_error(self) -> float:
        """Standard error of the score by clusters: see `clustered_standard_error`."""
        return self._error(self._clusters)

    def _error(self, clusters: Sequence[str]) -> float:
        scores, weights = ([getattr(outcome, name) for outcome in self.outcomes] for name in ("score", "weight"))
        return clustered_standard_error(scores, clusters, weights)

    @property
    def _clusters(self) -> list[str]:
        """What items depend on each other in: images or, where that error is larger, groups with the same shots."""
        return max(self._images, self._groups, key=self._error)

    @property
    def _images(self) -> list[str]:
        return [outcome.cluster for outcome in self.outcomes]

    @property
    def _groups(self) -> list[str]:
        return [outcome.details.get("group", "") for outcome in self.outcomes]

    def spread_of_groups(self) -> dict[str, float]:
        """Return how much the score depends on the choice of shots: the standard deviation between groups that have the
        same shots, without the noise of their items; empty where there are no two groups, or hardly more images.

        With G groups of C images, of variance t between groups and v of a group's mean by its items, the squared errors
        by groups and by images are (t + v) (G - 1) / G^2 and v / G + t (G - 1) / (G C).
        """
        G, C = len({*self._groups}), len({*self._images})
        if not 1 < G < C:
            return {}
        between = self._error(self._groups) ** 2 * G / (G - 1) - self._error(self._images) ** 2
        spread = math.sqrt(max(0.0, G * between / (1 - (G - 1) / C)))
        return {f"std beyond noise over {G} groups of shots": spread}

    def interval(self, metric: Metric) -> tuple[float, float]:
        """Return the score's 95 % interval: see `score_interval`."""
        num_clusters = len(set(self._clusters))
        rows = len(self.outcomes)
        return score_interval(self.score, self.standard_error, num_clusters, rows, is_share=metric.is_share)

    @property
    def num_questions(self) -> int:
        """Distinct items: where the rows of a question count by themselves, a question has several outcomes."""
        return _num_distinct(self.outcomes)

    def parts(self, name_of: Callable[[Outcome], str], score_name: str = "score") -> dict[str, dict[str, float]]:
        """Return the number of questions and the score of each part that has a name, in alphabetical order."""
        found: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes:
            found.setdefault(name_of(outcome), []).append(outcome)
        return {
            name: {"questions": _num_distinct(found[name]), score_name: _mean(found[name])}
            for name in sorted(found)
            if name
        }

    def on_items_of(self, other: Result) -> Result:
        """Return the same result on the items that another one has."""
        items = {outcome.item for outcome in other.outcomes}
        return replace(self, outcomes=tuple(outcome for outcome in self.outcomes if outcome.item in items))


def _mean(outcomes: Sequence[Outcome]) -> float:
    return weighted_mean([outcome.score for outcome in outcomes], [outcome.weight for outcome in outcomes])


def _num_distinct(outcomes: Iterable[Outcome]) -> int:
    return len({outcome.item for outcome in outcomes})


# -------------------------------------------------------------------------------------------------------------- files

_SCORES = ("score", "hit", "loss")
"""Keys under which a line holds its score. The first three tasks said `hit` or `loss`, and still do."""


def result_file(run: Path, benchmark: str, protocol_hash: str, checkpoint: str) -> Path:
    """Return the summary's path; the lines of the items stand beside it with the suffix .jsonl."""
    return run / "evaluations" / benchmark / protocol_hash / f"{checkpoint}.json"


def write_result(result: Result, summary: Mapping[str, Any], run: Path, checkpoint: str) -> Path:
    """Write both files, the summary last: where it stands, the lines are complete. Return the summary's path.

    `checkpoint` is the file's name: `checkpoint-<step>`, or `base`.
    """
    file = result_file(run, result.benchmark, result.protocol_hash, checkpoint)
    write_lines(result, file.with_suffix(".jsonl"))
    head = {"checkpoint": checkpoint, "weights": result.weights}
    write_atomically(file, json.dumps(head | dict(summary), indent=2) + "\n")
    return file


def write_lines(result: Result, file: Path) -> None:
    """Write one line of JSON an item: its name, cluster, image, category and what the task adds."""
    write_atomically(file, "".join(json.dumps(_line(outcome)) + "\n" for outcome in result.outcomes))


def _line(outcome: Outcome) -> dict[str, Any]:
    head = {
        "question": outcome.item,
        "cluster": outcome.cluster,
        "image_sha256": outcome.image_sha256,
        "category": outcome.category,
    }
    line = head | dict(outcome.details)
    if not any(key in line for key in _SCORES):
        line["score"] = None if math.isnan(outcome.score) else outcome.score
    if outcome.weight != 1 and "trained_tokens" not in line:
        line["weight"] = outcome.weight
    return line


def read_lines(file: Path) -> tuple[Outcome, ...]:
    """Read what `write_lines` wrote.

    Raises:
        ValueError, KeyError, TypeError: the file is damaged.
    """
    return tuple(_outcome(json.loads(line)) for line in text_lines(file))


def _outcome(line: dict[str, Any]) -> Outcome:
    score = line.pop("score") if "score" in line else line["hit"] if "hit" in line else line["loss"]
    weight = line.pop("weight", line.get("trained_tokens", 1))
    return Outcome(
        item=line.pop("question"),
        cluster=line.pop("cluster"),
        image_sha256=line.pop("image_sha256"),
        category=line.pop("category"),
        score=math.nan if score is None else float(score),
        weight=float(weight),
        details=line,
    )


def find_result(
    run: Path,
    benchmark: str,
    protocol_hash: str,
    checkpoint: str,
    *,
    weights: str,
    num_rows: Callable[[Result], int] = lambda result: len(result.outcomes),
) -> Result | None:
    """Return the finished evaluation of these weights, if there is one; damaged files are none. `num_rows` counts the
    answers of a result, which have to be as many as the summary says."""
    file = result_file(run, benchmark, protocol_hash, checkpoint)
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        result = Result(
            benchmark=benchmark,
            protocol_hash=protocol_hash,
            outcomes=read_lines(file.with_suffix(".jsonl")),
            weights=summary["weights"],
            filtered=summary.get("filtered_questions", {}),
        )
        is_whole = num_rows(result) == summary.get("rows", num_rows(result))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return result if is_whole and result.weights == weights else None
