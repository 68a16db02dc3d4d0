#!/usr/bin/env python3
"""What the feature cache gives: the second epoch with it beside an epoch without.

    scripts/bench/bench_cache.py [--json] [--rounds 3] [--steps 8] [--hidden 512] [--modes lora,qlora]

A random IDEFICS of the proportions of idefics-9b (an image costs as many text tokens as there), photographs of
640 x 480 as JPEG, packs of 1,024 tokens and at most 24 images; the trainer itself, batches made in its process. Two
workloads: `captions`, 60 tokens and an image of its own each, and `dialogues`, 240 tokens, four about an image.

    ratios              CPU seconds of a step without the cache / with it, images encoded before; sides alternate
    expected            the same by the floating-point operations that `idefics-sft plan` counts
    loss_difference     the largest of a step, relative: features are rounded to float16
    filling             CPU seconds of a step of the first epoch with the cache / without
    megabytes           that the cache takes
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from measuring import print_measured
from prepared_work import recipe_of, silently, write_conversations, write_model

from sft.batches.pack_stream import Planner
from sft.batches.steps import Plans
from sft.cli.terminal import quiet_libraries
from sft.cost.devices import DEVICES
from sft.cost.estimate import COMMON_SIZE, setting_of
from sft.cost.family import read_model
from sft.data.prepare import prepare
from sft.recipe import Recipe
from sft.training import run

WORKLOADS = {"captions": {"words": 12, "per_image": 1}, "dialogues": {"words": 50, "per_image": 4}}


def steps_of(recipe: Recipe) -> tuple[float, list[float]]:
    """CPU seconds of a run's steps but the first, in which things are set up; the losses of all."""
    clock, losses = [], []

    def on_step(step: int, line: dict[str, Any]) -> None:
        clock.append(time.process_time())
        losses.append(line["loss"])

    sources = prepare(recipe)
    shutil.rmtree(recipe.output_dir, ignore_errors=True)
    silently(lambda: run.train(recipe, sources, on_step))
    return clock[-1] - clock[0], losses


def measure(folder: Path, mode: str, workload: str, rounds: int, steps: int) -> dict[str, Any]:
    """One mode on one workload."""
    data = folder / workload

    def recipe(cache: bool) -> Recipe:
        return recipe_of(
            folder, f"run-{mode}-{workload}", data,
            model={"mode": mode},
            data={"feature_cache": cache, "max_samples_per_image_per_pack": 4},
            training={"max_steps": steps},
        )  # fmt: skip

    def side(name: str) -> list[float]:
        if name == "filling":
            for cache in folder.glob("stores/*/features"):
                shutil.rmtree(cache)
        took, losses = steps_of(recipe(name != "without"))
        seconds[name].append(took)
        return losses

    seconds: dict[str, list[float]] = {"without": [], "filling": [], "with": []}
    for number in range(rounds + 1):
        losses = {name: side(name) for name in seconds}
        if not number:
            for took in seconds.values():
                took.clear()  # the first round warms caches up
    median = {name: statistics.median(took) for name, took in seconds.items()}
    costs = read_model("idefics", str(folder / "model"))
    setting = setting_of(recipe(False), costs, DEVICES["a100-80"], 1)
    images = round(images_per_pack(recipe(False), steps))
    setting = replace(setting, images=images, image_weight=images)
    work = [costs.cost(replace(setting, encoded=encoded)).flop for encoded in (False, True)]
    files = [*(folder / "stores").glob("*/features/*.f16")]
    return {
        "ratio": median["without"] / median["with"],
        "expected": work[0] / work[1],
        "loss_difference": max(
            abs(one / other - 1) for one, other in zip(losses["with"], losses["without"], strict=True)
        ),
        "filling": median["filling"] / median["without"],
        "images_per_pack": setting.images,
        "megabytes": sum(file.stat().st_blocks * 512 for file in files) / 1e6,
        "kilobytes_per_image": costs.feature_bytes(*COMMON_SIZE) / 1e3,
    }


def images_per_pack(recipe: Recipe, steps: int) -> float:
    """Distinct ones, of the packs that are trained."""
    sources = prepare(recipe)
    planner = Planner(sources.sources, recipe.data, packs_per_step=1, seed=recipe.seed)
    packs = islice(Plans(sources, planner, micro_batch_packs=1), steps)
    shown = [{image for place in plan.packs[0] for image in sources.reader.sample(place).images} for plan in packs]
    return statistics.mean(map(len, shown))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--modes", default="lora,qlora")
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", arguments.hidden)
        for workload, options in WORKLOADS.items():
            samples = 96 if workload == "captions" else 64
            write_conversations(folder / workload, samples, images=samples // options["per_image"], **options)
            for mode in arguments.modes.split(","):
                found = measure(folder, mode, workload, arguments.rounds, arguments.steps)
                figures[f"{mode}_{workload}"] = found
                print(f"{mode}, {workload}: {found}", file=sys.stderr, flush=True)
                for cache in folder.glob("stores/*/features"):
                    shutil.rmtree(cache)
    print_measured(figures, as_json=arguments.json)


if __name__ == "__main__":
    main()
