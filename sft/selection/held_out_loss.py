"""The loss on what `data.validation` holds out: what a checkpoint is chosen by where there is no benchmark.

Training writes it into metrics.jsonl, as means by source. Where it has not, or where the spread over samples is needed,
every checkpoint is asked here: the same packs of held-out samples for all, at the mixture's shares, sample by sample.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sft.chat_template import ChatTemplate
from sft.collate import collate
from sft.files import hash_file
from sft.inference import Loaded, load_for_inference
from sft.planner import Planner
from sft.prepared import Sources
from sft.sample import PackItem
from sft.scoring import weights_hash
from sft.selection.kept import hash_of, is_kept, keep

BENCHMARK = "held_out_loss"
"""Its folder in RUN/evaluations."""
NUM_PACKS = 64


def recorded_losses(run_dir: Path) -> dict[int, float]:
    """Step -> held-out loss that training wrote into metrics.jsonl: the mean over the trained tokens of all sources."""
    file = run_dir / "metrics.jsonl"
    if not file.is_file():
        return {}
    losses = {}
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            metrics = json.loads(line)
            parts = [part for part in metrics.get("validation", {}).values() if part["trained_tokens"]]
            if parts:
                tokens = sum(part["trained_tokens"] for part in parts)
                losses[int(metrics["step"])] = sum(part["loss"] * part["trained_tokens"] for part in parts) / tokens
    return losses


@dataclass(frozen=True, kw_only=True)
class HeldOutPacks:
    """The same packs for every checkpoint: each sample once."""

    sources: Sources
    packs: tuple[tuple[PackItem, ...], ...]

    @property
    def num_samples(self) -> int:
        """Samples in all packs."""
        return sum(len(pack) for pack in self.packs)


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


def ask_held_out_loss(
    path: Path,
    held_out: HeldOutPacks,
    template: ChatTemplate,
    run_dir: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Take the loss of every held-out sample and keep it, unless it is kept already. Returns the protocol's hash.

    Raises:
        SkipSample: an image was changed since it was prepared.
    """
    data = held_out.sources.data
    stores = [hash_file(part.store.path / "manifest.json") for own in held_out.sources.parts for part in own]
    protocol_hash = hash_of(
        {
            "by": "loss",
            "template": template.fingerprint,
            "packs": held_out.packs,
            "stores": stores,
            "train_on": data.train_on,
            "pack_isolation": data.pack_isolation,
        }
    )
    weights = weights_hash(path)
    if is_kept(run_dir, BENCHMARK, protocol_hash, path.name, weights=weights):
        return protocol_hash
    lines = []
    for line in _losses(load_for_inference(path), held_out):
        lines.append(line)
        on_progress(len(lines), held_out.num_samples)
    tokens = sum(line["trained_tokens"] for line in lines)
    loss = sum(line["loss"] * line["trained_tokens"] for line in lines) / tokens
    keep(run_dir, BENCHMARK, protocol_hash, path.name, {"weights": weights, "by": "loss", "loss": loss}, lines)
    return protocol_hash


def _losses(loaded: Loaded, held_out: HeldOutPacks) -> Iterator[dict[str, Any]]:
    """One line for each sample that has trained tokens."""
    sources, data = held_out.sources, held_out.sources.data
    device = next(loaded.model.parameters()).device
    for pack in held_out.packs:
        # Each sample is a source of its own, so that the forward hands back which loss is whose.
        placed = [sources.place(item)._replace(source=number) for number, item in enumerate(pack)]
        batch = collate(
            [placed],
            partial(sources.reader.pixels, size=loaded.image_size),
            train_on=data.train_on,
            pack_isolation=data.pack_isolation,
            image_size=loaded.image_size,
        ).to(device)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=loaded.autocast):
            output = loaded.model(batch=batch)
        counts = torch.bincount(output.source_ids_P, minlength=len(pack)).tolist()
        sums = torch.bincount(output.source_ids_P, output.token_losses_P.double(), minlength=len(pack)).tolist()
        for item, sample, count, total in zip(pack, placed, counts, sums, strict=True):
            if count:
                yield {
                    "question": sample.encoded.key,
                    "cluster": f"image {sample.images[0]}" if sample.images else sample.encoded.key,
                    "image_sha256": "",
                    "category": sources.sources[item.source].name,
                    "loss": total / count,
                    "trained_tokens": count,
                }
