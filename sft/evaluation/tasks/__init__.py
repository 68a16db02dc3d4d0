"""Benchmarks: a file or folder here is a task, found by its name. It sets `TASK` to a class of `sft.evaluation.task`.

    recipe, --by, --task ─named_tasks─> names and paths ─open_tasks─> tasks, ready to be asked

mmbench      multiple-choice questions of MMBench's layout
exact_match  questions of your own with short answers
loss         the loss on what a run's recipe holds out
vqav2        VQAv2, the model for others; docs/benchmarks.md lists those of the model card

A new benchmark needs no other change. A dotted name loads a module of the user's own. The class says what is asked
(`items`, `queries`), how (`how`) and what an answer is worth (`score`); docs/extending.md has the contract.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import NamedTuple, get_args

from sft.core.errors import UserError, nearest
from sft.evaluation.task import How, PromptedTask, Task
from sft.evaluation.task_source import HeldOut, TaskSource
from sft.recipe import EvaluationConfig


class NamedTask(NamedTuple):
    """A task as a recipe or the command line names it."""

    name: str
    data: str | None
    """File or folder of its data, where it is named."""


def task_names() -> list[str]:
    """Return the names of all tasks, in alphabetical order."""
    return sorted(module.name for module in iter_modules(__path__))


def task_module(name: str) -> ModuleType:
    """Return the module of a task: one of this folder, or one of the user's own by its dotted name.

    Raises:
        UserError: there is none of that name, or it names no task.
    """
    known = task_names()
    if name not in known and "." not in name:
        raise UserError(f"{name}: no such task{nearest(name, known)} (known: {', '.join(known)})")
    try:
        module = import_module(f"{__name__}.{name}" if name in known else name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports what is not
        raise UserError(f"task {name!r}: no such module can be imported ({error})") from error
    if not hasattr(module, "TASK"):
        raise UserError(f"task {name!r}: the module has no TASK; set it to the class of the task")
    return module


def task_type(name: str) -> type[Task]:
    """Return the class of a task.

    Raises:
        UserError: see `task_module`; or TASK is no class of a task, or lacks something of one.
    """
    found: type[Task] | object = task_module(name).TASK
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise UserError(
            f"task {name!r}: TASK is {found!r}; expected a class that inherits from sft.evaluation.task.Task"
        )
    _check_has(name, found, *sorted(found.__abstractmethods__), "name", "metric", "how", "unit")
    return found


def _check_has(name: str, whose: object, *attributes: str) -> None:
    abstract: frozenset[str] = getattr(whose, "__abstractmethods__", frozenset())
    lacking = [attribute for attribute in attributes if attribute in abstract or not hasattr(whose, attribute)]
    if lacking:
        of = whose.__name__ if isinstance(whose, type) else type(whose).__name__
        raise UserError(f"task {name!r}: {of} has no {', '.join(lacking)}; see sft/evaluation/task.py")


def named_tasks(settings: EvaluationConfig) -> list[NamedTask]:
    """Return the tasks that a recipe names; where it leaves `by` open, the one that goes with its benchmark.

    Raises:
        UserError: there is no task of such a name.
    """
    data = settings.benchmark
    if settings.by is None:
        is_jsonl = data is not None and data.endswith(".jsonl")
        return [NamedTask("loss" if data is None else "exact_match" if is_jsonl else "mmbench", data)]
    found = []
    for text in (settings.by,) if isinstance(settings.by, str) else settings.by:
        name, equals, path = text.partition("=")
        task_type(name)
        found.append(NamedTask(name, path if equals else data))
    return found


def open_tasks(
    named: Sequence[NamedTask],
    settings: EvaluationConfig,
    store: Path,
    *,
    held_out: HeldOut | None = None,
    with_images: bool = True,
) -> list[Task]:
    """Read the benchmarks of these names. Without images they are not asked, only scored.

    Raises:
        UserError: one is missing or damaged.
    """
    found: list[Task] = []
    for name, data in named:
        source = TaskSource(data=data, settings=settings, store=store, held_out=held_out, needs_images=with_images)
        opened = task_type(name).open(source)
        for task in opened:
            _check_opened(name, task)
        found += opened
    return found


def _check_opened(name: str, task: Task) -> None:
    """Check what the constructor of a task has to set.

    Raises:
        UserError: something is missing, or there is nothing to ask.
    """
    _check_has(name, task, "benchmark")
    if task.how not in get_args(How):
        raise UserError(f"task {name!r}: how is {task.how!r}; expected {' or '.join(get_args(How))}")
    if not isinstance(task, PromptedTask):
        return
    _check_has(name, task, "items")
    if not task.items:
        raise UserError(f"task {name!r}: has no items; expected one at least")
    _check_has(name, task.items[0], "id", "cluster", "image_sha256", "category", "answers")
    if task.how == "generate" and task.max_new_tokens < 1:
        raise UserError(f"task {name!r}: max_new_tokens is {task.max_new_tokens}; expected 1 or more")
