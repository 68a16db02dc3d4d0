"""The files of a run, whether it is running, ended, stopped or failed, and what they hold over its steps."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sft.core.errors import UserError
from sft.core.files import text_lines
from sft.data.store import Store
from sft.recipe import Recipe
from sft.runs.checkpoint import checkpoints
from sft.runs.names import find_recipe
from sft.runs.status import RunStatus

Line = dict[str, Any]
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Run:
    """The content of a run's files."""

    path: Path
    status: RunStatus
    recipe: Recipe
    lines: Sequence[Line]
    """metrics.jsonl, a line a step."""
    before: Line
    """before.json: held-out loss and answers of the base; empty where nothing is held out."""
    selection: Line | None
    evaluations: Sequence[Line]
    """Summaries of checkpoints that were evaluated with images; `score` is there whatever the benchmark calls it."""
    stores: dict[str, list[Line]]
    """By source, the manifests of its prepared datasets, as far as they are here."""
    checkpoints: tuple[str, ...]
    nonfinite_steps: int


def read_run(path: Path) -> Run:
    """Read the folder of a run; raise UserError where it is not one, or a file in it is damaged."""
    status = RunStatus.read(path)
    if status is None or not (path / "recipe.yaml").is_file():
        raise UserError(f"{path}: no run here (no run.json); give the folder that `idefics-sft train` wrote")
    recipe = find_recipe(str(path))
    return Run(
        path=path,
        status=status,
        recipe=recipe,
        lines=list(_lines(path / "metrics.jsonl")),
        before=_object(path / "before.json") or {},
        selection=_object(path / "selection.json"),
        evaluations=list(_evaluations(path / "evaluations")),
        stores={source.name: list(_manifests(recipe, index)) for index, source in enumerate(recipe.data.mixture)},
        checkpoints=tuple(checkpoint.name for checkpoint in checkpoints(path / "checkpoints")),
        nonfinite_steps=len({line["step"] for line in _lines(path / "nonfinite.jsonl")}),
    )


def _lines(file: Path) -> Iterable[Line]:
    """Yield lines of JSON; the last one may not be complete yet."""
    if not file.is_file():
        return
    for number, text in enumerate(text_lines(file), 1):
        if not text.endswith("\n"):
            return
        try:
            yield dict(json.loads(text))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file}:{number}: damaged, not a JSON object") from error


def _object(file: Path) -> Line | None:
    if not file.is_file():
        return None
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: damaged, not a JSON object; delete it to leave it out") from error


def _evaluations(folder: Path) -> Iterable[Line]:
    for file in sorted(folder.glob("*/*/*.json")):
        summary = _object(file) or {}
        step = _step(file.stem)
        score = summary.get("accuracy", summary.get("score"))
        if step is not None and summary.get("with_images", True) and score is not None:
            yield {"benchmark": file.parts[-3], **summary, "step": step, "score": score}


def _step(name: str) -> int | None:
    """Return the step of a checkpoint, 0 for the base; None for other names."""
    number = name.removeprefix("checkpoint-")
    return 0 if name == "base" else int(number) if number.isdecimal() and number != name else None


def _manifests(recipe: Recipe, source: int) -> Iterable[Line]:
    for dataset in recipe.data.mixture[source].datasets:
        try:
            manifest = Store(dataset.store_in(recipe.data.store)).manifest
        except UserError:  # the run was copied here without its data
            continue
        yield {"dataset": dataset.dataset, "path": dataset.path, **manifest}


class SourceTotals(NamedTuple):
    """The data of one source that a run was trained on."""

    name: str
    asked: float
    """Share of the mixture, in `data.share_unit`."""
    tokens: int
    trained_tokens: int
    tokens_share: float
    trained_share: float
    filtered: dict[str, int]
    """Records left out by a policy of their dataset, by reason."""
    skipped: dict[str, int]
    """Bad records, by reason."""
    records: int | None
    """Raw ones; None where the prepared data are not here."""
    samples: int
    images: int
    datasets: tuple[str, ...]
    licences: tuple[str, ...]


def source_totals(run: Run) -> list[SourceTotals]:
    """Return the totals of each source, in the order of the recipe."""
    mixture = run.recipe.data.mixture
    tokens, trained = Counter[str](), Counter[str]()
    for line in run.lines:
        tokens.update({name: own["tokens"] for name, own in line["sources"].items()})
        trained.update({name: own["trained_tokens"] for name, own in line["sources"].items()})
    all_tokens, all_trained = (max(sum(found[source.name] for source in mixture), 1) for found in (tokens, trained))
    return [
        SourceTotals(
            name=source.name,
            asked=asked,
            tokens=tokens[source.name],
            trained_tokens=trained[source.name],
            tokens_share=tokens[source.name] / all_tokens,
            trained_share=trained[source.name] / all_trained,
            filtered=_counts(stores, "filtered"),
            skipped=_counts(stores, "skipped"),
            records=sum(store["records"] for store in stores) if stores else None,
            samples=sum(store["samples"] for store in stores),
            images=sum(store["distinct_images"] for store in stores),
            datasets=tuple(dict.fromkeys(dataset.dataset for dataset in source.datasets)),
            licences=tuple(dict.fromkeys(str(store["licence"]) for store in stores)),
        )
        for source, asked, stores in zip(mixture, run.recipe.data.shares, run.stores.values(), strict=True)
    ]


def _counts(stores: Iterable[Line], kind: str) -> dict[str, int]:
    total = Counter[str]()
    for store in stores:
        total.update(store[kind])
    return dict(total.most_common())


# ----------------------------------------------------------------------------------------------- points over the steps


def series(lines: Sequence[Line], key: str) -> list[Point]:
    """Return (step, number under `key`) of each step that has one."""
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def source_losses(lines: Sequence[Line], source: str) -> list[tuple[float, float, float]]:
    """Return (step, mean loss of a source, its trained tokens) of each step that trained any."""
    own = ((line["step"], line["sources"].get(source, {})) for line in lines)
    return [(step, at["loss"], at["trained_tokens"]) for step, at in own if at.get("loss") is not None]


def losses(lines: Sequence[Line]) -> list[tuple[float, float, float]]:
    """Return (step, mean loss, trained tokens) of each step."""
    return [(line["step"], line["loss"], line["trained_tokens"]) for line in lines if line["loss"] is not None]


def held_out(run: Run, source: str | None = None) -> list[Point]:
    """Return the held-out loss of a source, or of all, at each validation; step 0 is the base."""
    found = []
    for step, line in [(0, run.before), *((line["step"], line) for line in run.lines)]:
        validation = line.get("validation") or {}
        own = [validation.get(source, {})] if source else list(validation.values())
        known = [(one["loss"], one["trained_tokens"]) for one in own if one.get("loss") is not None]
        if known:
            found.append((float(step), sum(a * b for a, b in known) / sum(b for _, b in known)))
    return found
