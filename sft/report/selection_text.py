"""The selection in words and as a table: which checkpoint was selected, why, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sft.core.metric import ACCURACY, LOSS, Metric
from sft.report.numbers import percent
from sft.report.run_files import Line, Run


def metric_of(line: Line) -> Metric:
    """Return what the scores of a selection or of a summary measure; files of older versions do not say."""
    if isinstance(line.get("metric"), dict):
        return Metric(**line["metric"])
    return LOSS if line.get("by") == "loss" else ACCURACY


def score_of(selection: Line, checkpoint: str) -> Line:
    """Return what a selection holds about a checkpoint."""
    return next(score for score in selection["scores"] if score["checkpoint"] == checkpoint)


def score_text(score: float, selection: Line) -> str:
    """Return a score as text: a share in percent."""
    return percent(score) if metric_of(selection).is_share else f"{score:.3f}"


def between(interval: Sequence[float] | None, selection: Line) -> str:
    """Return an interval as text, empty where there is none."""
    return " to ".join(score_text(limit, selection) for limit in interval) if interval else ""


def selection_words(chosen: Line | None) -> Iterable[str]:
    """Yield sentences: which checkpoint was selected, why, and how sure that is. `chosen` has the keys of
    selection.json."""
    if not chosen:
        return
    score = score_of(chosen, chosen["selected"])
    limits = f" (95 % interval {between(score['interval'], chosen)})" if score.get("interval") else ""
    yield f"{chosen['selected']} was selected: {_reason(chosen)} {score_text(score['score'], chosen)}{limits}."
    questions, reported = chosen.get("questions", (0, 0))
    ranks = " and ".join(chosen.get("ranks", ())) + ", the mean of both" * (len(chosen.get("ranks", ())) == 2)
    if reported:
        kind = "samples" if chosen["by"] == "loss" else "questions"
        yield (
            f"The figures are from {reported:,} {kind} about {chosen.get('images', 0):,} images or texts "
            f"of {chosen['benchmark']}{f', ranked by {ranks}' if ranks else ''}."
        )
        if chosen.get("chosen_on") == "half":
            yield f"The choice was made on {questions:,} other {kind}."
    elif chosen["by"] == "loss":
        yield "Training recorded only the mean of the loss, so how sure the choice is cannot be said."
    if chosen["best"] != chosen["selected"]:
        yield f"{chosen['best']} has the {_extreme(chosen)}."
    if chosen.get("cross_fitted") is not None:
        worth = score_text(chosen["cross_fitted"], chosen)
        limits = between(chosen.get("cross_fitted_interval"), chosen)
        limits = f" ({limits})" if limits else ""
        yield f"Cross-fitted, that is, chosen on one half and scored on the other, the choice scores {worth}{limits}."


def _extreme(chosen: Line) -> str:
    metric = metric_of(chosen)
    return f"lowest {metric.name}" if metric.lower_is_better else "highest score"


def _reason(chosen: Line) -> str:
    extreme = _extreme(chosen)
    if chosen["rule"] == "earliest_not_worse":
        return "it is the earliest that cannot be told apart from the best, and has"
    if chosen["selected"] != chosen["best"]:
        return "it is the best of those that still have their weights, and has"
    if chosen.get("chosen_on") == "half":
        return f"it has the {extreme} on the half that chose, and on the other"
    return f"it has the {extreme},"


def scores(run: Run) -> Iterable[dict[str, Any]]:
    """Yield the rows of the table of checkpoints."""
    chosen = run.selection
    if not chosen:
        return
    for score in chosen["scores"]:
        yield {
            "name": score["checkpoint"],
            "score": score_text(score["score"], chosen),
            "interval": between(score.get("interval"), chosen),
            "p_best": "" if score.get("p_best") is None else percent(score["p_best"]),
            "is_selected": score["checkpoint"] == chosen["selected"],
            "is_tied": score["checkpoint"] in chosen["tied"],
            "is_gone": not score.get("has_weights", True),
        }
