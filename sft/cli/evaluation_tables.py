"""The scores of a model as tables: one task in detail, several on a line each."""

from __future__ import annotations

import json as json_text
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console, Group

from sft.cli.terminal import percent, print_json, table
from sft.core.shipped import shipped_root
from sft.report.selection_text import between, metric_of, score_text

if TYPE_CHECKING:
    from sft.evaluation.results import Result
    from sft.evaluation.task import Task

Summary = dict[str, Any]
"""The result of `Task.summary`."""


def show_summaries(summaries: Sequence[Summary], out: Console) -> None:
    """Print one task in detail, by each way of scoring it; several on a line each; or several numbers of shots."""
    if len({summary["shots"] for summary in summaries}) > 1:
        out.print(_curves(summaries))
        return
    if len({summary["benchmark"] for summary in summaries}) > 1:
        out.print(_overview(summaries))
    else:
        for summary in summaries:
            _show(summary, out)


def _score(summary: Summary) -> str:
    return score_text(summary["accuracy" if "accuracy" in summary else "score"], summary)


def _blind(summary: Summary) -> str:
    return "" if summary["blind"] is None else score_text(summary["blind"], summary)


def card_figure(model: str, select: str, summary: Summary) -> dict[str, float]:
    """Return what the model card says of a released model on a task with as many shots, as `card`."""
    cards = json_text.loads((shipped_root() / "model_configs" / "card_figures.json").read_text(encoding="utf-8"))
    task = summary.get("task", "") + (" by rices" if select == "rices" and summary["shots"] else "")
    known = cards.get(model, {})
    figure = known.get(summary["benchmark"], known.get(task, {})).get(str(summary["shots"]))
    return {} if figure is None else {"card": figure / 100}


def _card(summary: Summary) -> str:
    return score_text(summary["card"], summary) if "card" in summary else ""


def _name(summary: Summary) -> str:
    return str(summary["benchmark"]) + (f" by {summary['rank']}" if "rank" in summary else "")


def _curves(summaries: Sequence[Summary]) -> Group:
    """Return a row for each task and a column for each number of shots, with intervals and the card's figures."""
    by_task: dict[str, list[Summary]] = {}
    for summary in summaries:
        by_task.setdefault(_name(summary), []).append(summary)
    rows = []
    for task, own in by_task.items():
        rows.append((task, *map(_score, own)))
        rows.append(("  95 % interval", *(between(one["interval"], one) for one in own)))
        rows += [("  card", *map(_card, own))] if any("card" in one for one in own) else []
    header = [f"{number} shots" for number in dict.fromkeys(summary["shots"] for summary in summaries)]
    return table("score by shots", ("task", *header), rows)


def _overview(summaries: Sequence[Summary]) -> Group:
    card = ("card",) if any("card" in summary for summary in summaries) else ()
    rows = [
        (
            _name(summary),
            f"{summary['questions']:,}",
            _score(summary),
            between(summary["interval"], summary),
            _blind(summary),
            *([_card(summary)] if card else []),
        )
        for summary in summaries
    ]
    names = dict.fromkeys(metric_of(summary).name for summary in summaries)
    return table(
        f"tasks, by {', '.join(names)}", ("task", "questions", "score", "95 % interval", "no image", *card), rows
    )


def _show(summary: Summary, out: Console) -> None:
    """Print one way of scoring one task: scores, and what of the protocol and of the answers bears on them."""
    is_choice = "letters" in summary
    how = f"{summary['protocol']}, by {summary['rank']}" if is_choice else metric_of(summary).name
    shots = f", {summary['shots']} shot{'s' * (summary['shots'] > 1)}" if summary["shots"] else ""
    if summary.get("shots_alike_by"):
        shots += f" alike by {summary['shots_alike_by']}"
        shots += f" ({summary['shots_at_random']} items without: at random)" * bool(summary["shots_at_random"])
    blind = "" if summary["with_images"] else ", without images"
    title = f"{summary['benchmark']}, {how}{shots}{blind}" + (f", {summary['rows']} rows" if is_choice else "")
    if is_choice and summary["accuracy"] is None:
        out.print(f"{title}: answers not scored here, in {summary['submission']}")
    else:
        _show_scores(title, summary, out)
    for reason, number in summary["filtered"].items():
        out.print(f"{number} questions were left out: {reason}")
    if is_choice:
        _show_letters(summary, out)
    out.print(f"protocol {summary['protocol_hash']}\n")


