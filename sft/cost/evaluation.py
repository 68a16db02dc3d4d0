"""What it takes to evaluate a model: forwards, tokens and time, here and with a forward for each candidate (naive).

Work is in text tokens of the language model. An image costs as many as its encoding has operations for (24 in
idefics-9b); in families whose images are text, their tokens are counted as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from math import ceil, sqrt
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

from sft.core.errors import UserError
from sft.core.shipped import resolve
from sft.cost.family import COMMON_SIZE, ModelCost, Setting, read_any_model, read_model
from sft.evaluation.task import How, PromptedTask, Typical
from sft.evaluation.tasks import NamedTask, named_tasks, open_tasks, task_names, task_type
from sft.models import base_of
from sft.models.base_model import base_path
from sft.recipe import EvaluationConfig
from sft.runs.names import find_model, find_recipe, recipe_of_model

if TYPE_CHECKING:
    from sft.models.chat_template import ChatTemplate

LENGTH = 512
"""Tokens of a sequence, for the share of attention in the work."""
TOKENS_PER_FORWARD, BATCH_SIZE = 4096, 16
"""As `sft.evaluation.rank_answers` and `generate_answers` have them."""
SUPPORT = 2048
"""Distinct images of all shots: those of the card's support sets."""
SAMPLE = 32
"""Items whose prompts are measured, evenly spread; the options of an eighth of them."""


class Unit(NamedTuple):
    """What work is measured in: operations of a text token; tokens as dear as encoding an image; its own tokens."""

    flop: float
    image: float
    image_tokens: int = 0


def unit_of(model: ModelCost) -> Unit:
    """Return the unit of a model, with images of a common size."""
    asked = [Setting(tokens=LENGTH, images=n, image_weight=n, trained_tokens=0, trainable=()) for n in (1, 2)]
    one, two = (model.cost(setting).flop for setting in asked)
    token, tokens = (2 * one - two) / LENGTH, model.image_tokens(*COMMON_SIZE)
    weight = model.fullest_images(tokens, 1_000_000)[1] if tokens else 1
    return Unit(token, weight * (two - one) / token, tokens)


class Work(NamedTuple):
    """What a task takes."""

    queries: float
    forwards: float
    tokens: float
    naive_forwards: float
    naive_tokens: float


