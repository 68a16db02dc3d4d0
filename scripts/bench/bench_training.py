#!/usr/bin/env python3
"""How fast a training step is beside what a user would write without this toolkit, at the same losses.

    scripts/bench/bench_training.py [--json] [--rounds 2] [--samples 16] [--quick]

A random IDEFICS of about 60 M parameters with the proportions of idefics-9b (an image costs as many text tokens as
there) and LLaMA's 32,000 words; 224-pixel images, 64 latents; one thread. Two workloads with the lengths that
`sft.batches.declared_sizes` has for the card's mixture, 45 % of the samples text dialogues: one round of UltraChat, a
quarter of a dialogue (3.8 rounds and 1,467 tokens on average: Ding and others, 2023); the others are SVIT's and
LLaVA's.

    mixture    four samples share an image            unshared   every sample has an image of its own

    notebook       the official notebook, repaired: `IdeficsProcessor(text=...)` pads on the left to the longest,
                   transformers' forward, own loss, all logits; at its batch size of 2 and at the best of 1, 2, 4, 8
    naive_packing  the same packs as ours under a dense 4-D mask, an encode per image shown, all logits
    ours           `model(batch=...)`, packs of 1,024 tokens

A pass is forward and backward over all samples and one step of fused AdamW. Its learning rate is 0, which costs the
same and lets every side, in every round, have the same weights: the bench fails where the loss of a sample differs by
more than 1e-4 in float32. Inputs are made beforehand for all sides. Sides alternate; figures are medians of CPU
seconds.

    notebook_own_batch, notebook_best_batch, naive_packing   their CPU seconds / ours
    ceiling       the same if ours worked at 60 % (float32) or 30 % (bfloat16) of the machine's peak
    utilisation   FLOP of ours / CPU seconds / the peak, which is the fastest large matrix product seen in this run
    memory        peak of ours / the notebook's at its own batch size, each in a process of its own, less what was there
                  after loading: weights, gradients and optimizer states, which all sides have
    short_samples CPU seconds of a pack of 100 samples of 20 tokens / of one of 2,000, forward and backward

FLOP are those of matrix products without recompute, attention by formula: the pairs that a side's masks or segments
leave to be computed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from bench_mmbench import build_model
from measuring import cpu_medians, forget_peak, peak_bytes, print_figures
from torch import Tensor
from training_sides import (
    VOCABULARY,
    Side,
    Work,
    as_batch,
    make_samples,
    naive_packing,
    notebook,
    num_trained,
    ours,
    packed_losses,
    pixels_of,
    text_of,
)
from transformers import IdeficsForVisionText2Text

from sft.core.sample import PlacedSample
from sft.cost.idefics.shapes import Shape, shape_of
from sft.models.idefics.images import IdeficsImages
from sft.models.idefics.weights import weights

HIDDEN = 512
OWN_BATCH, BATCHES = 2, (1, 2, 4, 8)
WORKLOADS = {"mixture": 4, "unshared": 1}
"""With the number of samples that share an image."""

PRECISIONS = {"float32": 0.60, "bfloat16": 0.30}
"""With the share of the peak that is aimed at."""


class Models:
    """The two models, of the same weights, and an optimizer for each."""

    def __init__(self) -> None:
        self.packed = build_model(HIDDEN, VOCABULARY).train()
        config = type(self.packed.config).from_dict(self.packed.config.to_dict())
        self.plain = IdeficsForVisionText2Text(config).train()
        self.plain.load_state_dict(self.packed.state_dict(), assign=True)
        self.optimizers: dict[int, torch.optim.Optimizer] = {}

    def load(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Gradients and optimizer states in place."""
        if id(model) not in self.optimizers:
            weights.select_trainable(model)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            self.optimizers[id(model)] = torch.optim.AdamW(trained, lr=0.0, fused=True)
            self.optimizers[id(model)].step()
        return self.optimizers[id(model)]


def make_side(models: Models, name: str, samples: Sequence[PlacedSample]) -> Side:
    """`ours`, `naive_packing` or `notebook_<batch size>`."""
    if name == "ours":
        return ours(models.packed, samples)
    if name == "naive_packing":
        return naive_packing(models.plain, samples)
    return notebook(models.plain, samples, int(name.removeprefix("notebook_")))


