"""The metrics of an optimizer step, and the files of a run that keep them, a line of JSON for each step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sft.core.distributed import all_reduce_sum
from sft.core.files import explain_full_disk, text_lines
from sft.core.sample import IGNORE_INDEX, NO_SOURCE, Batch

METRICS, BEFORE, NONFINITE, SPIKES = "metrics.jsonl", "before.json", "nonfinite.jsonl", "spikes.jsonl"


Log = Callable[[str], None]
"""Gets a line that a person should read."""
Line = dict[str, Any]
"""A line of metrics.jsonl."""


class PackLoss(NamedTuple):
    """The loss of one pack of a step."""

    keys: tuple[str, ...]
    """Keys of its samples."""
    loss_sum: float
    trained_tokens: int


class StepMetrics:
    """Sums of the running optimizer step on this rank, by source. They stay on the device until they are read, so that
    counting a micro-batch waits for nothing.

    Shape letters: S sources, and one more row for tokens that belong to none; P trained positions; K packs.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.reset()

    def reset(self) -> None:
        """Begin a step."""
        self.dirty_samples = 0
        self.waited = 0.0  # seconds in which this process waited for batches, or made them
        self.keys: list[tuple[str, ...]] = []  # of the samples of each micro-batch
        # Sums of losses, tokens and trained tokens.
        self._sums_S3 = torch.zeros(len(self.names) + 1, 3, dtype=torch.float64)
        self._looking = torch.zeros((), dtype=torch.long)
        self._packs: list[tuple[tuple[tuple[str, ...], ...], Tensor]] = []

    def add(self, batch: Batch, losses_P: Tensor, sources_P: Tensor) -> None:
        """Count a micro-batch."""
        self._sums_S3, self._looking = self._sums_S3.to(losses_P.device), self._looking.to(losses_P.device)
        self.keys.append(batch.keys)
        self.dirty_samples += len(batch.dirty)
        sources_T = batch.source_ids_T.to(losses_P.device)
        found_P3 = torch.stack([losses_P.double(), torch.zeros_like(losses_P), torch.ones_like(losses_P)], dim=1)
        self._sums_S3.index_add_(0, self._row(sources_P), found_P3)
        self._sums_S3[:, 1].index_add_(0, self._row(sources_T), torch.ones_like(sources_T, dtype=torch.float64))
        self._looking += ((batch.image_ids_T.to(losses_P.device) >= 0) & (sources_T != NO_SOURCE)).sum()
        self._packs.append((batch.packs, self._packs_of(batch, losses_P)))

    def _row(self, sources: Tensor) -> Tensor:
        return torch.where(sources == NO_SOURCE, len(self.names), sources)

    def _packs_of(self, batch: Batch, losses_P: Tensor) -> Tensor:
        """Return loss and trained tokens of each pack, and of the dummy that comes after the packs of a batch."""
        trained_T = (batch.labels_T.to(losses_P.device) != IGNORE_INDEX).cumsum(0)
        ends = torch.tensor(batch.pack_ends, dtype=torch.long, device=losses_P.device)
        upto = trained_T[ends - 1] * (ends > 0)  # nothing is trained before a pack that holds nothing
        packs_P = torch.bucketize(torch.arange(len(losses_P), device=losses_P.device), upto, right=True)
        found_K2 = torch.zeros(len(batch.packs) + 1, 2, dtype=torch.float64, device=losses_P.device)
        return found_K2.index_add_(0, packs_P, torch.stack([losses_P.double(), torch.ones_like(losses_P)], dim=1))

    @property
    def has_images(self) -> bool:
        """Whether a token of this rank attends to an image."""
        return bool(self._looking)

    @property
    def has_finite_loss(self) -> bool:
        """Whether the loss of this rank is finite."""
        return math.isfinite(float(self._sums_S3[:-1, 0].sum()))

    @property
    def packs(self) -> list[PackLoss]:
        """The losses of the packs of this rank."""
        return [
            PackLoss(keys, loss, int(trained))
            for packs, found_K2 in self._packs
            for keys, (loss, trained) in zip(packs, found_K2.tolist(), strict=False)  # the last row is the dummy's
        ]

    def line(self) -> Line:
        """Return the step's part of a line of metrics.jsonl, summed over all ranks. All ranks call it."""
        dirty = torch.tensor([float(self.dirty_samples)], dtype=torch.float64)
        sums = all_reduce_sum(torch.cat([self._sums_S3[:-1].flatten().cpu(), dirty]))
        by_source = sums[:-1].view(-1, 3)
        loss_sum, tokens, trained_tokens = by_source.sum(0).tolist()
        sources = {
            name: {"loss": loss / trained if trained else None, "tokens": int(tokens), "trained_tokens": int(trained)}
            for name, (loss, tokens, trained) in zip(self.names, by_source.tolist(), strict=True)
        }
        return {
            "loss": loss_sum / max(trained_tokens, 1),  # none are left where every sample is dirty
            "tokens": int(tokens),
            "trained_tokens": int(trained_tokens),
            "dirty_samples": int(sums[-1]),
            "sources": sources,
        }


def append_line(file: Path, line: Line) -> None:
    """Append a line, whose numbers are finite, to a file; raise RunError where the disk is full."""
    with explain_full_disk(file), file.open("a", encoding="utf-8") as opened:
        opened.write(json.dumps(line, allow_nan=False) + "\n")


def lines_up_to(file: Path, step: int) -> list[str]:
    """Return the lines of a file without those of later steps, and without one that a kill left unfinished."""
    lines = text_lines(file) if file.is_file() else ()
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]


def finite(value: Any) -> Any:
    """Return a line of metrics with None in place of numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def peak_memory_bytes() -> int:
    """Return the largest memory so far, of the GPU or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
