"""What is known of an optimizer step when it ends, and the files of a run that keep it, a line of JSON a step."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sft.distributed import summed
from sft.files import disk_full_told
from sft.loss import trained_positions
from sft.sample import NO_SOURCE, Batch

METRICS, BEFORE, NONFINITE, SPIKES = "metrics.jsonl", "before.json", "nonfinite.jsonl", "spikes.jsonl"


class PackLoss(NamedTuple):
    """What a pack of the step gave."""

    keys: tuple[str, ...]
    """Of its samples."""
    loss_sum: float
    trained_tokens: int


class StepMetrics:
    """Sums of the running optimizer step on this rank, by source."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.reset()

    def reset(self) -> None:
        """Begin a step."""
        self.tokens = torch.zeros(len(self.names))
        self.trained_tokens = torch.zeros(len(self.names))
        self.loss_sums = torch.zeros(len(self.names))
        self.dirty_samples = 0
        self.has_images = False
        self.keys: list[tuple[str, ...]] = []
        """The samples of each micro-batch."""
        self.packs: list[PackLoss] = []

    def add(self, batch: Batch, losses_P: Tensor, sources_P: Tensor) -> None:
        """Count a micro-batch."""
        num = len(self.names)
        self.keys.append(batch.keys)
        self._add_packs(batch, losses_P)
        sources_T, is_real_P = batch.source_ids_T, sources_P != NO_SOURCE
        self.has_images |= bool((batch.image_ids_T[sources_T != NO_SOURCE] >= 0).any())
        sources_P, losses_P = sources_P[is_real_P], losses_P[is_real_P]
        self.tokens += torch.bincount(sources_T[sources_T != NO_SOURCE], minlength=num).cpu()
        self.trained_tokens += torch.bincount(sources_P, minlength=num).cpu()
        self.dirty_samples += len(batch.dirty)
        self.loss_sums += torch.bincount(sources_P, weights=losses_P, minlength=num).cpu()

    def _add_packs(self, batch: Batch, losses_P: Tensor) -> None:
        """The dummy of a batch comes after its packs."""
        num = len(batch.packs)
        ends = torch.tensor(batch.pack_ends, device=losses_P.device)
        packs_P = torch.bucketize(trained_positions(batch.labels_T) + 1, ends, right=True)
        sums = torch.bincount(packs_P, weights=losses_P, minlength=num)[:num].tolist()
        counts = torch.bincount(packs_P, minlength=num)[:num].tolist()
        self.packs += map(PackLoss, batch.packs, sums, counts)

    def line(self) -> dict[str, Any]:
        """The step's part of a line of metrics.jsonl: of all ranks, each of which asks for it."""
        sums = torch.cat(
            [self.loss_sums, self.tokens, self.trained_tokens, torch.tensor([float(self.dirty_samples)])]
        ).double()
        sums = summed(sums)
        loss_sums, all_tokens, all_trained_tokens = sums[:-1].view(3, -1)
        sources = {
            name: {
                "loss": float(loss / trained) if trained else None,
                "tokens": int(tokens),
                "trained_tokens": int(trained),
            }
            for name, loss, tokens, trained in zip(self.names, loss_sums, all_tokens, all_trained_tokens, strict=True)
        }
        total = all_trained_tokens.sum()
        return {
            "loss": float(loss_sums.sum() / total.clamp(min=1)),  # none are left where every sample is dirty
            "tokens": int(all_tokens.sum()),
            "trained_tokens": int(total),
            "dirty_samples": int(sums[-1]),
            "sources": sources,
        }


def append_line(file: Path, line: dict[str, Any]) -> None:
    """Add a line, whose numbers are finite, to a file.

    Raises:
        RunError: the disk is full.
    """
    with disk_full_told(file), file.open("a", encoding="utf-8") as opened:
        opened.write(json.dumps(line, allow_nan=False) + "\n")


def lines_upto(file: Path, step: int) -> list[str]:
    """The lines of a file, without those of later steps and one that a kill left unfinished."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]


def finite(value: Any) -> Any:
    """A line of metrics with null in place of what is not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def peak_memory_bytes() -> int:
    """Largest memory so far: of the GPU, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
