"""What a mixture will be, before anything is paid for."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from math import ceil, gcd
from operator import itemgetter
from typing import Any

import numpy as np

from sft.batches.declared_sizes import DeclaredSource
from sft.batches.mixture_counts import Floats, MixtureCounts, SourceCounts, count_packs
from sft.batches.pack_stream import Planner, by_source
from sft.batches.source_stream import SourceSizes
from sft.core.sample import Pack
from sft.data.orders import Ints
from sft.data.prepared_source import PreparedSource
from sft.data.truncate import LEFT_OUT
from sft.recipe import Recipe, with_overrides

UNITS = ("tokens", "trained_tokens", "samples")
MANY_EPOCHS = 4
"""Beyond four epochs repeated data is worth less and less than new (Muennighoff and others, 2023)."""
USUAL_EPOCHS = 3
FEW_STEPS = 10
"""With fewer steps there is hardly a learning-rate schedule."""
LOW_FILL = 0.9
"""Packs that hold less are worth a warning."""
MAX_POINTS = 60
"""At most so many figures are given window by window; the largest of several windows stands for them."""


def mix(
    recipe: Recipe,
    sources: Sequence[SourceSizes],
    steps: int | None = None,
    on_progress: Callable[[int], None] = lambda steps: None,
) -> dict[str, Any]:
    """Return what `steps` optimizer steps will draw, as `idefics-sft mix --json` prints it; shares are fractions of 1.
    Left out, they are those of the recipe, up to the end of a source that ends training.

    Errors of shares are in packs: of `sequence_length` tokens, or of what a pack holds on average in another unit.
    """
    steps = steps or recipe.training.max_steps
    packs_asked = steps * recipe.packs_per_step if steps else sys.maxsize
    planner = Planner(sources, recipe.data, packs_per_step=recipe.packs_per_step, seed=recipe.seed)
    totals = MixtureCounts(len(sources), recipe.data.sequence_length)
    for packs, shares_S in _windows(planner, packs_asked):
        given_PS = count_packs(totals, packs, sources, recipe.data.share_unit)
        ended = [index for index, stream in enumerate(planner.mixture.streams) if stream.is_exhausted]
        is_new = [index for index in ended if totals.of_source[index].ended_at_step is None]
        for index in is_new:
            totals.of_source[index].ended_at_step = ceil(totals.packs / recipe.packs_per_step)
        if is_new:
            totals.errors.off[:] = 0  # they are counted anew
        else:
            totals.errors.add(given_PS, shares_S, is_whole=len(packs) == planner.window_packs)
        on_progress(totals.packs // recipe.packs_per_step)
    return _report(recipe, planner, totals, steps)


def _windows(planner: Planner, wanted: int) -> Iterator[tuple[list[Pack], Floats]]:
    """Yield windows up to a number of packs, each with the shares it is steered by; the last may be a part of one."""
    windows = planner.windows()
    while wanted > 0:
        shares_S = np.array(planner.mixture.shares())
        packs = next(windows, [])[:wanted]
        if not packs:
            return
        yield packs, shares_S
        wanted -= len(packs)


def _report(recipe: Recipe, planner: Planner, totals: MixtureCounts, steps: int | None) -> dict[str, Any]:
    length, unit = recipe.data.sequence_length, recipe.data.share_unit
    pack = length if unit == "tokens" else totals.sum(unit) / max(totals.packs, 1)
    sources = [_line(recipe, planner, totals, index, pack) for index in range(len(planner.sizes))]
    done = ceil(totals.packs / recipe.packs_per_step)
    ended_by = planner.mixture.ended() if steps is None or done < steps else None
    shown, encoded = totals.sum("images"), totals.distinct_images
    left_out = sum(n for s in sources for why, n in s["fitted"].items() if why.startswith(LEFT_OUT))
    by_weight = totals.packs_with["weight"] if totals.packs else np.ones(1, np.int64)
    weights = np.repeat(np.arange(len(by_weight)), by_weight)
    errors = totals.errors
    report: dict[str, Any] = {
        "unit": unit,
        "steps": done,
        "steps_asked": steps,
        "packs_per_step": recipe.packs_per_step,
        "ended_by": ended_by,
        "sources": sources,
        "budget": {name: sum(line["budget"][name] for line in sources) for name in ("pieces", "images", "bytes")},
        "packs": {
            "count": totals.packs,
            "fill": totals.sum("tokens") / max(totals.packs * length, 1),
            "images_per_pack": shown / max(totals.packs, 1),
            "distinct_images_per_pack": encoded / max(totals.packs, 1),
            "encodes_saved": 1 - encoded / shown if shown else 0.0,
            "by_fill": _in_hundredths(totals.packs_with["tokens"]),
            "by_distinct_images": totals.packs_with["images"].tolist(),
            "image_weight": {
                "mean": float(weights.mean()),
                "p95": int(np.percentile(weights, 95)),
                "max": int(weights[-1]),
            },
            "left_out": left_out / max(left_out + sum(map(len, planner.sizes)), 1),
        },
        "largest_error_in_packs": float(errors.at_ends.max()) / pack,
        "largest_error_inside_in_packs": float(errors.inside.max()) / pack,
        "windows": {
            "packs": planner.window_packs,
            "count": len(errors.of_windows),
            "largest_error_inside_in_packs": _thinned(errors.of_windows, pack),
            "largest_error_in_packs": _thinned(errors.of_ends, pack),
        },
        "tokens_left_over": sum(line["tokens_left_over"] for line in sources),
    }
    report["packs"]["advice"] = _advice_on_fill(recipe, planner, report["packs"])
    return report | {"warnings": warnings_of(recipe, report, ended_by, done)}


def _advice_on_fill(recipe: Recipe, planner: Planner, packs: dict[str, Any]) -> str:
    """Return what would fill packs that are far from full, tried on a window of them; nothing where they are full."""
    if packs["fill"] >= LOW_FILL or packs["count"] < planner.window_packs:
        return ""
    tried = [(packs["fill"] + 0.01, "")]
    for length in (2 * recipe.data.sequence_length, 4 * recipe.data.sequence_length):
        step = ceil(recipe.training.tokens_per_step / length) * length
        change = f"data.sequence_length={length} training.tokens_per_step={step}"
        other = Planner(planner.sizes, with_overrides(recipe, change.split()).data, packs_per_step=1, seed=recipe.seed)
        window = next(other.windows())
        tokens = sum(int(planner.sizes[source].num_tokens(rows).sum()) for source, rows, _ in by_source(window))
        tried.append((fill := tokens / len(window) / length, f"; {change} would fill {fill:.0%} with the same samples"))
    return f"packs are {packs['fill']:.0%} full{max(tried, key=itemgetter(0))[1]}"


def _line(recipe: Recipe, planner: Planner, totals: MixtureCounts, index: int, pack: float) -> dict[str, Any]:
    source, tally, stream = planner.sizes[index], totals.of_source[index], planner.mixture.streams[index]
    achieved = {unit: getattr(tally, unit) / max(totals.sum(unit), 1) for unit in UNITS}
    parts = source.parts if isinstance(source, PreparedSource) else []
    manifests = [part.store.manifest for part in parts]
    fitted = sum((Counter(part.encoded.changes) for part in parts), Counter())
    filtered = sum((Counter(manifest["filtered"]) for manifest in manifests), Counter())
    skipped = sum((Counter(manifest["skipped"]) for manifest in manifests), Counter())
    if stream.counters.dropped:
        filtered["drawn but does not fit a pack"] = stream.counters.dropped
    return {
        "name": source.name,
        "asked": source.share,
        "achieved": achieved[recipe.data.share_unit],
        "achieved_in": achieved,
        "error_in_packs": float(totals.errors.at_ends[index]) / pack,
        "error_inside_in_packs": float(totals.errors.inside[index]) / pack,
        "tokens": tally.tokens,
        "trained_tokens": tally.trained_tokens,
        "samples": tally.samples,
        "images": tally.images,
        "epochs": stream.epochs * tally.samples / max(stream.counters.samples, 1),  # of a window, a part may be trained
        "ended_at_step": tally.ended_at_step,
        "when_exhausted": source.when_exhausted,
        "pieces": len(source),
        "budget": _budget(source, tally),
        "tokens_left_over": sum(b.num_tokens for b in planner.carry if b.items[0].source == index),
        "held_out": source.num_held_out if isinstance(source, PreparedSource) else {},
        "filtered": dict(sorted(filtered.items())),
        "skipped": dict(sorted(skipped.items())),
        "fitted": dict(sorted(fitted.items())),
    }


def _budget(source: SourceSizes, tally: SourceCounts) -> dict[str, int]:
    """Return what has to be there for these steps: pieces, which are samples or the parts of long ones, each once,
    their distinct images, and the bytes of both."""
    pieces = min(tally.samples, len(source))
    images = len(tally.distinct_images)
    if isinstance(source, DeclaredSource):
        size = source.num_bytes(round(tally.tokens * pieces / max(tally.samples, 1)), images)
    elif isinstance(source, PreparedSource):
        size = round(pieces * _bytes_of_each(source, "samples") + images * _bytes_of_each(source, "images"))
    else:
        size = 0
    return {"pieces": pieces, "images": images, "bytes": size}


def _bytes_of_each(source: PreparedSource, table: str) -> float:
    """Return the bytes of a sample, of the part of one that fits a pack, or of an image in the stores, on average."""
    number = sum(len(part.encoded) if table == "samples" else part.store.num_images for part in source.parts)
    files = (file for part in source.parts for file in (part.store.path / table).iterdir())
    return sum(file.stat().st_size for file in files) / max(number, 1)


def _in_hundredths(packs_with_tokens: Ints) -> list[int]:
    """Return how many packs are 0, 1, … 100 hundredths full, rounded down."""
    places = np.arange(len(packs_with_tokens)) * 100 // (len(packs_with_tokens) - 1)
    return [int(number) for number in np.bincount(places, packs_with_tokens, 101)]


def _thinned(values: Sequence[float], unit: float) -> list[float]:
    """Return at most MAX_POINTS values, the largest of each stretch, in a unit."""
    if not values:
        return []
    return [float(stretch.max()) / unit for stretch in np.array_split(values, min(MAX_POINTS, len(values)))]


def warnings_of(recipe: Recipe, report: dict[str, Any], ended_by: str | None, done: int) -> list[str]:
    """Return what a person should know before paying for it."""
    training, sources = recipe.training, report["sources"]
    found = [advice] if (advice := report["packs"]["advice"]) else []
    found += [
        f"{source['name']} is drawn for {source['epochs']:.1f} epochs{_advice(recipe, source['epochs'] / done)}"
        for source in sources
        if source["epochs"] > MANY_EPOCHS
    ]
    found += [
        f"{source['name']} ends after max_epochs at step {source['ended_at_step']:,}; the others take its share"
        for source in sources
        if source["ended_at_step"] is not None and source["when_exhausted"] == "reweight"
    ]
    if ended_by is not None and not (training.epochs and ended_by == sources[0]["name"]):
        asked = f"{training.max_steps:,} steps" if training.max_steps else f"{training.epochs:g} epochs"
        found.append(f"{ended_by} ends after max_epochs, and training with it: {done:,} steps of {asked}")
    if training.epochs and done < FEW_STEPS:
        smaller = _smaller_step(recipe, done * recipe.packs_per_step // FEW_STEPS)
        found.append(f"training has {done} step{'s' * (done > 1)}; {smaller} gives it more")
    return found


def _smaller_step(recipe: Recipe, packs: int) -> str:
    """Return the keys of a step of so few packs, but one; where it has no more than one, packs are to be smaller."""
    packs, micro = max(packs, 1), recipe.training.micro_batch_packs
    if packs >= recipe.packs_per_step:
        return "a smaller data.sequence_length"
    keys = f"training.tokens_per_step={packs * recipe.data.sequence_length}"
    return keys if packs % micro == 0 else f"{keys} training.micro_batch_packs={gcd(packs, micro)}"


def _advice(recipe: Recipe, epochs_of_step: float) -> str:
    """Return what to set for fewer epochs of a source."""
    if recipe.training.epochs:
        return f"; {USUAL_EPOCHS} are usual"
    if epochs_of_step > (most := USUAL_EPOCHS / FEW_STEPS):
        smaller = _smaller_step(recipe, round(recipe.packs_per_step * most / epochs_of_step))
        return f", {epochs_of_step:.1f} in each step; {smaller} and training.epochs={USUAL_EPOCHS} are better"
    return f"; training.max_steps={round(USUAL_EPOCHS / epochs_of_step)} is {USUAL_EPOCHS} epochs of it"
