"""Predictions that are there already, from another program: read in the forms that benchmarks publish, and scored.

One object for each item: its id, and its answer or the scores of its options. Forms that are read:

    one JSON object a line, or a list    {"id": 7, "answer": "red"} or {"id": 7, "scores": [-1.5, -0.2]}
    results of VQA and VizWiz            [{"question_id": 7, "answer": "red"}], [{"image": "a.jpg", "answer": "red"}]
    results of COCO's captions           [{"image_id": 7, "caption": "a red bus"}]
    results of VisDial                   [{"image_id": 7, "round_id": 3, "ranks": [1, 3, 2, ...]}]
    CSV with a head, as HatefulMemes'    id,proba,label

Of a task with several queries an item (Winoground), `scores` is a list for each; of tasks that share a file (FairFace)
the answer stands under the name of each: {"id": "val/1.jpg", "gender": "male"}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft.core.errors import UserError
from sft.evaluation.official_files import official_layout, read_csv, read_json, read_jsonl
from sft.evaluation.questions import Questions
from sft.evaluation.results import Result
from sft.evaluation.task import Answer, AnswerScore, PromptedTask

IDS = ("id", "question_id", "image_id", "image", "index")
ANSWERS = ("answer", "caption", "prediction")
SCORES = ("scores", "ranks", "proba")


def read_predictions(file: Path) -> dict[str, dict[str, Any]]:
    """Return the predictions of a file by their ids.

    Raises:
        UserError: it is missing or of no form that is read, or has two predictions of one id.
    """
    with official_layout(file):
        if file.suffix == ".csv":
            lines: list[Any] = list(read_csv(file))
        else:
            lines = read_jsonl(file) if file.suffix == ".jsonl" else list(read_json(file))
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        key = next((key for key in IDS if isinstance(line, dict) and key in line), None)
        if key is None:
            raise UserError(f"{file}: prediction {number} has no id; expected one of {', '.join(IDS)}")
        name = f"{line[key]} round {line['round_id']}" if "round_id" in line else str(line[key])
        if found.setdefault(name, line) is not line:
            raise UserError(f"{file}: {key} {name} has two predictions")
    return found


def score_predictions(task: PromptedTask[Any], predictions: Mapping[str, Mapping[str, Any]], file: Path) -> Result:
    """Return the result of a task by predictions.

    Raises:
        UserError: an item has no prediction, or one that is neither an answer nor scores of its options.
    """
    names = names_of(task, predictions)
    if missing := [name for own in names for name in own if name not in predictions]:
        raise UserError(f"{file}: {len(missing):,} items have no prediction, the first is {missing[0]}")
    answers = []
    for item, own in zip(task.items, names, strict=True):
        queries = task.queries(item)
        lines = [predictions[name] for name in own] * (len(queries) // len(own))
        options = task.options_of(item) if isinstance(task, Questions) else ()
        answers.append([_answer(task, line, options, number, file) for number, line in enumerate(lines)])
    if task.how == "rank" and not any(answer.is_finite for own in answers for answer in own):
        raise UserError(f"{file}: no answer is one of the options of {task.name}; expected {_examples(options)}")
    return task.result(answers, "", "")


def names_of(task: PromptedTask[Any], predictions: Mapping[str, Any]) -> list[list[str]]:
    """Return the names in a file of predictions of each item's queries."""
    return [[_known(str(name), predictions) for name in task.query_ids(item)] for item in task.items]


def _examples(options: Sequence[str]) -> str:
    return ", ".join(options[:3]) + (" and others" if len(options) > 3 else "")


def _known(name: str, predictions: Mapping[str, Any]) -> str:
    """Return a name, or that of its item where no round is named."""
    return name if name in predictions else name.partition(" round ")[0]


def _answer(
    task: PromptedTask[Any], line: Mapping[str, Any], options: Sequence[str], number: int, file: Path
) -> Answer:
    is_ranked = task.how == "rank"
    key = next((key for key in (task.label, *SCORES, *ANSWERS) if key in line), None)
    if key is None or (not is_ranked and key in SCORES):
        expected = " or ".join((*SCORES[:1], *ANSWERS)) if is_ranked else " or ".join(ANSWERS)
        raise UserError(f"{file}: the prediction with keys {', '.join(line)} has no {expected}")
    value = line[key]
    if not is_ranked:
        return Answer(text=str(value))
    with official_layout(file):
        scores = _scores(key, value, options, number)
    if len(scores) != len(options):
        raise UserError(f"{file}: {key} has {len(scores)} values for {len(options)} options")
    return Answer(scores=tuple(AnswerScore(score, 1) for score in scores))


def _scores(key: str, value: Any, options: Sequence[str], number: int) -> list[float]:
    """Return a score for each option; not numbers, which count as wrong, where an answer is none of them."""
    if key == "proba":
        chance = min(max(float(value), 1e-12), 1 - 1e-12)
        return [math.log(chance), math.log(1 - chance)]
    if key in SCORES:
        own = value[number] if value and isinstance(value[0], list) else value
        return [-float(one) if key == "ranks" else float(one) for one in own]
    said = str(value).strip().strip(".").lower()
    is_said = [option.strip().strip(".").lower() == said for option in options]
    return [float(own) if any(is_said) else math.nan for own in is_said]
