"""The selection in words and as a table: which checkpoint was selected, why, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sft.core.metric import ACCURACY, LOSS, Metric
from sft.report.numbers import percent
from sft.report.run_files import Line


def metric_of(line: Line) -> Metric:
    """Return what the scores of a selection or of a summary measure; files of older versions do not say."""
    if isinstance(line.get("metric"), dict):
        return Metric(**line["metric"])
    return LOSS if line.get("by") == "loss" else ACCURACY


def score_of(selection: Line, checkpoint: str) -> Line:
    """Return what a selection holds about a checkpoint."""
    average = [selection["average"]["score"]] if selection.get("average") else []
    return next(score for score in (*selection["scores"], *average) if score["checkpoint"] == checkpoint)


def score_text(score: float, selection: Line) -> str:
    """Return a score as text: a share in percent."""
    return percent(score) if metric_of(selection).is_share else f"{score:.4f}"


def between(interval: Sequence[float] | None, selection: Line) -> str:
    """Return an interval as text, empty where there is none."""
    return " to ".join(score_text(limit, selection) for limit in interval) if interval else ""


def selection_words(chosen: Line) -> Iterable[str]:
    """Yield sentences: which checkpoint was selected, why, and how sure that is. `chosen` has the keys of
    selection.json."""
    score = score_of(chosen, chosen["selected"])
    limits = f" (95 % interval {between(score['interval'], chosen)})" if score.get("interval") else ""
    yield f"{chosen['selected']} was selected: {_reason(chosen)} {score_text(score['score'], chosen)}{limits}."
    own = chosen.get("questions", 0)
    chose, questions = own if isinstance(own, list) else (own, own)  # an earlier version could choose on others
    ranks = " and ".join(chosen.get("ranks", ())) + ", the mean of both" * (len(chosen.get("ranks", ())) == 2)
    if questions:
        kind = "samples" if chosen["by"] == "loss" else "questions"
        yield (
            f"The figures are from {questions:,} {kind} about {chosen.get('images', 0):,} images or texts "
            f"of {chosen['benchmark']}{f', ranked by {ranks}' if ranks else ''}."
            + f" The choice was made on {chose:,} others."
            * (chosen.get("chosen_on") == "half")
        )
    elif chosen["by"] == "loss":
        yield "Training recorded only the mean of the loss, so how sure the choice is cannot be said."
    if chosen["best"] != chosen["selected"]:
        yield f"{chosen['best']} has the {_extreme(chosen)}."
    if average := chosen.get("average"):
        difference, limits = apart(chosen, average["difference"]), apart(chosen, *average["interval"])
        is_taken = "taken" if average["is_taken"] else "not taken"
        yield (
            f"{average['score']['checkpoint']}, the mean of the weights of {' and '.join(average['of'])}, scores "
            f"{difference} ({limits}) against {average['compared_with']}, and was {is_taken}."
        )
    if chosen.get("cross_fitted") is not None:
        worth = score_text(chosen["cross_fitted"], chosen)
        limits = between(chosen.get("cross_fitted_interval"), chosen)
        limits = f" ({limits})" if limits else ""
        yield f"Cross-fitted, that is, chosen on one half and scored on the other, the choice scores {worth}{limits}."
    yield from chosen.get("meaning", {}).values()


def apart(chosen: Line, *differences: float) -> str:
    """Return a difference, or the limits of one, as text: -0.4 to +1.2 points."""
    is_share = metric_of(chosen).is_share
    return " to ".join(f"{100 * d:+.1f}" if is_share else f"{d:+.4f}" for d in differences) + " points" * is_share


def benchmarks_of(chosen: Line) -> Line:
    """Return the benchmarks of a selection, if there are several."""
    found: Line = chosen.get("benchmarks", {})
    return found if len(found) > 1 else {}


def benchmark_rows(chosen: Line) -> Iterable[dict[str, str]]:
    """Yield a row for each benchmark of a selection by several: what it counts, and what the selected one scores."""
    names = [score["checkpoint"] for score in chosen["scores"]]
    selected = chosen["selected"] if chosen["selected"] in names else chosen["average"]["compared_with"]
    for name, own in benchmarks_of(chosen).items():
        is_flat, is_below = len(own["tied"]) == len(names), selected not in own["tied"]
        yield {
            "name": name,
            "weight": percent(own["weight"]),
            "score": score_text(own["scores"][names.index(selected)], own),
            "interval": between(own["intervals"][names.index(selected)], own),
            "note": "cannot tell the checkpoints apart" * is_flat + f"below its best, {own['best']}" * is_below,
        }


def _extreme(chosen: Line) -> str:
    metric = metric_of(chosen)
    return f"lowest {metric.name}" if metric.lower_is_better else "highest score"


def _reason(chosen: Line) -> str:
    if chosen["rule"] == "earliest_not_worse":
        return "it is the earliest that cannot be told apart from the best, and has"
    if chosen["selected"] != chosen["best"]:
        is_average = (chosen.get("average") or {}).get("is_taken")
        is_worse = score_of(chosen, chosen["best"]).get("worse_than_base")
        those = "are not worse than the base" if is_worse else "still have their weights"
        return "it is significantly better, and has" if is_average else f"it is the best of those that {those}, and has"
    return f"it has the {_extreme(chosen)},"


def scores(chosen: Line) -> Iterable[dict[str, Any]]:
    """Yield the rows of the table of checkpoints. `chosen` has the keys of selection.json."""
    for score in chosen["scores"]:
        yield {
            "name": score["checkpoint"],
            "score": score_text(score["score"], chosen),
            "interval": between(score.get("interval"), chosen),
            "p_best": "" if score.get("p_best") is None else percent(score["p_best"]),
            "is_selected": score["checkpoint"] == chosen["selected"],
            "is_tied": score["checkpoint"] in chosen["tied"],
            "note": ", ".join(_notes(score, chosen)),
        }


def _notes(score: Line, chosen: Line) -> Iterable[str]:
    if not score.get("has_weights", True):
        yield "weights removed"
    elif score["checkpoint"] == chosen["best"]:
        yield "best"
    if worse := score.get("worse_than_base"):
        yield f"worse than the base on {', '.join(worse)}"
