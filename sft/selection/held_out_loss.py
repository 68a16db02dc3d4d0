"""The loss on what `data.validation` holds out: what a checkpoint is chosen by where there is no benchmark.

Training writes it into metrics.jsonl, as means by source. Where it has not, or where the spread over samples is needed,
every checkpoint is asked here: the same packs of held-out samples for all, at the mixture's shares, sample by sample.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from sft.chat_template import ChatTemplate
from sft.errors import RunError
from sft.evaluation.processes import deal, gathered, together
from sft.files import hash_file
from sft.held_out_loss import HeldOutPacks, SampleLoss, mean_loss, sample_losses
from sft.inference import Load
from sft.selection.kept import asked_once

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
            try:
                metrics = json.loads(line)
            except ValueError:  # a line that a killed training did not finish
                continue
            loss = mean_loss(metrics.get("validation", {}))
            if loss is not None and math.isfinite(loss):
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
        RunError: a loss is not finite.
    """
    data = held_out.sources.data

    def ask() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        with together():
            loaded = load(path)
        samples = shared_losses(
            loaded.model, held_out, image_size=loaded.image_size, autocast=loaded.autocast, on_progress=on_progress
        )
        if broken := sum(not math.isfinite(sample.loss) for sample in samples):
            raise RunError(
                f"{path}: the loss of {broken} of {len(samples)} held-out samples is not finite: training diverged"
            )
        tokens = sum(sample.trained_tokens for sample in samples)
        loss = sum(sample.loss * sample.trained_tokens for sample in samples) / tokens
        return {"by": "loss", "loss": loss}, [_line(sample) for sample in samples]

    protocol = {
        "by": "loss",
        "template": template.fingerprint,
        "packs": held_out.packs,
        "stores": [hash_file(part.store.path / "manifest.json") for own in held_out.sources.parts for part in own],
        "train_on": data.train_on,
        "pack_isolation": data.pack_isolation,
    }
    return asked_once(path, run_dir, BENCHMARK, protocol, ask)


def shared_losses(
    model: nn.Module,
    held_out: HeldOutPacks,
    *,
    image_size: int,
    autocast: bool = False,
    always_whole: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[SampleLoss]:
    """The loss of every held-out sample, in the order of the packs, which are shared out to the processes; see
    `sample_losses`.

    With `always_whole` the processes wait for each other in every forward: what fails before it in one of them fails in
    all, then and there.
    """
    own: dict[int, list[SampleLoss]] = {}
    done = 0
    with nullcontext() if always_whole else together():
        for number, turn in deal(range(len(held_out.packs))):
            packs = [held_out.packs[number]]
            own[number] = [
                *sample_losses(
                    model,
                    held_out.sources,
                    packs,
                    image_size=image_size,
                    autocast=autocast,
                    always_whole=always_whole,
                    before_forward=together if always_whole else nullcontext,
                )
            ]
            done += sum(len(held_out.packs[other]) for other in turn)
            on_progress(done, held_out.num_samples)
    by_pack = gathered(own)
    return [sample for number in sorted(by_pack) for sample in by_pack[number]]


def _line(sample: SampleLoss) -> dict[str, Any]:
    return {
        "question": sample.key,
        "cluster": sample.cluster,
        "image_sha256": "",
        "category": sample.source,
        "loss": sample.loss,
        "trained_tokens": sample.trained_tokens,
    }