def run_pass(side: Side, optimizer: torch.optim.Optimizer, precision: str, only: slice = slice(None)) -> Tensor:
    """Forward and backward over all micro-batches and a step; the loss of each sample."""
    found = torch.zeros(1000, dtype=torch.float64)
    for batch in side.micro_batches[only]:
        with torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext():
            loss, losses_P, sources_P = side.losses(side.model, batch)
        loss.backward()
        found += torch.bincount(sources_P, losses_P.double(), minlength=len(found))
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return found


def flop(shape: Shape, work: Work) -> float:
    """Forward and backward, matrix products alone: two for each weight and row, three times."""
    rows = {
        "tokens": work.tokens,
        "states": work.images * shape.states,
        "patches": work.images * shape.patches,
        "latents": work.images * shape.resampler_latents,
        "context": work.images * (shape.resampler_latents + shape.patches),
    }
    linears = sum(2 * rows[linear.rows] * linear.weights * linear.count for linear in shape.linears)
    head = 2 * work.positions * shape.embedding_parameters
    inner = shape.resampler_heads * shape.resampler_head
    attention = 4 * (
        work.pairs * shape.hidden * shape.layers
        + work.looks * shape.states * shape.hidden * shape.cross_layers
        + rows["patches"] * shape.patches * shape.vision_hidden * shape.vision_layers
        + rows["latents"] * (shape.resampler_latents + shape.patches) * inner * shape.resampler_layers
    )
    pixels = 2 * work.images * (shape.patches - 1) * shape.pixel_weights
    return 3.0 * (linears + head + attention) + 2.0 * pixels


def matmul_peak(precision: str) -> float:
    """FLOP per CPU second of the fastest of some large matrix products."""
    dtype = getattr(torch, precision)
    best = 0.0
    for m, k, n in ((1024, 1024, 1024), (2048, 512, 2048), (2048, 2048, 2048)):
        x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        for _ in range(3):
            started = time.process_time()
            for _ in range(4):
                F.linear(x, weight)
            best = max(best, 8 * m * k * n / (time.process_time() - started))
    return best


def compare(models: Models, workload: str, precision: str, number: int, rounds: int) -> dict[str, Any]:
    """All sides on a workload; see the top for what is returned.

    Raises:
        SystemExit: a sample has another loss on one side than on another.
    """
    samples = make_samples(number, WORKLOADS[workload])
    names = ["ours", "naive_packing", *(f"notebook_{size}" for size in BATCHES)]
    sides = {name: make_side(models, name, samples) for name in names}
    shape = shape_of(models.packed.config.to_dict())
    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, Tensor] = {}
    peak = 0.0
    for name in ("ours", "notebook_1"):  # warms caches up
        run_pass(sides[name], models.load(sides[name].model), precision, slice(0, 2))
    for turn in range(rounds):
        peak = max(peak, matmul_peak(precision))
        fastest = min(names[2:], key=lambda name: min(seconds[name], default=0))
        for name in names if not turn else dict.fromkeys(("ours", "naive_packing", f"notebook_{OWN_BATCH}", fastest)):
            optimizer = models.load(sides[name].model)
            started = time.process_time()
            losses[name] = run_pass(sides[name], optimizer, precision)
            seconds[name].append(time.process_time() - started)
            print(f"{precision} {workload} {name}: {seconds[name][-1]:.1f} CPU s", file=sys.stderr)
    peak = max(peak, matmul_peak(precision))
    is_sample = losses["ours"] > 0
    difference = max(
        float(((found - losses["ours"]).abs()[is_sample] / losses["ours"][is_sample]).max())
        for found in losses.values()
    )
    if precision == "float32" and difference > 1e-4:
        sys.exit(f"{workload}: the loss of a sample differs by {difference:.1e} between the sides")
    trained = num_trained(samples)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    flops = {name: sum(flop(shape, work) for work in sides[name].work) for name in names}
    best = min(names[2:], key=medians.__getitem__)
    rivals = {
        "notebook_own_batch": f"notebook_{OWN_BATCH}",
        "notebook_best_batch": best,
        "naive_packing": "naive_packing",
    }
    attainable = flops["ours"] / (PRECISIONS[precision] * peak)
    ratios: dict[str, Any] = {name: medians[side] / medians["ours"] for name, side in rivals.items()}
    ratios["ceiling"] = {name: medians[side] / attainable for name, side in rivals.items()}
    ratios["utilisation"] = flops["ours"] / medians["ours"] / peak
    return {
        "ratios": ratios,
        "best_batch": int(best.removeprefix("notebook_")),
        "loss_difference": difference,
        "peak_gflop_per_second": peak / 1e9,
        "trained_tokens": trained,
        "tokens": sum(len(sample.encoded.input_ids) for sample in samples),
        "sides": {
            name: {
                "trained_tokens_per_cpu_second": trained / medians[name],
                "tflop": flops[name] / 1e12,
                "utilisation": flops[name] / medians[name] / peak,
            }
            for name in names
        },
    }


