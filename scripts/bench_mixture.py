#!/usr/bin/env python3
"""How full packs are and how fast they are planned, on the card's mixture by stated sizes. No data is needed.

scripts/bench_mixture.py [--json] [--steps 200]

fill                of real tokens, at 2,048 tokens and 24 distinct images; also at 16, 20 and without a cap on images
packs_to_bound      packs / the larger of the two lower bounds, tokens / 2,048 and distinct images / 24
first_fit_fill      beside it, as m4 packed: first fit within chunks of 64 samples, each source by itself
samples_per_second  planned per CPU second of one core; share_of_step = planning seconds for a 1-second step
restore_seconds     from the state at the last step to the next window
peak_bytes          memory of a process that plans from one source of 141 million samples, less before planning
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from itertools import islice
from typing import Any

import numpy as np

from sft.planner import Planner
from sft.recipe import Recipe, load_recipe
from sft.shipped import recipe_path
from sft.stated import StatedSource, stated_sources

PACKS_PER_STEP = 100


def recipe_with(*overrides: str) -> Recipe:
    """The card's recipe."""
    return load_recipe(recipe_path("idefics-9b-instruct"), overrides)


def planner_of(recipe: Recipe, sources: list[StatedSource]) -> Planner:
    """A planner at step 0."""
    return Planner(sources, recipe.data, packs_per_step=recipe.packs_per_step, seed=recipe.seed)


def plan(recipe: Recipe, steps: int) -> dict[str, Any]:
    """Plan steps; how full the packs are and how long it took."""
    sources = stated_sources(recipe.data)
    planner = planner_of(recipe, sources)
    windows = planner.windows()
    next(windows)  # look-ahead is filled
    seconds, samples = [], []
    for window in islice(windows, steps):
        samples.append(sum(len(pack.items) for pack in window))
        seconds.append(time.process_time())
    seconds = np.diff(seconds)
    tokens = sum(stream.given.tokens for stream in planner.mixture.streams)
    carried = sum(bundle.num_tokens for bundle in planner.carry)
    packs = (steps + 1) * recipe.packs_per_step
    images = sum(
        int(source.images(np.arange(2000))[1].mean() * stream.given.samples)
        for source, stream in zip(sources, planner.mixture.streams, strict=True)
    )
    length, cap = recipe.data.sequence_length, recipe.data.max_images_per_pack
    return {
        "planner": planner,
        "fill": (tokens - carried) / (packs * length),
        "packs_to_bound": packs / max((tokens - carried) / length, images / cap),
        "images_per_pack": images / packs,
        "samples_per_second": sum(samples[1:]) / float(seconds.sum()),
        "seconds_per_step": statistics.median(seconds),
    }


def first_fit_fill(recipe: Recipe, chunks: int = 40, chunk: int = 64) -> float:
    """Tokens in packs over what they hold, each source packed by itself: shares decide how much each counts."""
    length, cap = recipe.data.sequence_length, recipe.data.max_images_per_pack
    packs_per_token = 0.0
    for source in stated_sources(recipe.data):
        tokens = packs = 0
        for number in range(chunks):
            rows = np.arange(number * chunk, (number + 1) * chunk)
            open_packs: list[list[int]] = []
            for size, images in zip(source.num_tokens(rows).tolist(), source.images(rows)[1].tolist(), strict=True):
                for pack in open_packs:
                    if pack[0] + size <= length and pack[1] + images <= cap:
                        pack[0] += size
                        pack[1] += images
                        break
                else:
                    open_packs.append([size, images])
                tokens += size
            packs += len(open_packs)
        packs_per_token += source.share * packs * length / tokens
    return 1 / packs_per_token


def restore_seconds(recipe: Recipe, planner: Planner) -> float:
    """From the state to the next window, everything opened anew."""
    state = json.dumps(planner.state())
    started = time.perf_counter()
    again = planner_of(recipe, stated_sources(recipe.data))
    again.restore(json.loads(state))
    window = next(again.windows())
    seconds = time.perf_counter() - started
    assert window == next(planner.windows()), "the restored planner goes on as the first one"
    return seconds


def peak_bytes_of_large_source() -> int:
    """Memory that planning from OBELICS' 141 million documents takes, in a process of its own."""
    result = subprocess.run([sys.executable, __file__, "--peak"], check=True, capture_output=True, text=True)
    return int(result.stdout)


def _peak() -> int:
    recipe = recipe_with("data.mixture=[{name: obelics, share: 1, datasets: [{dataset: obelics, path: raw}]}]")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    planner = planner_of(recipe, stated_sources(recipe.data))
    for _ in islice(planner.windows(), 20):
        pass
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(_peak())
        return
    recipe = recipe_with()
    figures = plan(recipe, arguments.steps)
    planner = figures.pop("planner")
    figures["share_of_step"] = figures["seconds_per_step"] / 1.0
    figures["first_fit_fill"] = first_fit_fill(recipe)
    figures["restore_seconds"] = restore_seconds(recipe, planner)
    figures["state_bytes"] = len(json.dumps(planner.state()))
    figures["peak_bytes"] = peak_bytes_of_large_source()
    for cap in (16, 20, 1000):
        figures[f"fill_at_{cap}_images"] = plan(recipe_with(f"data.max_images_per_pack={cap}"), 30)["fill"]
    ratios = {name: figures[name] for name in ("fill", "packs_to_bound", "first_fit_fill", "share_of_step")}
    if arguments.json:
        print(json.dumps({"ratios": ratios, **figures}))
        return
    for name, value in figures.items():
        print(f"{name:22} {value:,.4f}" if isinstance(value, float) else f"{name:22} {value:,}")


if __name__ == "__main__":
    main()
