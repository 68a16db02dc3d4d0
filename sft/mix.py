"""What a mixture will be, before anything is paid for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sft.mixture import SourceSizes
from sft.planner import Planner
from sft.prepared import PreparedSource
from sft.recipe import Recipe
from sft.sample import Pack

UNITS = ("tokens", "trained_tokens", "samples")


@dataclass
class _Tally:
    """What a source has given in packs."""

    tokens: int = 0
    trained_tokens: int = 0
    samples: int = 0
    images: int = 0
    """Shown: one that two samples show counts twice."""


@dataclass
class _Totals:
    """What was counted over all windows."""

    of_source: list[_Tally]
    packs: int = 0
    distinct_images: int = 0
    """In each pack, summed over packs."""
    largest_error: float = 0.0
    """Tokens by which a source was off its share at the end of a window."""


def mix(
    recipe: Recipe,
    sources: Sequence[SourceSizes],
    steps: int | None = None,
    on_progress: Callable[[int], None] = lambda steps: None,
) -> dict[str, Any]:
    """What `steps` optimizer steps will draw, in the form of `idefics-sft mix --json`. Shares are fractions of 1."""
    steps = steps or recipe.training.max_steps
    planner = Planner(sources, recipe.data, packs_per_step=recipe.packs_per_step, seed=recipe.seed)
    totals = _Totals([_Tally() for _ in sources])
    for packs in _windows(planner, steps * recipe.packs_per_step):
        _count(totals, packs, sources)
        on_progress(totals.packs // recipe.packs_per_step)
    length = recipe.data.sequence_length
    shown = sum(tally.images for tally in totals.of_source)
    return {
        "unit": recipe.data.share_unit,
        "steps": totals.packs // recipe.packs_per_step,
        "ended_by": planner.mixture.ended() if totals.packs < steps * recipe.packs_per_step else None,
        "sources": [_line(totals, index, planner, recipe) for index in range(len(sources))],
        "packs": {
            "count": totals.packs,
            "fill": sum(tally.tokens for tally in totals.of_source) / max(totals.packs * length, 1),
            "images_per_pack": shown / max(totals.packs, 1),
            "distinct_images_per_pack": totals.distinct_images / max(totals.packs, 1),
            "encodes_saved": 1 - totals.distinct_images / shown if shown else 0.0,
        },
        "largest_error_in_packs": totals.largest_error / length,
        "tokens_left_over": sum(bundle.num_tokens for bundle in planner.carry),
    }


def _windows(planner: Planner, wanted: int) -> Iterator[list[Pack]]:
    """Windows up to a number of packs; the last may be a part of one."""
    for packs in planner.windows():
        yield packs[:wanted]
        wanted -= len(packs)
        if wanted <= 0:
            return


def _count(totals: _Totals, packs: Sequence[Pack], sources: Sequence[SourceSizes]) -> None:
    of_pack, keys = [], []
    for index, (tally, source) in enumerate(zip(totals.of_source, sources, strict=True)):
        pairs = [(number, i.sample) for number, pack in enumerate(packs) for i in pack.items if i.source == index]
        numbers, rows = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        images, num_images = source.images(rows)
        of_pack.append(np.repeat(numbers, num_images))
        keys.append(images)
        tally.samples += len(rows)
        tally.tokens += int(source.num_tokens(rows).sum())
        tally.trained_tokens += int(source.num_trained(rows).sum())
        tally.images += int((source.num_shown(rows) if isinstance(source, PreparedSource) else num_images).sum())
    totals.packs += len(packs)
    totals.distinct_images += len(np.unique(np.stack([np.concatenate(of_pack), np.concatenate(keys)]), axis=1).T)
    tokens = np.array([tally.tokens for tally in totals.of_source])
    errors = tokens - np.array([source.share for source in sources]) * tokens.sum()
    totals.largest_error = max(totals.largest_error, float(np.abs(errors).max()))


def _budget(source: SourceSizes, tally: _Tally) -> dict[str, int]:
    """What has to be there for these steps: records, each once, images and bytes. Bytes are those of a store."""
    records = min(tally.samples, len(source))
    images = round(tally.images * records / max(tally.samples, 1))
    return {
        "records": records,
        "images": min(images, getattr(source, "num_distinct_images", images)),
        "bytes": round(records * getattr(source, "bytes_per_sample", 0.0)),
    }


def _line(totals: _Totals, index: int, planner: Planner, recipe: Recipe) -> dict[str, Any]:
    source, tally = planner.sizes[index], totals.of_source[index]
    achieved = {unit: getattr(tally, unit) / max(sum(getattr(t, unit) for t in totals.of_source), 1) for unit in UNITS}
    dropped = planner.mixture.streams[index].given.dropped
    parts = source.parts if isinstance(source, PreparedSource) else []
    manifests = [part.store.manifest for part in parts]
    fitted = sum((Counter(part.encoded.changes) for part in parts), Counter())
    filtered = sum((Counter(manifest["filtered"]) for manifest in manifests), Counter())
    skipped = sum((Counter(manifest["skipped"]) for manifest in manifests), Counter())
    if dropped:
        filtered["drawn but does not fit a pack"] = dropped
    return {
        "name": source.name,
        "asked": source.share,
        "achieved": achieved[recipe.data.share_unit],
        "achieved_in": achieved,
        "tokens": tally.tokens,
        "trained_tokens": tally.trained_tokens,
        "samples": tally.samples,
        "images": tally.images,
        "epochs": planner.mixture.streams[index].epochs,
        "records": len(source),
        "budget": _budget(source, tally),
        "held_out": source.num_held_out if isinstance(source, PreparedSource) else {},
        "filtered": dict(sorted(filtered.items())),
        "skipped": dict(sorted(skipped.items())),
        "fitted": dict(sorted(fitted.items())),
    }
