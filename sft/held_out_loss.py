"""The loss on what `data.validation` holds out, sample by sample: the same packs in training and in `select`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from sft.collate import collate
from sft.planner import Planner
from sft.prepared import Sources
from sft.sample import PackItem

NUM_PACKS = 64

HeldOutPack = tuple[PackItem, ...]


@dataclass(frozen=True, kw_only=True)
class HeldOutPacks:
    """The same packs for every checkpoint: each sample once."""

    sources: Sources
    packs: tuple[HeldOutPack, ...]

    @property
    def num_samples(self) -> int:
        """Samples in all packs."""
        return sum(len(pack) for pack in self.packs)


class SampleLoss(NamedTuple):
    """What a model makes of one held-out sample that has trained tokens."""

    key: str
    cluster: str
    """Samples about one image are not independent."""
    source: str
    loss: float
    """Mean over its trained tokens."""
    trained_tokens: int


def held_out_packs(held_out: Sources, *, seed: int) -> HeldOutPacks:
    """The first packs that a planner makes of what is held out, each sample once though little may be held out.

    Raises:
        UserError: no held-out sample of a source fits a pack.
    """
    window = next(Planner(held_out.sources, held_out.data, packs_per_step=NUM_PACKS, seed=seed).windows())
    seen: set[PackItem] = set()
    packs = []
    for pack in window:
        packs.append(tuple(item for item in dict.fromkeys(pack.items) if item not in seen))
        seen.update(pack.items)
    return HeldOutPacks(sources=held_out, packs=tuple(pack for pack in packs if pack))


def sample_losses(
    model: nn.Module,
    sources: Sources,
    packs: Sequence[HeldOutPack],
    *,
    image_size: int,
    autocast: bool = False,
    always_whole: bool = False,
    before_forward: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[SampleLoss]:
    """The loss of each sample by a model in evaluation mode, a forward for each pack; images are seen whole.

    `autocast` computes in bfloat16; for `always_whole` see `collate`. What is done before a forward is done inside
    `before_forward`.

    Raises:
        SkipSample: an image was changed since it was prepared.
    """
    device = next(model.parameters()).device
    for pack in packs:
        # Each sample is a source of its own, so that the forward hands back which loss is whose.
        placed = [sources.place(item)._replace(source=number) for number, item in enumerate(pack)]
        with before_forward():
            batch = collate(
                [placed],
                partial(sources.reader.pixels, size=image_size),
                train_on=sources.data.train_on,
                pack_isolation=sources.data.pack_isolation,
                image_size=image_size,
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
    """The mean over the trained tokens of all sources, of a `validation` in metrics.jsonl; None without any."""
    parts = [part for part in by_source.values() if part["trained_tokens"]]
    tokens = sum(part["trained_tokens"] for part in parts)
    return sum(part["loss"] * part["trained_tokens"] for part in parts) / tokens if tokens else None
