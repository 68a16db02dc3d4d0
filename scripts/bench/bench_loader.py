#!/usr/bin/env python3
"""What the data loader costs the training process: CPU time with the real loader beside that on batches made before.

    scripts/bench/bench_loader.py [--json] [--batches 96] [--rounds 3] [--hidden 512] [--workers 2]

A random IDEFICS of the proportions of idefics-9b, 224-pixel images; full training by the trainer itself, packs of 1,024
tokens. Workloads: `short`, 46 samples of a sentence and 9 images a pack; `long`, eight of 120 tokens, two images. Two
workers make the batches; the training process plans, takes them over and trains.

    ratios        CPU seconds of the training process a step, with the loader / on a batch that was made before:
                  1 + `loader` / `step`. The loader's share is too small to be seen beside the noise of two runs.
    loader        milliseconds of the training process for each batch that it only takes over, planning included
    step          milliseconds of a step on a batch that was made before, the loader's being stopped
    direct        the ratio of two runs that alternate, median; a few percent of it are noise
    worker        milliseconds of a worker for a batch
    without_decoding   the same where all features are in the cache
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import print_measured
from prepared_work import recipe_of, silently, write_conversations, write_model
from transformers import IdeficsConfig

from sft.batches.data_loader import BatchMaker, MicroBatches
from sft.batches.feature_cache import FeatureCache
from sft.batches.pack_stream import Planner
from sft.batches.steps import Plans
from sft.cli.terminal import quiet_libraries
from sft.core.sample import Batch
from sft.data.prepare import prepare
from sft.data.sources import Sources
from sft.models.idefics.family import FAMILY
from sft.models.idefics.images import IdeficsImages
from sft.models.idefics.weights import weights
from sft.models.loaded_model import load_template
from sft.recipe import Recipe
from sft.training.open_model import load_for_training

WORKLOADS = {
    "short": {"number": 2000, "words": 6, "images": 400, "per_image": 2},
    "long": {"number": 400, "words": 50, "images": 100, "per_image": 4},
}
WARM_UP = 8


def plans_of(recipe: Recipe, sources: Sources) -> Plans:
    """From the first step on."""
    planner = Planner(sources.sources, recipe.data, packs_per_step=recipe.packs_per_step, seed=recipe.seed)
    return Plans(sources, planner, micro_batch_packs=1, image_cost=20.0)


def loader_seconds(recipe: Recipe, sources: Sources, batches: int) -> float:
    """CPU seconds of this process for a batch that workers make and nobody uses."""
    made = iter(MicroBatches(plans_of(recipe, sources), IdeficsImages.of_size(224)))
    for _ in islice(made, WARM_UP):
        pass
    started = time.process_time()
    for _ in islice(made, batches):
        pass
    return (time.process_time() - started) / batches


def worker_seconds(maker: BatchMaker, plans: Plans, batches: int) -> float:
    """Median CPU seconds to make a batch."""
    seconds = []
    for plan in islice(plans, batches):
        started = time.process_time()
        maker[plan]
        seconds.append(time.process_time() - started)
    return statistics.median(seconds)


class Run:
    """Training of one model that can be gone on with."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        from sft.training.trainer import Trainer, TrainerParts  # its libraries talk while they are imported

        base = folder / "model"
        self.template = load_template(FAMILY, base)
        self.model = load_for_training(recipe, FAMILY, base)
        weights.select_trainable(self.model)
        self.folder, self.recipe = folder / "run", recipe
        self.make_trainer = lambda **parts: Trainer(TrainerParts(**parts))

    def seconds(self, batches: Iterable[dict[str, Batch]], steps: int) -> float:
        """CPU seconds of this process a step, but for the first."""
        clock: list[float] = []
        settings = self.recipe.training.model_copy(update={"max_steps": steps + 1})
        trainer = self.make_trainer(
            model=self.model,
            weights=weights,
            tokenizer=self.template.tokenizer,
            micro_batches=batches,
            micro_batches_per_step=1,
            settings=settings,
            checkpoint_every=10**6,
            run_dir=self.folder,
            seed=0,
            source_names=["talk"],
            on_step=lambda step, line: clock.append(time.process_time()),
        )
        trainer.train()
        return (clock[-1] - clock[0]) / steps


def all_known(sources: Sources) -> FeatureCache:
    """A cache that has the features of every image; numbers of no meaning, of the size of idefics-9b's."""
    stores = list(dict.fromkeys(part.store for own in sources.parts for part in own))
    cache = FeatureCache(stores, "bench", IdeficsImages(IdeficsConfig()))
    for store in stores:
        for key in store.image_keys.tolist():
            cache.write(key, np.zeros((64, cache.images.state_size), np.float16))
    return cache


def measure(folder: Path, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One workload."""
    write_conversations(folder / name, **WORKLOADS[name])
    recipe = recipe_of(
        folder, "run", folder / name,
        data={"num_workers": arguments.workers, "worker_timeout": 600}, training={"max_steps": 100},
    )  # fmt: skip
    sources = prepare(recipe)
    maker = BatchMaker(sources.reader, IdeficsImages.of_size(224), seed=0)
    loader = statistics.median(loader_seconds(recipe, sources, arguments.batches) for _ in range(arguments.rounds))
    worker = worker_seconds(maker, plans_of(recipe, sources), arguments.batches // 4)
    maker.features = all_known(sources)
    known = worker_seconds(maker, plans_of(recipe, sources), arguments.batches // 4)
    maker.features = None
    run = Run(recipe, folder)
    steps = arguments.steps
    made = [{"batch": maker[plan]} for plan in islice(plans_of(recipe, sources), steps + 1)]
    seconds: dict[str, list[float]] = {"made": [], "loaded": []}

    def loaded() -> Iterator[dict[str, Batch]]:
        return islice(MicroBatches(plans_of(recipe, sources), IdeficsImages.of_size(224)), steps + 1)

    for _ in range(arguments.rounds):
        seconds["made"].append(silently(lambda: run.seconds(_Given(made), steps)))
        seconds["loaded"].append(silently(lambda: run.seconds(_Given(loaded()), steps)))
    step = statistics.median(seconds["made"])
    return {
        "ratio": 1 + loader / step,
        "direct": statistics.median(seconds["loaded"]) / step,
        "loader": 1000 * loader,
        "step": 1000 * step,
        "worker": 1000 * worker,
        "without_decoding": 1000 * known,
        "samples": statistics.mean(len(batch["batch"].keys) for batch in made),
        "images": statistics.mean(batch["batch"].num_images for batch in made),
    }


class _Given(torch.utils.data.IterableDataset[dict[str, Batch]]):
    """Batches as they come."""

    def __init__(self, batches: Iterable[dict[str, Batch]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        return iter(self.batches)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--batches", type=int, default=96)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name) / "model", arguments.hidden)
        figures = {workload: measure(Path(name), workload, arguments) for workload in WORKLOADS}
    print_measured(figures, as_json=arguments.json)


if __name__ == "__main__":
    main()
