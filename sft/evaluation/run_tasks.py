"""Asking a model tasks, each once: what a run keeps of the same weights under the same protocol is read back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from sft.core.distributed import all_or_none, from_main, is_main_process
from sft.evaluation.alike import find_alike
from sft.evaluation.generate_answers import generate_answers
from sft.evaluation.questions import Questions
from sft.evaluation.rank_answers import score_answers
from sft.evaluation.results import Result, find_result, write_result
from sft.evaluation.task import Answer, MeasuredTask, OnProgress, PromptedTask, Query, Task
from sft.models.loaded_model import Load, Loaded, find_family, load_for_inference, load_template
from sft.runs.checkpoint import weights_hash

Answers = list[list[Answer | None]]
"""For each item, the answers to its queries; None where a query is too long."""


def score_model(
    path: str | Path,
    tasks: Sequence[Task],
    *,
    run_dir: Path | None = None,
    name: str = "",
    load: Load = load_for_inference,
    on_progress: OnProgress = lambda done, total: None,
) -> list[Result]:
    """Return the result of a model on each task, kept in the run under `name` and read back if it is there; without a
    run nothing is kept. The model is loaded, by `load`, when something is to be asked.

    All processes share in asking. Tasks of one benchmark share their forwards.

    Raises:
        UserError, RunError: the model cannot be loaded, or it is asked in vain; see the tasks.
    """
    for task in tasks:
        if isinstance(task, Questions) and task.shots_drawn and task.shots_drawn.alike_by == "":
            find_alike(task, path, run_dir, load, on_progress)
    hashes, kept, weights = from_main(lambda: _kept(path, tasks, run_dir, name))
    results = {task: result for task, result in zip(tasks, kept, strict=True) if result}
    missing = {task: own for task, own in zip(tasks, hashes, strict=True) if task not in results}
    if missing:
        with all_or_none():
            loaded = load(path)
        for task, result in _ask(Path(path), loaded, missing, weights, on_progress):
            with all_or_none():
                if run_dir and is_main_process():
                    write_result(result, task.summary(result), run_dir, name)
            results[task] = result
    return [results[task] for task in tasks]


def _kept(
    path: str | Path, tasks: Sequence[Task], run_dir: Path | None, name: str
) -> tuple[list[str], list[Result | None], str]:
    """Return the hash of each task's protocol, what is kept of each, and the hash of the weights."""
    template = load_template(find_family(path), path)
    hashes = [task.protocol_hash(template) for task in tasks]
    if run_dir is None:
        return hashes, [None for _ in tasks], ""
    weights = weights_hash(Path(path))
    kept = [
        find_result(run_dir, task.benchmark, protocol_hash, name, weights=weights, num_rows=task.num_rows)
        for task, protocol_hash in zip(tasks, hashes, strict=True)
    ]
    return hashes, kept, weights


def _ask(
    path: Path, loaded: Loaded, hash_of: Mapping[Task, str], weights: str, on_progress: OnProgress
) -> Iterator[tuple[Task, Result]]:
    for _, group in groupby(hash_of, key=lambda task: task.name):
        own = list(group)
        answers = ask(loaded, own, on_progress)
        for task in own:
            if isinstance(task, PromptedTask):
                yield task, task.result(answers[task], hash_of[task], weights)
            elif isinstance(task, MeasuredTask):
                outcomes = tuple(task.measure(path, loaded, on_progress))
                result = Result(
                    benchmark=task.benchmark, protocol_hash=hash_of[task], outcomes=outcomes, weights=weights
                )
                yield task, result


def ask(
    loaded: Loaded, tasks: Sequence[Task], on_progress: OnProgress = lambda done, total: None
) -> dict[Task, Answers]:
    """Ask a model all prompts of the tasks; those that rank by likelihood share their forwards.

    Raises:
        SkipSample: an image does not decode.
    """
    prompted = [task for task in tasks if isinstance(task, PromptedTask)]
    found: dict[Task, Answers] = {}
    ranked = [task for task in prompted if task.how == "rank"]
    if ranked:
        found |= _in_one_call(ranked, partial(_rank, loaded, on_progress))
    for task in prompted:
        if task.how == "generate":
            found |= _in_one_call([task], partial(_generate, loaded, on_progress, task))
    return found


def _in_one_call(tasks: Sequence[Task], call: Callable[[list[Query]], Iterable[Answer | None]]) -> dict[Task, Answers]:
    """Return the answers of each task, where `call` answers the queries of all of them in order."""
    asked = {task: list(task.all_queries()) for task in tasks if isinstance(task, PromptedTask)}
    answers = iter(call([query for own in asked.values() for queries in own for query in queries]))
    return {task: [list(islice(answers, len(queries))) for queries in own] for task, own in asked.items()}


def _rank(loaded: Loaded, on_progress: OnProgress, queries: list[Query]) -> Iterator[Answer | None]:
    scores = score_answers(
        loaded.model,
        loaded.template,
        queries,
        autocast=loaded.autocast,
        max_positions=loaded.max_positions,
        on_progress=on_progress,
    )
    return (None if own is None else Answer(scores=tuple(own)) for own in scores)


def _generate(
    loaded: Loaded, on_progress: OnProgress, task: PromptedTask[Any], queries: list[Query]
) -> Iterator[Answer | None]:
    texts = generate_answers(
        loaded.model,
        loaded.template,
        [query.sample for query in queries],
        max_new_tokens=task.max_new_tokens,
        num_beams=task.num_beams,
        forbidden=task.forbidden(),
        max_positions=loaded.max_positions,
        autocast=loaded.autocast,
        on_progress=on_progress,
    )
    return (None if text is None else Answer(text=task.cut(text)) for text in texts)
