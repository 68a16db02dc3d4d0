#!/usr/bin/env python3
"""How full packs are and how fast they are planned, on the card's mixture by declared sizes. No data is needed.

scripts/bench/bench_mixture.py [--json] [--steps 200]

fill                of real tokens, at 2,048 tokens and 24 distinct images; also at 16, 20 and without a cap on images
packs_to_bound      packs / the larger of the two lower bounds, tokens / 2,048 and distinct images / 24
first_fit_fill      beside it, as m4 packed: first fit within chunks of 64 samples, each source by itself
samples_per_second  planned per CPU second of one core; share_of_step = planning seconds for a 1-second step
restore_seconds     from the state at the last step to the next window
memory_bytes        of a process that plans from the arrays of a prepared source of 141 million samples, 9 GB in all
mapped_bytes        pages of those arrays that it looked at, which the system takes back when it needs memory
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from measuring import print_figures
from numpy.typing import NDArray

from sft.batches.declared_sizes import DeclaredSource, declared_sources
from sft.batches.mixture import Mixture
from sft.batches.pack_stream import Planner
from sft.core.files import mapped
from sft.core.sample import Caps
from sft.core.shipped import recipe_path
from sft.data.encoded_arrays import EncodedSamples
from sft.data.orders import Cursor, mix64
from sft.data.prepared_source import PreparedDataset, PreparedSource
from sft.data.validation_split import Side
from sft.recipe import Recipe, load_recipe

PACKS_PER_STEP = 100


def recipe_with(*overrides: str) -> Recipe:
    """The card's recipe."""
    return load_recipe(recipe_path("idefics-9b-instruct"), overrides)


def planner_of(recipe: Recipe, sources: list[DeclaredSource]) -> Planner:
    """A planner at step 0."""
    return Planner(sources, recipe.data, packs_per_step=recipe.packs_per_step, seed=recipe.seed)


