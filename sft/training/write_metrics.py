"""The callback that writes metrics.jsonl, and reports steps whose loss jumps or is not finite."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from sft.core.distributed import all_gather, any_process
from sft.core.errors import RunError
from sft.core.files import write_atomically
from sft.training.loss_spikes import WINDOW, Spike, Spikes
from sft.training.metrics import (
    BEFORE,
    METRICS,
    NONFINITE,
    SPIKES,
    Line,
    PackLoss,
    append_line,
    finite,
    lines_up_to,
    peak_memory_bytes,
)

if TYPE_CHECKING:
    from sft.training.trainer import Trainer

MAX_NONFINITE_STEPS = 3
"""Steps in a row whose loss or gradient is not finite, with which a run ends. Each changes nothing."""
WORST_PACKS, NAMED_SAMPLES = 4, 5
"""Packs of a step that spikes.jsonl lists, and samples of the first of them that are named."""


class WriteMetrics(TrainerCallback):  # type: ignore[misc]
    """Writes a line of metrics.jsonl for each step, reports losses that jump with their packs, and ends the run when
    too many steps in a row are not finite."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.file = trainer.parts.run_dir / METRICS
        self.spikes = Spikes(trainer.step_metrics.names)
        self.last_was_spike = False
        self.last = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Cut the lines of steps that come again, learn the usual losses from the last of the others, validate before
        the first step, and start the clock."""
        kept = lines_up_to(self.file, state.global_step)
        for line in kept[-WINDOW - 1 :]:
            self.last_was_spike = self.spikes.add(json.loads(line)) is not None
        if self.trainer.rank.is_main:
            write_atomically(self.file, "".join(kept))
            for file in map(self.file.with_name, (NONFINITE, SPIKES)):
                if file.is_file():
                    write_atomically(file, "".join(lines_up_to(file, state.global_step)))
        parts = self.trainer.parts
        before = parts.validate(self.trainer.model, 0) if parts.resume_from is None else {}
        if before and self.trainer.rank.is_main:
            write_atomically(self.file.with_name(BEFORE), json.dumps(finite(before), allow_nan=False) + "\n")
        self.last = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Write the step that just ended; raise RunError where it is the last of too many that are not finite."""
        if logs is None or "grad_norm" not in logs:
            return
        now = time.perf_counter()
        metrics = self.trainer.step_metrics
        line = {"step": state.global_step, "time": time.time()} | metrics.line()
        line |= {
            "learning_rate": logs["learning_rate"],
            "grad_norm": None if self.trainer.overflowed else float(logs["grad_norm"]),
            "tokens_per_second": line["tokens"] / (now - self.last),
            "data_wait": min(metrics.waited / (now - self.last), 1.0),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        keys, packs = metrics.keys, metrics.packs
        metrics.reset()
        line |= self.trainer.parts.validate(self.trainer.model, state.global_step)
        self.last = time.perf_counter()
        if self.trainer.rank.is_main:
            append_line(self.file, finite(line))
        if self.trainer.nonfinite_steps:
            self._list_nonfinite(line, keys)
        self._report_spike(line, packs)
        self.trainer.parts.on_step(state.global_step, finite(line))

    def _report_spike(self, line: Line, packs: list[PackLoss]) -> None:
        """List the packs of a spike. Every process sees the same loss, and has packs of its own."""
        spike, is_first = self.spikes.add(line), not self.last_was_spike
        self.last_was_spike = any_process(spike is not None)
        if not self.last_was_spike:
            return
        number = self.trainer.rank.number
        found = all_gather([(pack, number) for pack in packs])
        if not self.trainer.rank.is_main or spike is None:
            return
        found.sort(key=lambda pair: spike.expected * pair[0].trained_tokens - pair[0].loss_sum)
        worst = []
        for pack, of in found[:WORST_PACKS]:
            loss = pack.loss_sum / max(pack.trained_tokens, 1)
            worst.append({"rank": of, "loss": loss, "trained_tokens": pack.trained_tokens, "samples": pack.keys})
        append_line(self.file.with_name(SPIKES), {"step": line["step"], **spike._asdict(), "packs": worst})
        if is_first:  # of steps in a row, the others are in the file alone
            self.trainer.parts.log(_describe_spike(line["step"], spike, worst))

    def _list_nonfinite(self, line: Line, keys: list[tuple[str, ...]]) -> None:
        file = self.file.with_name(NONFINITE)
        found = {name: str(line[name]) for name in ("loss", "grad_norm")}
        append_line(file, {"step": line["step"], "rank": self.trainer.rank.number, **found, "micro_batches": keys})
        in_a_row = self.trainer.nonfinite_steps
        if in_a_row >= MAX_NONFINITE_STEPS:
            raise RunError(
                f"step {line['step']}: loss {found['loss']}, gradient norm {found['grad_norm']}: not finite, as in "
                f"{in_a_row} steps in a row; {file} lists their samples"
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restart the clock: writing and evaluating a checkpoint are no part of the next step's speed."""
        self.last = time.perf_counter()


def _describe_spike(step: int, spike: Spike, worst: list[Line]) -> str:
    """Describe a spike on one line."""
    keys = worst[0]["samples"]
    samples = ", ".join(keys[:NAMED_SAMPLES]) + f" and {len(keys) - NAMED_SAMPLES} more" * (len(keys) > NAMED_SAMPLES)
    usual = f"{spike.expected:.3f} ± {spike.spread:.3f} is usual"
    pack = f"a pack with loss {worst[0]['loss']:.3f}: {samples} ({SPIKES} lists more)"
    return f"step {step}: loss {spike.loss:.3f}, where {usual}; first of all by {pack}"
