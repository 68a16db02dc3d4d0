"""What is wrong with a recipe: for each problem its line or override, what was found and what would be right."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from operator import eq
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from sft.core.errors import nearest
from sft.recipe.config import Recipe
from sft.recipe.json_schema import dotted_keys

Location = tuple[int | str, ...]  # the keys, and numbers of entries, that lead to a value, from the outermost on


def explain_problems(
    path: Path, node: yaml.Node | None, values: Any, changed: Any, overrides: Sequence[str]
) -> list[str]:
    """Return the problems of a recipe, each with the line of its file or the override that caused it. `node` and
    `values` are the file's content, `changed` its values after the overrides."""
    in_file = _problems(values)
    lines = []
    for problem, location in _problems(changed):
        is_own = (problem, location) in in_file
        where = f"{path}{_line(node, location)}" if is_own else _blame(overrides, problem, location)
        lines.append(f"{where}: {problem}")
    return lines


def explain_overrides(values: Any, overrides: Sequence[str]) -> list[str]:
    """Return the problems of `values`, to which `overrides` changed a recipe without any."""
    return [f"{_blame(overrides, problem, location)}: {problem}" for problem, location in _problems(values)]


def _causes(error: ValidationError) -> list[Any]:
    """Return the problems of an error, but none that follow from others: lists too short and keys missing for these."""
    problems = error.errors()
    around = {problem["loc"][:depth] for problem in problems for depth in range(len(problem["loc"]))}
    unknown = [problem["loc"] for problem in problems if problem["type"] == "extra_forbidden"]

    def follows(kind: str, location: Location) -> bool:
        if kind == "missing":
            return any(repr(location[-1]) in _hint(other) for other in unknown if other[:-1] == location[:-1])
        return kind == "too_short" and location in around

    return [problem for problem in problems if not follows(problem["type"], problem["loc"])]


def _problems(values: Any) -> list[tuple[str, Location]]:
    """Return the explained problems of a recipe, and where each is."""
    try:
        Recipe.model_validate(values)
    except ValidationError as error:
        return [(_explain(problem), problem["loc"]) for problem in _causes(error)]
    return []


def _explain(problem: Any) -> str:
    """Explain one pydantic error on one line: which key, what was found, what would be right."""
    location = problem["loc"]
    name = ".".join(str(part) for part in location if part != "[key]")
    if problem["type"] == "extra_forbidden":
        return f"{name}: unknown key{_hint(location)}"
    if problem["type"] == "missing":
        return f"{name}: this key is required"
    if problem["type"] in _EXPECTED:
        of_what = _of_what(location) if problem["type"] == "tuple_type" else ""
        return f"{name}: expected {_EXPECTED[problem['type']]}{of_what}, found {in_words(problem['input'])}"
    message = problem["msg"].removeprefix("Value error, ")
    should_be = message.partition("Input should be ")[2]
    if should_be:
        message = f"expected {'a number ' if should_be.startswith(('greater', 'less')) else ''}{should_be}"
    found = "" if isinstance(problem["input"], dict | BaseModel) else f", found {in_words(problem['input'])}"
    choices = re.findall("'([^']*)'", should_be) if problem["type"] == "literal_error" else ()
    return f"{name + ': ' if name else ''}{message}{found}{nearest(str(problem['input']), choices)}"


_EXPECTED = {
    "tuple_type": "a list",
    "too_short": "one entry or more",
    "too_long": "fewer entries",
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "a mapping of keys"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "string_type": "text",
}
"""Expected values in plain words, by pydantic's name of a problem, where pydantic's message uses Python's words."""


def in_words(value: Any) -> str:
    """Return a YAML value in plain words instead of Python's."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping of keys"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str | int | float) else str(value)


def _of_what(location: Location) -> str:
    """Return what a list is of: ` of sources`, for example."""
    field = _part_at(location[:-1]).model_fields.get(str(location[-1]))
    entry = next(iter(get_args(field.annotation)), None) if field else None
    if isinstance(entry, type) and issubclass(entry, BaseModel):
        return f" of {entry.__name__.removesuffix('Config').lower()}s"
    return ""


ELSEWHERE = """
training.epochs = num_train_epochs num_epochs n_epochs max_epochs epochs
training.max_steps = steps num_steps num_train_steps max_train_steps
training.learning_rate = lr peak_lr base_lr
training.final_learning_rate (the decay is linear) = min_lr final_lr lr_scheduler lr_scheduler_type
training.tokens_per_step (tokens of a step, all devices together) = batch_size train_batch_size global_batch_size \
    gradient_accumulation_steps accumulate_grad_batches
