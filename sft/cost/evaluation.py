"""What it takes to evaluate a model: forwards, tokens and time, here and with a forward for each candidate (naive).

Work is in text tokens of the language model. An image costs as many as its encoding has operations for (24 in
idefics-9b); in families whose images are text, their tokens are counted as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from math import ceil
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from sft.core.errors import UserError
from sft.cost.family import COMMON_SIZE, Setting, model_and_settings
from sft.evaluation.task import How, PromptedTask, Typical
from sft.evaluation.tasks import NamedTask, named_tasks, open_tasks, task_names, task_type
from sft.recipe import EvaluationConfig

if TYPE_CHECKING:
    from sft.models.chat_template import ChatTemplate

LENGTH = 512  # tokens of a sequence, for the share of attention in the work
TOKENS_PER_FORWARD, BATCH_SIZE = 4096, 16  # as `sft.evaluation.rank_answers` and `generate_answers` have them
SUPPORT = 2048  # distinct images of all shots: those of the card's support sets
SAMPLE = 32  # items whose prompts are measured, evenly spread; the options of an eighth of them


def plan_evaluation(
    name: str,
    overrides: Sequence[str],
    by: Sequence[str],
    shots: Sequence[int],
    max_questions: int | None,
    speed: float,
) -> dict[str, Any]:
    """Return what evaluating a RECIPE or MODEL takes at a speed in operations a second: a row for each task, the sum
    over numbers of shots. Tasks and shots that are not named are those of the recipe, else those of the model card.

    Raises:
        UserError: files are missing, or nothing is known of a model, or of a task without files.
    """
    model, folder, settings = model_and_settings(name, overrides)
    if by:
        settings = settings.model_copy(update={"by": tuple(by), "benchmark": None})
    card = [NamedTask(task, None) for task in task_names() if task_type(task).typical]
    asked = (Setting(tokens=LENGTH, images=n, image_weight=n, trained_tokens=0, trainable=()) for n in (1, 2))
    one, two = (model.cost(setting).flop for setting in asked)
    flop, image_tokens = (2 * one - two) / LENGTH, model.image_tokens(*COMMON_SIZE)
    weight = model.fullest_images(image_tokens, 1_000_000)[1] if image_tokens else 1
    rows = []
    for task, data in named_tasks(settings) if settings.by or settings.benchmark else card:
        known = task_type(task).typical
        usual = known.shots if known and not data else (settings.asked_shots.number,)
        numbers = (tuple(shots) or usual) if known is None or known.shot else (0,)
        sizes = _measured(task, data, settings, max(numbers), folder) if data else _typical(task, settings, by)
        for label, how, available, size in sizes:
            items = min(available, max_questions or settings.max_questions or available)
            if not data:  # measured prompts have them
                size = size._replace(query=size.query + image_tokens, shot=size.shot + image_tokens)
            all_work = [work(how, size, items, k, weight * (two - one) / flop, settings) for k in numbers]
            source = "files" if data else "typical"
            row: dict[str, Any] = {"task": label, "from": source, "shots": numbers, "items": items}
            row |= {key: sum(own[key] for own in all_work) for key in all_work[0]}
            row |= {f"{kind}gpu_hours": row[f"{kind}tokens"] * flop / speed / 3600 for kind in ("", "naive_")}
            rows.append(row | {"standard_error": (0.25 / items) ** 0.5})
    sums = [key for key in rows[0] if key.endswith(("queries", "forwards", "tokens", "hours"))]
    return {"tasks": rows} | {key: sum(row[key] for row in rows) for key in sums}


def work(how: How, size: Typical, items: int, shots: int, image: float, settings: EvaluationConfig) -> dict[str, float]:
    """Return what so many items of a task take, with some shots each, where an image costs so many tokens."""
    is_grouped, queries = settings.asked_shots.select == "groups", items * size.queries
    prefix = shots * size.shot
    whole = prefix + size.query + (shots + 1) * image
    if how == "generate":
        tokens = queries * (whole + settings.num_beams * size.option)
        forwards = ceil(queries / BATCH_SIZE) * size.option
        return {"queries": queries, "forwards": forwards, "tokens": tokens, "naive_tokens": tokens}
    each = size.query + image + size.tree + prefix * (not is_grouped)
    forwards = ceil(queries / max(1, TOKENS_PER_FORWARD // each))
    tokens = queries * each + is_grouped * forwards * prefix + min(queries * shots, SUPPORT) * image
    naive = queries * size.options * (whole + size.option)
    return {"queries": queries, "forwards": forwards, "tokens": tokens, "naive_tokens": naive}


Size = tuple[str, How, int, Typical]
"""Name, way of asking, items and prompts of a task."""


def _typical(name: str, settings: EvaluationConfig, is_named: object) -> Iterator[Size]:
    kind = task_type(name)
    if not (size := kind.typical):
        raise UserError(f"{name}: plan knows no prompts that are typical of it; give {name}=PATH")
    usual = [*size.items][0 if is_named else -1]
    split = settings.split if settings.split and settings.split in size.items else usual
    yield f"{name}_{split}", kind.how, size.items[split], size


def _measured(name: str, data: str | None, settings: EvaluationConfig, shots: int, folder: Path) -> Iterator[Size]:
    """Yield the size of each task of some files, by its items without shots and with some."""
    from sft.models.loaded_model import find_family, load_template

    def opened(number: int) -> list[PromptedTask[Any]]:
        own = settings.asked_shots.model_copy(update={"number": number, "select": "random", "features": None})
        asked = settings.model_copy(update={"shots": own})
        tasks = open_tasks([NamedTask(name, data)], asked, Path("stores"), with_images=False)
        return [task for task in tasks if isinstance(task, PromptedTask)]

    template = None
    with suppress(UserError):  # released models that are not here have typical prompts
        template = load_template(find_family(folder), folder) if (folder / "config.json").is_file() else None
    if not issubclass(task_type(name), PromptedTask) or not (template or task_type(name).typical):
        raise UserError(f"{name}: plan measures prompts, if a task has any, with the tokenizer of a model that is here")
    for task, with_shots in zip(opened(0), opened(shots), strict=True):
        size = measured(task, with_shots, template) if template else task.typical
        assert size
        yield f"{task.benchmark} {task.label}".strip(), task.how, len(task.items), size


def measured(task: PromptedTask[Any], with_shots: PromptedTask[Any], template: ChatTemplate) -> Typical:
    """Return the size of a task by its own items, asked without shots and with some."""
    every = len(task.items) // SAMPLE + 1
    asked, shown = ([query for item in one.items[::every] for query in one.queries(item)] for one in (task, with_shots))
    lengths = ((len(template.encode_prompt(q.sample.messages).input_ids) for q in own) for own in (asked, shown))
    query, longer = (mean(own) for own in lengths)
    encoded = [[template.encode_answer(q.sample.messages, text) for text in q.options] for q in asked[::8]]
    options = [[tuple(one.input_ids[start : end - 1]) for one, (start, end) in own] for own in encoded]
    return Typical(
        items={},
        query=query,
        shot=(longer - query) / max(with_shots.shots, 1),
        queries=len(asked) / len(task.items[::every]),
        options=mean(map(len, options)),
        option=mean(len(ids) for own in options for ids in own) if options[0] else task.max_new_tokens,
        tree=mean(len({ids[:n] for ids in own for n in range(1, len(ids) + 1)}) for own in options),
    )
