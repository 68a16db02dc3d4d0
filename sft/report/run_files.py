"""What the files of a run say, whether it is running, ended, stopped or failed."""

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


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as its files tell it."""

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
    """Read the folder of a run.

    Raises:
        UserError: it is not one, or a file in it is damaged.
    """
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
    """What a run was trained on of one source."""

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
    names = [source.name for source in run.recipe.data.mixture]
    tokens, trained = ({name: _sum(run, name, key) for name in names} for key in ("tokens", "trained_tokens"))
    found = []
    for source, asked in zip(run.recipe.data.mixture, run.recipe.data.shares, strict=True):
        stores = run.stores[source.name]
        found.append(
            SourceTotals(
                name=source.name,
                asked=asked,
                tokens=tokens[source.name],
                trained_tokens=trained[source.name],
                tokens_share=tokens[source.name] / max(sum(tokens.values()), 1),
                trained_share=trained[source.name] / max(sum(trained.values()), 1),
                filtered=_counts(store["filtered"] for store in stores),
                skipped=_counts(store["skipped"] for store in stores),
                records=sum(store["records"] for store in stores) if stores else None,
                samples=sum(store["samples"] for store in stores),
                images=sum(store["distinct_images"] for store in stores),
                datasets=tuple(dict.fromkeys(dataset.dataset for dataset in source.datasets)),
                licences=tuple(dict.fromkeys(str(store["licence"]) for store in stores)),
            )
        )
    return found


def _sum(run: Run, source: str, key: str) -> int:
    return sum(line["sources"].get(source, {}).get(key, 0) for line in run.lines)


def _counts(some: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for counts in some:
        total.update(counts)
    return dict(total.most_common())