training.micro_batch_packs = per_device_train_batch_size per_device_batch_size micro_batch_size
training.warmup_steps (a number; left out, 3 % of the steps of training.epochs) = warmup_ratio warmup warmup_iters
training.clip = max_grad_norm gradient_clipping grad_clip
training.betas (both in a list) = adam_beta1 adam_beta2
training.optimizer = optim optimizer_type
training.precision = bf16 fp16 dtype torch_dtype mixed_precision
checkpoints.every_steps = save_steps save_interval
every step is in metrics.jsonl = logging_steps log_interval logging_strategy
evaluation.every_steps = eval_steps
data.sequence_length = max_length max_seq_length max_seq_len cutoff_len seq_length
data.validation.share = val_size val_set_size test_size
data.num_workers = dataloader_num_workers workers
model.path = model_name_or_path base_model model_id
model.lora.r = lora_r lora_rank
model.lora.alpha = lora_alpha
model.lora.targets = target_modules lora_target lora_target_modules
model.mode (qlora) = load_in_4bit quantization_bit
"""
"""Keys here, and what other trainers call them."""


def _hint_from_others(name: str) -> str:
    """Return the hint for a key of another trainer."""
    known = name.lower().replace("-", "_")
    lines = (line.split(" = ") for line in ELSEWHERE.strip().splitlines())
    here = next((key for key, names in lines if known in names.split()), "")
    return here and f"; here {'' if here.startswith('every ') else 'it is '}{here}"


def _hint(location: Location) -> str:
    """Return a hint at the key that an unknown one stands for: one of the same name elsewhere, else of a near name."""
    name = str(location[-1])
    near = nearest(name, _part_at(location[:-1]).model_fields)
    if len(location) > 2 and near:  # deeper, names like `path` mean other things
        return near
    if (hint := _hint_from_others(name)) or len(location) > 2:
        return hint
    return _hint_undotted(name) or _hint_elsewhere(name, 1.0) or near or _hint_elsewhere(name, 0.8)


def _hint_undotted(name: str) -> str:
    """Return the hint for `training.max_steps` as one key of a file."""
    meant = get_close_matches(name, dotted_keys(), n=1) if "." in name else []
    part, dot, last = meant[0].partition(".") if meant else ("", "", "")
    return f"; in a file, {last!r} stands inside {part!r}" if dot else ""


def _hint_elsewhere(name: str, likeness: float) -> str:
    """Return the hint for `max_steps` outside `training`."""
    places: dict[str, list[str]] = {}
    for key in dotted_keys():
        places.setdefault(key.rpartition(".")[2], []).append(repr(key))
    close = get_close_matches(name, places, n=1, cutoff=likeness)
    return f"; did you mean {' or '.join(places[close[0]])}?" if close else ""


def _blame(overrides: Sequence[str], problem: str, location: Location) -> str:
    """Return the overrides that may have caused a problem: of its key, around it or in it; of these what it names."""
    keys = {override: override.partition("=")[0].split(".") for override in overrides}
    there = [override for override, key in keys.items() if all(map(eq, key, map(str, location)))] or overrides
    blamed = [override for override in there if keys[override][-1] in problem] or there
    return f"override{'s' * (len(blamed) > 1)} {', '.join(map(repr, blamed))}"


def _line(node: yaml.Node | None, location: Location) -> str:
    """Return `:` and the line of the deepest key of `location` that the file has, nothing where it has none."""
    line = 0
    for part in location:
        if isinstance(node, yaml.MappingNode):
            match = [(key, value) for key, value in node.value if key.value == part]
            if not match:
                break
            line, node = match[0][0].start_mark.line + 1, match[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return f":{line}" if line else ""


def _part_at(location: Location) -> type[BaseModel]:
    """Return the part of a recipe at `location`."""
    part: type[BaseModel] = Recipe
    for name in location:
        if name in part.model_fields:  # else the number of an entry, or a key of a mapping
            part = _part_of(part.model_fields[str(name)].annotation)
    return part


def _part_of(annotation: Any) -> type[BaseModel]:
    """Return the model inside `X`, `X | None`, `tuple[X, ...]` or `dict[key, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inside = get_args(annotation)[1:] if get_origin(annotation) is dict else get_args(annotation)
    return next(_part_of(inner) for inner in inside if inner not in (Ellipsis, type(None)))
