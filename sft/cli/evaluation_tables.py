"""What a model scored, as tables: one task in detail, several on a line each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group

from sft.cli.terminal import percent, table
from sft.core.metric import ACCURACY, Metric

Summary = dict[str, Any]
"""What `Task.summary` returns."""


def show_summaries(summaries: Sequence[Summary], out: Console) -> None:
    """Print one task in detail, by each way of scoring it; or several on a line each."""
    if len({summary["benchmark"] for summary in summaries}) > 1:
        out.print(_overview(summaries))
        return
    for summary in summaries:
        if "letters" in summary:
            _show_multiple_choice(summary, out)
        else:
            _show_task(summary, out)


def metric_of(summary: Summary) -> Metric:
    """Return what the score of a summary measures."""
    return Metric(**summary["metric"]) if "metric" in summary else ACCURACY


def score_text(score: float, metric: Metric) -> str:
    """Return a score as text: a share in percent."""
    return percent(score) if metric.is_share else f"{score:.4f}"


def _figure(summary: Summary) -> str:
    """Return the score with its standard error."""
    metric, error = metric_of(summary), summary["standard_error"]
    score = score_text(summary["accuracy" if "accuracy" in summary else "score"], metric)
    return f"{score} ± {100 * error:.1f}" if metric.is_share else f"{score} ± {error:.4f}"


def _between(summary: Summary) -> str:
    low, high = (score_text(limit, metric_of(summary)) for limit in summary["interval"])
    return f"{low} to {high}"


def _blind(summary: Summary) -> str:
    return "" if summary["blind"] is None else score_text(summary["blind"], metric_of(summary))


def _overview(summaries: Sequence[Summary]) -> Group:
    rows = [
        (
            summary["benchmark"] + (f" by {summary['rank']}" if "rank" in summary else ""),
            f"{summary['questions']:,}",
            score_text(summary["accuracy" if "accuracy" in summary else "score"], metric_of(summary)),
            _between(summary),
            _blind(summary),
        )
        for summary in summaries
    ]
    names = dict.fromkeys(metric_of(summary).name for summary in summaries)
    return table(f"tasks, by {', '.join(names)}", ("task", "questions", "score", "95 % interval", "no image"), rows)


def _show_task(summary: Summary, out: Console) -> None:
    """Print one task: by category, over all, and without images."""
    metric = metric_of(summary)
    shots = f", {summary['shots']} shot{'s' * (summary['shots'] > 1)}" if summary["shots"] else ""
    blind = "" if summary["with_images"] else ", without images"
    rows = [
        (name, str(part["questions"]), score_text(part["score"], metric))
        for name, part in summary["categories"].items()
    ]
    rows.append(("all", str(summary["questions"]), _figure(summary)))
    out.print(table(f"{summary['benchmark']}, {metric.name}{shots}{blind}", ("category", "questions", "score"), rows))
    out.print(f"95 % interval {_between(summary)}, over images as clusters")
    if summary["blind"] is not None and summary["with_images"]:
        out.print(f"without images {_blind(summary)}")
    _show_filtered(summary, out)
    out.print(f"protocol {summary['protocol_hash']}\n")


def _show_filtered(summary: Summary, out: Console) -> None:
    for reason, number in summary["filtered"].items():
        out.print(f"{number} questions were left out: {reason}")


def _show_multiple_choice(summary: Summary, out: Console) -> None:
    """Print one way of scoring options: by category, over all, and what to compare it with."""
    shots = f", {summary['shots']} shot{'s' * (summary['shots'] > 1)}" if summary["shots"] else ""
    blind = "" if summary["with_images"] else ", without images"
    title = f"{summary['benchmark']}, {summary['protocol']}, by {summary['rank']}{shots}{blind}, {summary['rows']} rows"
    if summary["accuracy"] is None:
        out.print(f"{title}: answers not scored here, in {summary['submission']}")
    else:
        parts = [(*part, "") for part in summary["categories"].items()]
        if summary["l2_categories"] != summary["categories"]:
            parts += [(*part, " (l2)") for part in summary["l2_categories"].items()]
        rows = [(f"{name}{kind}", str(part["questions"]), percent(part["accuracy"])) for name, part, kind in parts]
        rows.append(("all", str(summary["questions"]), _figure(summary)))
        out.print(table(title, ("category", "questions", "accuracy"), rows))
        out.print(f"95 % interval {_between(summary)}, over images as clusters")
        if summary["blind"] is not None and summary["with_images"]:
            out.print(f"without images {_blind(summary)}")
        again = f" ({percent(summary['independent_chance'])} if each rotation is guessed separately)"
        anew = again if summary["protocol"] == "circular" else ""
        out.print(f"chance {percent(summary['chance'])}{anew}")
    _show_filtered(summary, out)
    if summary["not_finite"]:
        out.print(f"{summary['not_finite']} rows count as wrong: the model's outputs are not finite there")
    for deviation in summary["deviations"]:
        out.print(f"differs from its source: {deviation}")
    letters = ", ".join(f"{letter} {percent(share)}" for letter, share in summary["letters"].items())
    out.print(f"letters predicted: {letters}\nprotocol {summary['protocol_hash']}\n")
