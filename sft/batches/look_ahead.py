"""What a training will draw, in the lines that it begins with, and the step at which it ends."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from math import ceil
from typing import Any

from sft.batches.mixture_report import mix, warnings_of
from sft.batches.pack_stream import Planner
from sft.batches.source_stream import SourceSizes
from sft.batches.steps import first_step_of
from sft.core.errors import UserError
from sft.recipe import Recipe

MAX_PACKS = 8192
"""So many packs stand for all of a long training that nothing ends early: planning them takes less than a second."""
MAX_NOTES = 12
"""Reasons, warnings and sources that are printed."""
KINDS = {"filtered": "filtered", "skipped": "skipped", "fitted": "do not fit a pack"}


def look_ahead(recipe: Recipe, sources: Sequence[SourceSizes], state: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what a training will draw, as `mix` does. Its last step is exact, also from the state of a plan on, which
    stands where fewer epochs may have ended. Where no source can end it, the first packs stand for all, and epochs grow
    in proportion."""
    steps = recipe.training.max_steps
    few = ceil(MAX_PACKS / recipe.packs_per_step)
    can_end = any(source.max_epochs for source in sources)
    if steps is None or steps <= few or can_end:
        report = mix(recipe, sources)
        if not (state and can_end):
            return report
        last = _last_step(recipe, sources, state)
        return report | {"steps": last, "warnings": warnings_of(recipe, report, report["ended_by"], last)}
    report = mix(recipe, sources, few)
    for source in report["sources"]:
        source["epochs"] *= steps / few
    return report | {"steps": steps, "warnings": warnings_of(recipe, report, None, steps)}


def _last_step(recipe: Recipe, sources: Sequence[SourceSizes], state: dict[str, Any]) -> int:
    """Return the last step of a training that goes on from the state of a plan."""
    planner = Planner(sources, recipe.data, packs_per_step=recipe.packs_per_step, seed=recipe.seed)
    planner.restore(state["window"])
    last = first_step_of(state, planner) - 1
    most = recipe.training.max_steps or sys.maxsize
    for packs in planner.windows():
        last += ceil(len(packs) / recipe.packs_per_step)
        if last >= most:
            break
    return min(last, most)


def planned(recipe: Recipe, report: dict[str, Any]) -> Recipe:
    """Return the recipe as it is trained: it ends, and its schedule with it, at the last step of a look-ahead.

    Raises:
        UserError: it ends before its warm-up does.
    """
    try:
        return recipe.model_copy(update={"training": recipe.training.of_steps(report["steps"])})
    except ValueError as error:
        raise UserError(str(error)) from error


def describe_data(report: dict[str, Any]) -> Iterator[str]:
    """Yield lines about what is trained on: each source, why samples are left out, steps and packs, warnings."""
    for source in report["sources"][:MAX_NOTES]:
        held_out = source["held_out"].get("validation", 0)
        held = f", {held_out:,} held out" if held_out else ""
        epochs = f"{source['epochs']:.3g}"
        yield f"{source['name']}: {source['pieces']:,} samples{held}, trained for {epochs} epoch{'s' * (epochs != '1')}"
    yield from reasons(report["sources"])[:MAX_NOTES]
    steps, packs = _number(report["steps"], "step"), _number(report["packs_per_step"], "pack")
    yield f"{steps} of {packs}, {report['packs']['fill'] * 100:.1f} % full of tokens"
    yield from describe_packs(report["packs"])
    yield from (f"warning: {line}" for line in report["warnings"][:MAX_NOTES])


def describe_packs(packs: dict[str, Any]) -> Iterator[str]:
    """Yield what the images of packs weigh, where they weigh differently, and how many samples fit none."""
    mean, most_of_95, most = packs["image_weight"].values()
    if mean > packs["distinct_images_per_pack"]:
        yield f"images weigh {mean:.1f} a pack, 95 % of packs up to {most_of_95:,}, at most {most:,}"
    if packs["left_out"]:
        yield f"{packs['left_out']:.2%} of samples fit no pack"


def _number(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def reasons(sources: Sequence[dict[str, Any]]) -> list[str]:
    """Return why samples were left out: by source or, where that is too much, over all, the commonest first."""
    lines, of_all, naming = [], Counter[str](), Counter[str]()
    for source in sources:
        for kind, what in KINDS.items():
            for reason, number in source[kind].items():
                lines.append(f"{source['name']}: {number:,} {what}, {reason}")
                of_all[f"{what}, {reason}"] += number
                naming[f"{what}, {reason}"] += 1
    if len(lines) <= MAX_NOTES:
        return lines
    return [f"{number:,} {what} ({naming[what]:,} sources)" for what, number in of_all.most_common()]