def short_samples(models: Models, precision: str, rounds: int) -> float:
    """Cost of a token in a pack of 100 short samples, beside one in a pack of a long one."""

    def text(length: int, number: int) -> Side:
        members = [PlacedSample(text_of(i, length, 0.5, False), (), 0) for i in range(number)]
        return Side(models.packed, [as_batch(members, 1, pixels_of)], [], packed_losses)

    def once(side: Side) -> Callable[[], Any]:
        return lambda: run_pass(side, no_optimizer, precision)

    no_optimizer: Any = SimpleNamespace(step=lambda: None, zero_grad=lambda set_to_none: None)
    medians = cpu_medians({"short": once(text(20, 100)), "long": once(text(2000, 1))}, rounds)
    return medians["short"] / medians["long"]


def memory(name: str, workload: str, precision: str, number: int) -> int:
    """Bytes on top of what is there after loading, of the largest micro-batch; in a process of its own."""
    command = [sys.executable, __file__, "--memory", name, workload, precision, "--samples", str(number)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _memory(name: str, workload: str, precision: str, number: int) -> int:
    models = Models()
    side = make_side(models, name, make_samples(number, WORKLOADS[workload]))
    optimizer = models.load(side.model)
    largest = max(range(len(side.work)), key=lambda row: side.work[row].tokens + 300 * side.work[row].images)
    forget_peak()
    loaded = peak_bytes()
    for _ in range(2):
        run_pass(side, optimizer, precision, slice(largest, largest + 1))
    return peak_bytes() - loaded


def measure(number: int, rounds: int, precisions: Sequence[str]) -> dict[str, Any]:
    """All figures."""
    models = Models()
    parameters = sum(parameter.numel() for parameter in models.packed.parameters())
    figures: dict[str, Any] = {
        "ratios": {},
        "short_samples": {},
        "parameters": parameters,
        "image_cost_in_tokens": IdeficsImages(models.packed.config).cost_in_tokens,
    }
    for precision in precisions:
        figures[precision] = {}
        for workload in WORKLOADS:
            found = compare(models, workload, precision, number, rounds)
            for name in ("ours", f"notebook_{OWN_BATCH}"):
                found["sides"][name]["memory_bytes"] = memory(name, workload, precision, number)
            used = {name: side.get("memory_bytes") for name, side in found["sides"].items()}
            found["ratios"]["memory"] = used["ours"] / used[f"notebook_{OWN_BATCH}"]
            figures["ratios"].setdefault(precision, {})[workload] = found.pop("ratios")
            figures[precision][workload] = found
        figures["short_samples"][precision] = short_samples(models, precision, rounds)
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--precision", choices=PRECISIONS, action="append", help="only this one")
    parser.add_argument("--quick", action="store_true", help="8 samples, one round: to try it, not to quote it")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    number, rounds = (8, 1) if arguments.quick else (arguments.samples, arguments.rounds)
    if arguments.memory:
        print(_memory(*arguments.memory, number))
        return
    figures = measure(number, rounds, arguments.precision or list(PRECISIONS))
    if arguments.json:
        print(json.dumps(figures))
        return
    print_figures(figures)


if __name__ == "__main__":
    main()
