"""`idefics-sft score TASK`: score predictions that another program made."""

from pathlib import Path
from typing import Annotated

import typer

from sft.cli.terminal import Json, console, print_json

EXAMPLES = (
    "score vqav2 --predictions results.json --data coco",
    "score nocaps --predictions captions.jsonl --data nocaps",
)


def run(
    task: Annotated[str, typer.Argument(metavar="TASK", help="One of `tasks list`.")],
    predictions: Annotated[
        Path, typer.Option(help="Results in the benchmark's official form, or an object a line with id and answer.")
    ],
    data: Annotated[str, typer.Option(help="The files of the benchmark; images are not needed.")],
    split: Annotated[str | None, typer.Option(help="The part of the benchmark; `tasks list` has them.")] = None,
    details: Annotated[Path | None, typer.Option(help="Write a line of JSON for each item.")] = None,
    json: Json = False,
) -> None:
    """Score predictions that are there already, without a model: by the same code that evaluates models."""
    from sft.cli.evaluation_tables import show_summaries
    from sft.core.errors import UserError
    from sft.evaluation.predictions import names_of, read_predictions, score_predictions
    from sft.evaluation.results import write_lines
    from sft.evaluation.task import PromptedTask
    from sft.evaluation.tasks import NamedTask, open_tasks
    from sft.recipe import EvaluationConfig

    found = read_predictions(predictions)
    settings = EvaluationConfig(split=split, ranks=("generate",))
    opened = open_tasks([NamedTask(task, data)], settings, Path("stores"), with_images=False)
    tasks = [own for own in opened if isinstance(own, PromptedTask)]
    if len(tasks) > 1:  # those of one file, each under its own name
        tasks = [own for own in tasks if any(own.label in line for line in found.values())]
    if not tasks:
        labels = " or ".join(own.label for own in opened if own.label)
        raise UserError(f"{predictions}: no predictions of {task} found" + (f"; expected {labels}" if labels else ""))
    if unscored := [own for own in tasks if not own.has_answers]:
        raise UserError(f"{unscored[0].benchmark}: a test split, without answers to score by")
    used = {name for own in tasks for names in names_of(own, found) for name in names}
    if unused := [name for name in found if name not in used]:
        out = console(to_stderr=json)
        out.print(f"{len(unused):,} of {len(found):,} predictions are of no item of {task}, the first is {unused[0]}")
    summaries = []
    for own in tasks:
        result = score_predictions(own, found, predictions)
        summaries.append(own.summary(result))
        if details:
            write_lines(result, details if len(tasks) == 1 else details.with_suffix(f".{own.label}{details.suffix}"))
    if json:
        print_json(summaries[0] | ({"by_task": {s["benchmark"]: s for s in summaries}} if len(summaries) > 1 else {}))
    else:
        show_summaries(summaries, console())
