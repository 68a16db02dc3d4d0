#!/usr/bin/env python3
"""What sharing costs and what it gives: the quickstart, shortened, with 1, 4 and 30 samples about an image in a pack.

    scripts/bench/bench_sharing.py [--json] [--steps 150] [--seeds 2] [--limits 1,4,30]

Every run trains on the same number of tokens (a cap of 64 images lets packs be full whatever the limit), with the
learning rate going to zero at its last step. Twentieth parts of the images and dialogues are held out of all of them,
and every model is asked the same 64 packs of those. Figures are means over seeds; standard deviations are of one run.

    held_out_loss          of an answer's token, in the mixture of the quickstart
    held_out_loss_choices  of the source that has three quarters of it
    trained_loss           mean of the last tenth of the steps
    images_per_pack        distinct ones, which are encoded
    tokens_per_second      trained tokens and others, per CPU second of one core in training
    ratios                 tokens_per_second over that of the first limit; held-out loss over that of the first limit
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from measuring import print_figures

from sft.batches.data_loader import MicroBatches
from sft.batches.pack_stream import Planner
from sft.batches.steps import Plans
from sft.cli.terminal import quiet_libraries
from sft.core.precision import device
from sft.core.sample import Batch
from sft.core.shipped import recipe_path
from sft.data.prepare import prepare
from sft.data.sources import Sources
from sft.models.base_model import base_path
from sft.models.family import Images
from sft.models.idefics.images import IdeficsImages
from sft.models.loaded_model import Loaded, load_for_inference
from sft.recipe import Recipe, load_recipe
from sft.training import run

HELD_OUT_PACKS = 64


def recipe_with(folder: Path, limit: int, seed: int, steps: int) -> Recipe:
    """The quickstart, shortened."""
    overrides = (
        f"data.max_samples_per_image_per_pack={limit}",
        "data.max_images_per_pack=64",
        "data.validation={share: 0.05}",
        f"data.store={folder / 'stores'}",
        f"training.max_steps={steps}",
        f"checkpoints.every_steps={steps}",
        f"output_dir={folder / f'run-{limit}-{seed}'}",
        f"seed={seed}",
    )
    return load_recipe(recipe_path("quickstart"), overrides)


def batches(recipe: Recipe, sources: Sources, images: Images) -> Iterator[Batch]:
    """What a run on some sources would be given."""
    planner = Planner(sources.sources, recipe.data, packs_per_step=recipe.packs_per_step, seed=recipe.seed)
    plans = Plans(sources, planner, micro_batch_packs=recipe.training.micro_batch_packs)
    made = MicroBatches(plans, images)
    return (micro_batch["batch"] for micro_batch in made)


@torch.no_grad()
def held_out_losses(loaded: Loaded, held_out: list[Batch], names: list[str]) -> dict[str, float]:
    """Mean loss of a trained token, over all sources and of each."""
    from sft.training.metrics import StepMetrics

    metrics = StepMetrics(names)
    for batch in held_out:
        with torch.autocast(device().type, torch.bfloat16, enabled=loaded.autocast):
            output = loaded.model(batch=batch.to(device()))
        metrics.add(batch, output.token_losses_P, output.source_ids_P)
    line = metrics.line()
    return {"all": line["loss"]} | {name: source["loss"] for name, source in line["sources"].items()}


def measure_run(recipe: Recipe, held_out: list[Batch]) -> dict[str, float]:
    """Train once."""
    sources = prepare(recipe)
    lines: list[dict[str, Any]] = []
    status = run.train(recipe, sources, on_step=lambda step, line: lines.append(line))
    names = [source.name for source in recipe.data.mixture]
    trained = load_for_inference(Path(recipe.output_dir) / "checkpoints" / f"checkpoint-{recipe.training.max_steps}")
    losses = held_out_losses(trained, held_out, names)
    last = lines[-max(len(lines) // 10, 1) :]
    some = islice(batches(recipe, sources, IdeficsImages.of_size(1)), 20)  # of a pixel: only their number counts
    packs = 20 * recipe.training.micro_batch_packs
    return {
        "held_out_loss": losses["all"],
        "held_out_loss_choices": losses["choices"],
        "trained_loss": statistics.mean(line["loss"] for line in last),
        "images_per_pack": sum(batch.num_images for batch in some) / packs,
        "tokens_per_second": status.tokens / status.cpu_seconds,
        "tokens": float(status.tokens),
    }


def measure(folder: Path, limits: list[int], seeds: int, steps: int) -> dict[str, Any]:
    """All figures. Seeds take turns, so that no limit has the quiet hours of a machine."""
    first = recipe_with(folder, 1, seed=0, steps=steps)
    own = prepare(first).held_out()
    assert own is not None
    images = load_for_inference(base_path(first)).images
    num_batches = HELD_OUT_PACKS // first.training.micro_batch_packs
    held_out = [*islice(batches(first, own, images), num_batches)]
    runs: dict[int, list[dict[str, float]]] = {limit: [] for limit in limits}
    for seed in range(seeds):
        for limit in limits:
            runs[limit].append(measure_run(recipe_with(folder, limit, seed, steps), held_out))
            print(f"limit {limit}, seed {seed}: {runs[limit][-1]}", file=sys.stderr, flush=True)

    def mean(limit: int, name: str) -> float:
        return statistics.mean(figures[name] for figures in runs[limit])

    def of_limits(name: str) -> dict[str, float]:
        return {str(limit): mean(limit, name) for limit in limits}

    names = [*runs[limits[0]][0]]
    deviations = {
        name: {str(limit): statistics.stdev(figures[name] for figures in runs[limit]) for limit in limits}
        for name in names
        if seeds > 1
    }
    ratios = {
        f"{name}_at_{limit}": mean(limit, name) / mean(limits[0], name)
        for name in ("tokens_per_second", "held_out_loss")
        for limit in limits[1:]
    }
    figures = {name: of_limits(name) for name in names}
    return {"ratios": ratios, **figures, "standard_deviation": deviations, "steps": steps, "seeds": seeds}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--limits", default="1,4,30", help="of data.max_samples_per_image_per_pack")
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    limits = [int(limit) for limit in arguments.limits.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), limits, arguments.seeds, arguments.steps)
    if arguments.json:
        print(json.dumps(figures))
    else:
        print_figures(figures)


if __name__ == "__main__":
    main()