def plan(recipe: Recipe, steps: int) -> dict[str, Any]:
    """Plan steps; how full the packs are and how long it took."""
    sources = declared_sources(recipe.data)
    planner = planner_of(recipe, sources)
    windows = planner.windows()
    next(windows)  # look-ahead is filled
    seconds, samples = [], []
    for window in islice(windows, steps):
        samples.append(sum(len(pack.items) for pack in window))
        seconds.append(time.process_time())
    seconds = np.diff(seconds)
    tokens = sum(stream.counters.tokens for stream in planner.mixture.streams)
    carried = sum(bundle.num_tokens for bundle in planner.carry)
    packs = (steps + 1) * recipe.packs_per_step
    images = sum(
        int(source.images(np.arange(2000)).numbers.mean() * stream.counters.samples)
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
    for source in declared_sources(recipe.data):
        tokens = packs = 0
        for number in range(chunks):
            rows = np.arange(number * chunk, (number + 1) * chunk)
            open_packs: list[list[int]] = []
            for size, images in zip(
                source.num_tokens(rows).tolist(), source.images(rows).numbers.tolist(), strict=True
            ):
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
    again = planner_of(recipe, declared_sources(recipe.data))
    again.restore(json.loads(state))
    window = next(again.windows())
    seconds = time.perf_counter() - started
    assert window == next(planner.windows()), "the restored planner goes on as the first one"
    return seconds


# ------------------------------------------------------------------------------------------------------- memory


def memory_of_large_source() -> dict[str, int]:
    """Plan from the arrays of a prepared source as large as OBELICS, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [sys.executable, __file__, "--memory", folder], check=True, capture_output=True, text=True
        )
    return json.loads(result.stdout)


def _memory(folder: Path) -> dict[str, int]:
    recipe = recipe_with("data.mixture=[{name: obelics, share: 1, datasets: [{dataset: obelics, path: raw}]}]")
    order = (
        Mixture(declared_sources(recipe.data), unit="tokens", seed=recipe.seed, caps=Caps(2048, 24, 1)).streams[0].order
    )
    write_arrays(folder, order.take(Cursor(), ROWS_WRITTEN).rows)
    keys = mapped(folder / "image_keys.bin", np.dtype(np.int64))
    store = SimpleNamespace(path=folder, num_images=NUM_IMAGES, image_keys=keys)
    part = PreparedDataset(store, EncodedSamples(folder))
    source = PreparedSource(recipe.data.mixture[0], 1.0, [part], recipe.data, None, Side.TRAIN)
    planner = Planner([source], recipe.data, packs_per_step=recipe.packs_per_step, seed=recipe.seed)
    most = {"RssAnon": 0, "RssFile": 0}
    for window in islice(planner.windows(), WINDOWS):
        rows = np.array([item.sample for pack in window for item in pack.items])
        assert source.num_tokens(rows).min() > 0, "only what was written is read"
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        most = {name: max(size, int(status[name].split()[0]) * 1024) for name, size in most.items()}
    return {"memory_bytes": most["RssAnon"], "mapped_bytes": most["RssFile"]}


NUM_SAMPLES, NUM_IMAGES = 141_047_697, 352_619_243
WINDOWS, ROWS_WRITTEN = 60, 40_000


def write_arrays(folder: Path, rows: NDArray[np.int64]) -> None:
    """The arrays of an encoded store of full size; in files with holes, so that only what will be read takes disk.

    Documents have 817 tokens on average, as OBELICS', and two or three images, each shown once.
    """
    both = np.concatenate([rows, rows + 1])
    token_offsets = both * 817 + (mix64(both, 1) % np.uint64(700)).astype(np.int64)
    image_offsets = both * 5 // 2
    images = np.concatenate([rows * 5 // 2 + place for place in range(3)])
    arrays = {
        "token_offsets": (NUM_SAMPLES + 1, both, token_offsets),
        "image_offsets": (NUM_SAMPLES + 1, both, image_offsets),
        "num_trained": (NUM_SAMPLES, rows, np.full(len(rows), 700)),
        "image_rows": (NUM_IMAGES, images, images),
        "image_keys": (NUM_IMAGES, images, (mix64(images, 2) >> np.uint64(1)).astype(np.int64)),
        "samples": (NUM_SAMPLES, rows, rows),
        "trained_spans": (0, rows[:0], rows[:0]),
    }
    for name, (size, places, values) in arrays.items():
        with (folder / f"{name}.bin").open("wb") as file:
            file.truncate(8 * size)
        if size:
            array = np.memmap(folder / f"{name}.bin", np.int64, "r+")
            array[places] = values
            array.flush()
            del array
            with (folder / f"{name}.bin").open("rb") as file:  # read from disk, as after a day
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    dtypes = {name: "<i8" for name in arrays if name != "image_keys"}
    index = {"dtypes": dtypes, "changes": {}, "tokens": 0, "has_states": False, "is_weighted": False}
    (folder / "index.json").write_text(json.dumps(index))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(_memory(arguments.memory)))
        return
    recipe = recipe_with()
    figures = plan(recipe, arguments.steps)
    planner = figures.pop("planner")
    figures["share_of_step"] = figures["seconds_per_step"] / 1.0
    figures["first_fit_fill"] = first_fit_fill(recipe)
    figures["restore_seconds"] = restore_seconds(recipe, planner)
    figures["state_bytes"] = len(json.dumps(planner.state()))
    figures |= memory_of_large_source()
    for cap in (16, 20, 1000):
        figures[f"fill_at_{cap}_images"] = plan(recipe_with(f"data.max_images_per_pack={cap}"), 30)["fill"]
    ratios = {name: figures[name] for name in ("fill", "packs_to_bound", "first_fit_fill", "share_of_step")}
    if arguments.json:
        print(json.dumps({"ratios": ratios, **figures}))
        return
    print_figures(figures)


if __name__ == "__main__":
    main()
