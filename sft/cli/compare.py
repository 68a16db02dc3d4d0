"""`idefics-sft compare A B`: two models on the same questions, and how sure their difference is."""

from __future__ import annotations

from collections import defaultdict
from itertools import groupby
from typing import Annotated, Any

import typer
from rich.console import Console

from sft.cli.evaluate import Evaluation
from sft.cli.several import Nproc, start
from sft.cli.terminal import Json, console, print_json, table

EXAMPLES = (
    "compare runs/mine@2000 runs/mine@4000",
    "compare runs/mine runs/mine@base --task vqav2=coco",
)


def run(
    context: typer.Context,
    first: Annotated[str, typer.Argument(metavar="A", help="A folder, a hub id, a recipe, RUN, RUN@STEP or RUN@base.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The model that A is compared with.")],
    task: Annotated[
        list[str] | None, typer.Option(metavar="TASK[=PATH]", help="One of `tasks list`; by default that of A's run.")
    ] = None,
    benchmark: Annotated[
        str | None, typer.Option("--benchmark", "--data", metavar="PATH", help="The data of the tasks.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="The part of the benchmark; `tasks list` has them.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Answered questions shown before each.")] = None,
    max_questions: Annotated[int | None, typer.Option(min=1, help="A seeded part, by whole images.")] = None,
    nproc: Nproc = 1,
    json: Json = False,
) -> None:
    """Score two models on the same questions: their difference, its interval, and how probable it is that A is better.

    Answers that a run has kept are not computed again.
    """
    from sft.core.distributed import process_group
    from sft.runs.names import chosen_by
    from sft.selection.outcomes import pair_of

    if nproc > 1:
        start(context)
    changes: defaultdict[str, Any] = defaultdict(lambda: None, by=tuple(task) if task else None, benchmark=benchmark)
    changes |= {"split": split, "shots": shots, "max_questions": max_questions}
    found = []
    with process_group() as process:
        out = console(to_stderr=json)
        out.quiet = not process.is_main
        evaluation = Evaluation(first, changes, None)
        for letter, model in (("A", first), ("B", second)):
            if letter == "B":
                evaluation.take(model)
            out.print(f"{letter}: {evaluation.path}{chosen_by(evaluation.path)}")
            found.append([(one.task, one.result) for one in evaluation.evaluate(False, False, out)])
    by_benchmark = [[list(own) for _, own in groupby(side, lambda one: one[0].benchmark)] for side in found]
    rows = [_row(own[0][0].benchmark, pair_of(own, other)) for own, other in zip(*by_benchmark, strict=True)]
    if process.is_main:
        print_json({"a": first, "b": second, "tasks": rows}) if json else _show(rows, out)


def _row(benchmark: str, pair: Any) -> dict[str, Any]:
    from dataclasses import asdict

    from sft.selection.bootstrap import compare_pair

    found, sign = compare_pair(pair, seed=0), pair.metric.sign
    a, b = pair.figures()
    return {
        "benchmark": benchmark,
        "metric": asdict(pair.metric),
        "questions": pair.parts[0].num_questions,
        "images": pair.num_clusters,
        "a": a.score,
        "b": b.score,
        "difference": sign * found.difference,
        "interval": sorted(sign * limit for limit in found.interval),
        "p_a_better": found.p_better,
        "detectable_difference": found.detectable_difference,
    }


def _show(rows: list[dict[str, Any]], out: Console) -> None:
    from sft.report.numbers import percent
    from sft.report.selection_text import apart, score_text

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        scores = (score_text(row[side], row) for side in "ab")
        difference = apart(row, row["difference"]).removesuffix(" points")
        return row["benchmark"], *scores, difference, apart(row, *row["interval"]), percent(row["p_a_better"])

    header = ("task", "A", "B", "A - B", "95 % interval", "P(A better)")
    out.print(table("A and B on the same questions", header, [cells(row) for row in rows]))
    out.print("A 95 % interval holds the true difference in 95 of 100 such comparisons.")
    out.print("P(A better) is the probability that A is truly better than B.")
    for row in rows:
        difference = row["detectable_difference"]
        size = "not said of fewer than 100 images" if difference is None else apart(row, difference).lstrip("+")
        out.print(f"{row['benchmark']}: the difference that 80 of 100 such comparisons would tell apart is {size}")
