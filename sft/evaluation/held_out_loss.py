"""The loss on what `data.validation` holds out, sample by sample: the same packs in training and in `select`.

Training writes it into metrics.jsonl, as means by source. Where it has not, or where the spread over samples is needed,
`sft.evaluation.tasks.loss` measures it for every checkpoint: the same packs for all, at the mixture's shares.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sft.batches.collate import collate
from sft.batches.image_source import StoredImages
from sft.batches.pack_stream import Planner
from sft.core.distributed import all_gather_dict, all_or_none, assign, from_main
from sft.core.errors import UserError
from sft.core.files import text_lines
from sft.core.sample import PackItem
from sft.data.prepare import open_sources
from sft.data.sources import Sources
from sft.models import get_family
from sft.models.base_model import find_prepared_base
from sft.models.chat_template import ChatTemplate
from sft.models.family import Images
from sft.models.loaded_model import load_template
from sft.models.packed_model import PackedModel
from sft.recipe import Recipe

NUM_PACKS = 64

HeldOutPack = tuple[PackItem, ...]


@dataclass(frozen=True, kw_only=True)
class HeldOutPacks:
    """The packs that every checkpoint is measured on: each sample once."""

    sources: Sources
    packs: tuple[HeldOutPack, ...]

    @property
    def num_samples(self) -> int:
        """Samples in all packs."""
        return sum(len(pack) for pack in self.packs)


class SampleLoss(NamedTuple):
    """The loss of a model on one held-out sample that has trained tokens."""

    key: str
    cluster: str
    """Samples about one image are not independent."""
    source: str
    loss: float
    """Mean over its trained tokens."""
    trained_tokens: int


def held_out_packs(held_out: Sources, *, seed: int) -> HeldOutPacks:
    """Return the first packs that a planner makes of what is held out, each sample once though little may be held out.

    Raises:
        UserError: no held-out sample of a source fits a pack, or none has trained tokens.
    """
    window = next(Planner(held_out.sources, held_out.data, packs_per_step=NUM_PACKS, seed=seed).windows())
    seen: set[PackItem] = set()
    packs = []
    for pack in window:
        packs.append(tuple(item for item in dict.fromkeys(pack.items) if item not in seen))
        seen.update(pack.items)
    if not any(held_out.sources[source].num_trained(np.array([row]))[0] for source, row in seen):
        raise UserError(f"data.validation: none of the {len(seen):,} held-out samples has trained tokens")
    return HeldOutPacks(sources=held_out, packs=tuple(pack for pack in packs if pack))


def sample_losses(
    model: PackedModel,
    sources: Sources,
    packs: Sequence[HeldOutPack],
    *,
    images: Images,
    autocast: bool = False,
    always_whole: bool = False,
    before_forward: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[SampleLoss]:
    """Yield the loss of each sample by a model in evaluation mode, a forward for each pack; images are seen whole.

    `autocast` computes in bfloat16; for `always_whole` see `collate`. What is done before a forward is done inside
    `before_forward`.

    Raises:
        SkipSample: an image was changed since it was prepared.
    """
    device = next(model.parameters()).device
    for pack in packs:
        # Each sample is a source of its own, so that the forward hands back which loss is whose.
        placed = [sources.sample(item)._replace(source=number) for number, item in enumerate(pack)]
        with before_forward():
            batch = collate(
                [placed],
                StoredImages(sources.reader, images),
                train_on=sources.data.train_on,
                pack_isolation=sources.data.pack_isolation,
                always_whole=always_whole,
            ).to(device)
        # Not inference_mode: what a module keeps from it could not be trained with afterwards.
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            output = model(batch=batch)
        is_real_P = output.source_ids_P >= 0
        numbers_P, losses_P = output.source_ids_P[is_real_P], output.token_losses_P[is_real_P].double()
        counts = torch.bincount(numbers_P, minlength=len(pack)).tolist()
        sums = torch.bincount(numbers_P, losses_P, minlength=len(pack)).tolist()
        for item, sample, count, total in zip(pack, placed, counts, sums, strict=True):
            if count:
                yield SampleLoss(
                    key=sample.encoded.key,
                    cluster=f"image {sample.images[0]}" if sample.images else sample.encoded.key,
                    source=sources.sources[item.source].name,
                    loss=total / count,
                    trained_tokens=count,
                )


def mean_loss(by_source: dict[str, Any]) -> float | None:
    """Return the mean loss over the trained tokens of all sources, from a `validation` in metrics.jsonl; None without
    any."""
    parts = [part for part in by_source.values() if part["trained_tokens"]]
    tokens = sum(part["trained_tokens"] for part in parts)
    return sum(part["loss"] * part["trained_tokens"] for part in parts) / tokens if tokens else None


def recorded_losses(run_dir: Path) -> dict[int, float]:
    """Return the held-out loss at each step that training wrote into metrics.jsonl."""
    file = run_dir / "metrics.jsonl"
    if not file.is_file():
        return {}
    losses = {}
    for line in text_lines(file):
        try:
            metrics = json.loads(line)
        except ValueError:  # a line that a killed training did not finish
            continue
        loss = mean_loss(metrics.get("validation", {}))
        if loss is not None and math.isfinite(loss):
            losses[int(metrics["step"])] = loss
    return losses


def shared_losses(
    model: PackedModel,
    held_out: HeldOutPacks,
    *,
    images: Images,
    autocast: bool = False,
    always_whole: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[SampleLoss]:
    """Return the loss of every held-out sample, in the order of the packs, which are divided among the processes; see
    `sample_losses`.

    With `always_whole` the processes wait for each other in every forward: what fails before it in one of them fails in
    all, then and there.
    """
    own: dict[int, list[SampleLoss]] = {}
    done = 0
    with nullcontext() if always_whole else all_or_none():
        for number, turn in assign(range(len(held_out.packs))):
            packs = [held_out.packs[number]]
            own[number] = [
                *sample_losses(
                    model,
                    held_out.sources,
                    packs,
                    images=images,
                    autocast=autocast,
                    always_whole=always_whole,
                    before_forward=all_or_none if always_whole else nullcontext,
                )
            ]
            done += sum(len(held_out.packs[other]) for other in turn)
            on_progress(done, held_out.num_samples)
    by_pack = all_gather_dict(own)
    return [sample for number in sorted(by_pack) for sample in by_pack[number]]


def open_held_out(recipe: Recipe) -> tuple[Sources | None, ChatTemplate]:
    """Open what a run's recipe holds out, with the template that encodes it.

    Raises:
        UserError: the data are not prepared.
    """
    template = load_template(get_family(recipe.model.family), from_main(lambda: find_prepared_base(recipe)))
    return open_sources(recipe, template, [recipe.output_dir]).held_out(), template