def _show_scores(title: str, summary: Summary, out: Console) -> None:
    """Print scores by category and over all, and what to compare them with."""
    kind, metric, error = "accuracy" if "letters" in summary else "score", metric_of(summary), summary["standard_error"]
    parts = [(*part, "") for part in summary["categories"].items()]
    if summary.get("l2_categories", summary["categories"]) != summary["categories"]:
        parts += [(*part, " (l2)") for part in summary["l2_categories"].items()]
    rows = [(f"{name}{l2}", str(part["questions"]), score_text(part[kind], summary)) for name, part, l2 in parts]
    spread = f"{100 * error:.1f}" if metric.is_share else f"{error:.4f}"
    rows.append(("all", str(summary["questions"]), f"{_score(summary)} ± {spread}"))
    out.print(table(title, ("category", "questions", kind), rows))
    groups = " or groups of shots" * any("groups of shots" in name for name in summary.get("figures", {}))
    out.print(f"95 % interval {between(summary['interval'], summary)}, over images{groups} as clusters")
    if others := {name: share for name, share in summary.get("figures", {}).items() if name != metric.name}:
        out.print("; ".join(f"{name} {score_text(value, summary)}" for name, value in others.items()))
    if summary["blind"] is not None and summary["with_images"]:
        out.print(f"without images {_blind(summary)}")
    if "card" in summary:
        out.print(f"the model card has {_card(summary)}; docs/benchmarks.md says what can be compared")
    if "chance" in summary:
        again = f" ({percent(summary['independent_chance'])} if each rotation is guessed separately)"
        out.print(f"chance {percent(summary['chance'])}{again if summary['protocol'] == 'circular' else ''}")


def _show_letters(summary: Summary, out: Console) -> None:
    """Print how the rows of multiple-choice questions were answered, and where that differs from the protocol's
    source."""
    if summary["not_finite"]:
        out.print(f"{summary['not_finite']} rows count as wrong: the model's outputs are not finite there")
    for deviation in summary["deviations"]:
        out.print(f"differs from its source: {deviation}")
    letters = ", ".join(f"{letter} {percent(share)}" for letter, share in summary["letters"].items())
    out.print(f"letters predicted: {letters}")


class Found(NamedTuple):
    """A task with the model's results on it, with images and without."""

    task: Task
    result: Result
    blind: Result | None


def report(
    found: list[Found],
    details: Path | None,
    submission: Path | None,
    json: bool,
    out: Console,
    card: Callable[[dict[str, Any]], dict[str, float]],
) -> None:
    """Write the files that are asked for, and print the summaries."""
    summaries = []
    for task, result, blind in found:
        blind_score = blind.on_items_of(result).score if blind else None
        summary = task.summary(result, blind_score=blind_score)
        summaries.append(summary | card(summary))
    if details:
        _write_details(details, found)
    if submission:
        from sft.evaluation.tasks.mmbench.multiple_choice import MMBench
        from sft.evaluation.tasks.mmbench.submission import write_submission

        assert isinstance(found[0].task, MMBench)
        write_submission(submission, found[0].task.chosen.rows, found[0].result)
        summaries[0]["submission"] = str(submission)
    if not json:
        show_summaries(summaries, out)
        return
    by_rank = {summary["rank"]: summary for summary in summaries if "rank" in summary}
    by_shots: dict[str, dict[int, Any]] = defaultdict(dict)
    for summary in reversed(summaries):
        by_shots[summary["benchmark"]][summary["shots"]] = dict(summary)
    for summary in summaries if any(len(own) > 1 for own in by_shots.values()) else ():
        summary["by_shots"] = by_shots[summary["benchmark"]]
    by_task = {one.task.benchmark: summary for one, summary in reversed([*zip(found, summaries, strict=True)])}
    more = {"by_rank": by_rank} if len(by_rank) > 1 else {}
    print_json(summaries[0] | more | ({"by_task": by_task} if len(by_task) > 1 else {}))


def _write_details(file: Path, found: list[Found]) -> None:
    """Write one file, or one for each result with what tells it apart before the suffix."""
    from sft.evaluation.results import write_lines

    benchmarks, shots = ({getattr(one.task, name) for one in found} for name in ("benchmark", "shots"))
    for task, result, _ in found:
        names = [task.benchmark] * (len(benchmarks) > 1) + [task.label] * bool(task.label)
        label = ".".join(names + [f"{task.shots}_shots"] * (len(shots) > 1))
        write_lines(result, file if len(found) == 1 else file.with_suffix(f".{label}{file.suffix}"))
