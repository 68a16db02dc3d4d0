"""The loss on what `data.validation` holds out: what a checkpoint is chosen by where there is no benchmark.

Training writes it into metrics.jsonl, as means by source. Where it has not, or where the spread over samples is needed,
every checkpoint is asked here: the same packs of held-out samples for all, at the mixture's shares, sample by sample.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft.chat_template import ChatTemplate
from sft.files import hash_file
from sft.held_out_loss import HeldOutPacks, SampleLoss, mean_loss, sample_losses
from sft.inference import Load
from sft.scoring import weights_hash
from sft.selection.kept import hash_of, is_kept, keep

BENCHMARK = "held_out_loss"
"""Its folder in RUN/evaluations."""


def recorded_losses(run_dir: Path) -> dict[int, float]:
    """Step -> held-out loss that training wrote into metrics.jsonl: the mean over the trained tokens of all sources."""
    file = run_dir / "metrics.jsonl"
    if not file.is_file():
        return {}
    losses = {}
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            metrics = json.loads(line)
            loss = mean_loss(metrics.get("validation", {}))
            if loss is not None:
                losses[int(metrics["step"])] = loss
    return losses


def ask_held_out_loss(
    path: Path,
    held_out: HeldOutPacks,
    template: ChatTemplate,
    run_dir: Path,
    load: Load,
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
    loaded = load(path)
    lines = []
    for sample in sample_losses(
        loaded.model, held_out.sources, held_out.packs, image_size=loaded.image_size, autocast=loaded.autocast
    ):
        lines.append(_line(sample))
        on_progress(len(lines), held_out.num_samples)
    tokens = sum(line["trained_tokens"] for line in lines)
    loss = sum(line["loss"] * line["trained_tokens"] for line in lines) / tokens
    keep(run_dir, BENCHMARK, protocol_hash, path.name, {"weights": weights, "by": "loss", "loss": loss}, lines)
    return protocol_hash


def _line(sample: SampleLoss) -> dict[str, Any]:
    return {
        "question": sample.key,
        "cluster": sample.cluster,
        "image_sha256": "",
        "category": sample.source,
        "loss": sample.loss,
        "trained_tokens": sample.trained_tokens,
    }