def work(how: How, size: Typical, items: int, shots: int, unit: Unit, settings: EvaluationConfig) -> Work:
    """Return what so many items of a task take, with some shots each."""
    is_grouped, queries = settings.asked_shots.select == "groups", items * size.queries
    prefix, own = shots * (size.shot + unit.image_tokens), size.query + unit.image_tokens
    whole = prefix + own + (shots + 1) * unit.image
    if how == "generate":
        tokens = queries * (whole + settings.num_beams * size.option)
        return Work(queries, ceil(queries / BATCH_SIZE) * size.option, tokens, queries * size.option, tokens)
    each = own + unit.image + size.tree + prefix * (not is_grouped)
    forwards = ceil(queries / max(1, TOKENS_PER_FORWARD // each))
    tokens = queries * each + is_grouped * forwards * prefix + min(queries * shots, SUPPORT) * unit.image
    naive = queries * size.options
    return Work(queries, forwards, tokens, naive, naive * (whole + size.option))


def plan_evaluation(
    name: str,
    overrides: Sequence[str],
    named: Sequence[str],
    shots: Sequence[int],
    max_questions: int | None,
    flop_per_second: float,
) -> dict[str, Any]:
    """Return what evaluating a RECIPE or MODEL takes: a row for each task, the sum over numbers of shots. Tasks and
    shots that are not named are those of the recipe, else all of the model card.

    Raises:
        UserError: files are missing, or nothing is known of a model, or of a task without files.
    """
    recipe = find_recipe(name, overrides) if overrides else recipe_of_model(name)
    path = base_of(recipe) if recipe else str(find_model(name))
    unit = unit_of(
        read_model(recipe.model.family, path, recipe.model.image_settings) if recipe else read_any_model(path)
    )
    settings = recipe.evaluation if recipe else EvaluationConfig()
    settings = settings.model_copy(update={"by": tuple(named) or settings.by})
    card = [NamedTask(task, None) for task in task_names() if task_type(task).typical]
    tasks = named_tasks(settings) if settings.by or settings.benchmark else card
    template = _template(base_path(recipe) if recipe else resolve(path))
    rows = []
    for task, data in tasks:
        known = task_type(task).typical
        usual = known.shots if known and not data else (settings.asked_shots.number,)
        numbers = (tuple(shots) or usual) if known is None or known.shot else (0,)
        for label, how, size, available, own in _sizes(
            task, data, settings, max(numbers), unit, template, tasks is card
        ):
            items = min(available, max_questions or settings.max_questions or available)
            total = Work(*map(sum, zip(*(work(how, size, items, k, own, settings) for k in numbers), strict=True)))
            head = {"task": label, "from": "files" if data else "typical", "shots": numbers, "items": items}
            rows.append(head | {"standard_error": sqrt(0.25 / items)} | total._asdict())
    for row in rows:
        for kind in ("", "naive_"):
            row[f"{kind}gpu_hours"] = row[f"{kind}tokens"] * unit.flop / flop_per_second / 3600
    keys = ("forwards", "tokens", "gpu_hours", "naive_forwards", "naive_tokens", "naive_gpu_hours")
    return {"model": path, "tasks": rows} | {key: sum(row[key] for row in rows) for key in keys}


def _template(folder: Path) -> ChatTemplate | None:
    """Return the template of a model whose tokenizer is here and takes conversations."""
    from sft.models.loaded_model import find_family, load_template

    with suppress(UserError):
        return load_template(find_family(folder), folder) if (folder / "config.json").is_file() else None
    return None


def _sizes(
    name: str,
    data: str | None,
    settings: EvaluationConfig,
    shots: int,
    unit: Unit,
    template: ChatTemplate | None,
    is_card: bool,
) -> Iterator[tuple[str, How, Typical, int, Unit]]:
    """Yield the name, the size and the items of each task: by its files, without shots and with some, if they are
    named and there is a template to measure with; else as is typical."""
    kind, size = task_type(name), task_type(name).typical
    if data is None and size:
        split = settings.split if settings.split in size.items else [*size.items][-1 if is_card else 0]
        yield f"{name}_{split}", kind.how, size, size.items[split], unit
        return

    def opened(number: int) -> list[PromptedTask[Any]]:
        own = settings.asked_shots.model_copy(update={"number": number, "select": "random", "features": None})
        asked = settings.model_copy(update={"shots": own})
        tasks = open_tasks([NamedTask(name, data)], asked, Path("stores"), with_images=False)
        return [task for task in tasks if isinstance(task, PromptedTask)]

    if not issubclass(kind, PromptedTask) or not (size or template):
        raise UserError(
            f"{name}: plan measures tasks that are asked by prompts, with the tokenizer of a model that is here"
        )
    for task, with_shots in zip(opened(0), opened(shots), strict=True):
        own = measured(task, with_shots, template) if template else size
        assert own
        label = f"{task.benchmark} {task.label}".strip()
        yield label, task.how, own, len(task.items), unit._replace(image_tokens=0) if template else unit


def measured(task: PromptedTask[Any], with_shots: PromptedTask[Any], template: ChatTemplate) -> Typical:
    """Return the size of a task by its own items, asked without shots and with some."""
    every = len(task.items) // SAMPLE + 1
    asked, shown = ([query for item in one.items[::every] for query in one.queries(item)] for one in (task, with_shots))
    lengths = [
        [len(template.encode_prompt(query.sample.messages).input_ids) for query in own] for own in (asked, shown)
    ]
    encoded = [[template.encode_answer(query.sample.messages, text) for text in query.options] for query in asked[::8]]
    options = [[tuple(one.input_ids[start : end - 1]) for one, (start, end) in own] for own in encoded]
    return Typical(
        items={},
        query=mean(lengths[0]),
        shot=(mean(lengths[1]) - mean(lengths[0])) / max(with_shots.shots, 1),
        queries=len(asked) / len(task.items[::every]),
        options=mean(map(len, options)),
        option=mean(len(ids) for own in options for ids in own) if options[0] else task.max_new_tokens,
        tree=mean(len({ids[:n] for ids in own for n in range(1, len(ids) + 1)}) for own in options),
    )
