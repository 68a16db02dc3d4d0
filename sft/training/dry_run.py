"""One optimizer step as it will be, before the run is paid for: its memory and its time.

The trainer itself does it, on two micro-batches: the costliest of the first window of the plan, and one that is full to
the caps of the recipe, which no micro-batch can exceed. Everything it writes goes to a temporary folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from sft.batches.collate import collate
from sft.batches.data_loader import BatchMaker
from sft.batches.image_source import NoiseImages
from sft.batches.look_ahead import look_ahead, planned
from sft.batches.steps import Plan, Plans
from sft.core.sample import Batch, EncodedSample, PlacedSample
from sft.data.sources import Sources
from sft.models.base_model import prepare_base
from sft.models.chat_template import ChatTemplate
from sft.models.family import Family
from sft.recipe import Recipe
from sft.training.metrics import Line, Log
from sft.training.open_model import OpenedModel, choose_trained, open_model
from sft.training.out_of_memory import explain_out_of_memory
from sft.training.run import plan_steps
from sft.training.trainer import Trainer, TrainerParts


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """The measured cost of a micro-batch."""

    what: str
    tokens: int
    images: int
    seconds: float
    """Time of one micro-batch, forward and backward, with its part of the optimizer's step."""
    tokens_per_second: float
    peak_memory_bytes: int
    """Peak memory of the GPU during the step; on a CPU, of this process so far."""


def dry_run(recipe: Recipe, sources: Sources, log: Log = lambda line: None) -> list[StepCost]:
    """Do everything up to the first steps of a training and measure two steps; write nothing into output_dir. Raise
    UserError as `sft.training.run.train` does, and RunError where a check fails, or there is not enough memory."""
    recipe = planned(recipe, look_ahead(recipe, sources.sources))
    opened = open_model(recipe, prepare_base(recipe), log)
    choose_trained(recipe, opened, log)
    return measure(recipe, opened, plan_steps(recipe, sources, opened))


def measure(recipe: Recipe, opened: OpenedModel, plans: Plans) -> list[StepCost]:
    """Measure a step of each of the two micro-batches. The first is done once more before, when kernels are chosen and
    optimizer states are made. The model is trained by the steps. Raise RunError where there is not enough memory, or a
    trainable tensor gets no gradient."""
    family, model = opened.family, opened.model
    plan = costliest(plans)
    maker = BatchMaker(plans.sources.reader, opened.template.images, seed=recipe.seed)
    kinds = [
        (f"costliest of the first window (step {plan.step})", maker[plan]),
        ("full to the caps of the recipe", batch_of_caps(recipe, family, model, opened.template)),
    ]
    steps = [kinds[0], *kinds]
    repeats = min(2, plans.micro_batches_per_step)  # from the second on, gradients are held while activations are
    lines: list[Line] = []

    def on_step(step: int, line: Line) -> None:
        lines.append(line)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    with TemporaryDirectory(prefix="idefics-sft-") as folder:
        parts = TrainerParts(
            model=model,
            weights=family.weights,
            tokenizer=opened.template.tokenizer,
            micro_batches=[{"batch": batch} for _, batch in steps for _ in range(repeats)],
            micro_batches_per_step=repeats,
            settings=recipe.training.model_copy(update={"max_steps": len(steps), "warmup_steps": 0}),
            checkpoint_every=len(steps) + 1,
            run_dir=Path(folder),
            seed=recipe.seed,
            source_names=[source.name for source in recipe.data.mixture],
            on_step=on_step,
        )
        with explain_out_of_memory(recipe, lambda: _describe(*steps[len(lines)])):
            Trainer(parts).train()
    return [
        StepCost(
            what=what,
            tokens=len(batch.input_ids_T),
            images=batch.num_images,
            seconds=line["tokens"] / line["tokens_per_second"] / repeats,
            tokens_per_second=line["tokens_per_second"],
            peak_memory_bytes=line["peak_memory_bytes"],
        )
        for (what, batch), line in zip(kinds, lines[1:], strict=True)
    ]


def _describe(what: str, batch: Batch) -> str:
    return f"a micro-batch of {len(batch.input_ids_T):,} tokens and {batch.num_images} images ({what})"


def costliest(plans: Plans) -> Plan:
    """Return the plan of the first window that costs most, by text tokens and by distinct images at their worth."""
    planner, reader = plans.planner, plans.sources.reader
    last_step = planner.window_packs // planner.packs_per_step

    def cost(plan: Plan) -> float:
        samples = [reader.sample(place) for pack in plan.packs for place in pack]
        shown = {key: weight for s in samples for key, weight in zip(s.images, s.encoded.image_weights, strict=True)}
        return sum(len(sample.encoded.input_ids) for sample in samples) + plans.image_cost * sum(shown.values())

    return max(takewhile(lambda plan: plan.step <= last_step, plans), key=cost)


def batch_of_caps(recipe: Recipe, family: Family, model: nn.Module, template: ChatTemplate) -> Batch:
    """Return a micro-batch that no other exceeds: packs full of tokens, each of them trained, in samples as long as the
    model takes, with as many different images as a pack may show."""
    data = recipe.data
    longest = family.text.max_positions(model.config) if data.pack_isolation else data.sequence_length
    images, noise = template.images, NoiseImages(template.images)
    tiling = images.tiling(*noise.size)
    image_ids = images.token_ids(template.tokenizer, tiling)
    packs, number = [], 0
    for turn in range(recipe.training.micro_batch_packs):
        pack, images_left = [], data.max_images_per_pack // images.weight(tiling)
        for start in range(0, data.sequence_length, longest):
            length = min(longest, data.sequence_length - start)
            num_images = min(images_left, length // (len(image_ids) + 2))  # and what stands around them
            images_left -= num_images
            ids = np.full(length, template.tokenizer.eos_token_id, dtype=np.int64)
            ids[0] = turn * data.sequence_length // longest + start // longest  # what begins alike is computed once
            places = tuple(np.linspace(0, length, num_images, endpoint=False, dtype=int).tolist())
            for place in places:
                ids[place : place + len(image_ids)] = image_ids
            encoded = EncodedSample(key="caps", input_ids=ids, trained_spans=(), image_positions=places)
            pack.append(PlacedSample(encoded, tuple(range(number, number + num_images)), source=0))
            number += num_images
        packs.append(pack)
    return collate(packs, noise, train_on="all", pack_isolation=data.pack_isolation)
