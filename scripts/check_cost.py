#!/usr/bin/env python3
"""Compares the formula of `idefics-sft plan` with the real model, run under fake tensors. No GPU, no weights.

scripts/check_cost.py [--json] [--only "9b qlora"]

Each line is one training step of the released shapes: what torch's MemTracker sees at the peak and FlopCounterMode
counts for the fullest micro-batch, and what the formula gives. The exit status is 1 when one is more than 10 % off.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from fake_step import run_fake_step
from transformers import IdeficsConfig

from sft.cli.terminal import console, table
from sft.cost.devices import GIB
from sft.cost.family import Setting
from sft.cost.idefics.cost import read_model, trained_config
from sft.cost.idefics.shapes import LAYER_GROUPS

TOLERANCE = 0.10
PACK = {"tokens": 2048, "images": 24, "trained_tokens": 2047}
AGAIN: dict[str, Any] = {"checkpointing": 1.0}
LAYERS_OF = read_model("HuggingFaceM4/idefics-9b").lora_layers
TEXT_SIDE: dict[str, Any] = {"lora_layers": LAYERS_OF(("language", "cross_attention"))}
EVERYWHERE: dict[str, Any] = {"lora_layers": LAYERS_OF(LAYER_GROUPS)}
BESIDE: dict[str, Any] = {"trainable": ("gates", "resampler", "extra_rows")}

CONFIGURATIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("9b", "full", {}),
    ("9b", "full, checkpointing", AGAIN),
    ("9b", "full, checkpointing, one micro-batch a step", AGAIN | {"accumulates": False}),
    ("9b", "full, checkpointing, 8-bit optimizer", AGAIN | {"optimizer": "adamw_8bit"}),
    ("9b", "only cross-attention, gates and resampler", {"trainable": ("cross_attention", "gates", "resampler")}),
    ("9b", "lora", {"mode": "lora"} | TEXT_SIDE),
    ("9b", "lora, checkpointing", {"mode": "lora"} | TEXT_SIDE | AGAIN),
    ("9b", "lora everywhere, r = 64, checkpointing", {"mode": "lora", "lora_rank": 64} | EVERYWHERE | AGAIN),
    ("9b", "qlora", {"mode": "qlora"} | TEXT_SIDE),
    ("9b", "qlora, checkpointing", {"mode": "qlora"} | TEXT_SIDE | AGAIN),
    ("9b", "qlora, gates and resampler trained, checkpointing", {"mode": "qlora"} | TEXT_SIDE | BESIDE | AGAIN),
    ("9b", "full, checkpointing of a half", {"checkpointing": 0.5}),
    ("9b", "qlora, checkpointing of three quarters", {"mode": "qlora", "checkpointing": 0.75} | TEXT_SIDE),
    ("9b", "qlora, checkpointing, feature cache", {"mode": "qlora", "encoded": True} | TEXT_SIDE | AGAIN),
    (
        "9b",
        "qlora, 512 tokens, 2 images",
        {"mode": "qlora", "tokens": 512, "trained_tokens": 511, "images": 2} | TEXT_SIDE,
    ),
    ("80b", "full, checkpointing", AGAIN),
    ("80b", "lora", {"mode": "lora"} | TEXT_SIDE),
    ("80b", "qlora, checkpointing", {"mode": "qlora"} | TEXT_SIDE | AGAIN),
)


def compare(size: str, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of the formula and of the real model for one configuration."""
    setting = Setting(**PACK | changes)
    path = f"HuggingFaceM4/idefics-{size}"
    began = time.monotonic()
    measured = run_fake_step(IdeficsConfig.from_dict(trained_config(path)), setting)
    quick = read_model(path).cost(setting)
    return {
        "configuration": f"{size} {name}",
        "peak_bytes": quick.peak_bytes,
        "measured_peak_bytes": measured.peak_bytes,
        "flop": quick.flop,
        "measured_flop": measured.flop,
        "ratios": {"peak": quick.peak_bytes / measured.peak_bytes, "flop": quick.flop / measured.flop},
        "seconds": time.monotonic() - began,
    }


def main() -> None:
    """Compare all configurations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="", help="configurations whose name holds this: 80b, qlora, …")
    arguments = parser.parse_args()
    results = []
    for size, name, changes in CONFIGURATIONS:
        if arguments.only in f"{size} {name}":
            results.append(compare(size, name, changes))
            print(f"{size} {name}: {results[-1]['seconds']:.0f} s", file=sys.stderr)
    if not results:
        parser.error(f"--only {arguments.only}: no configuration is called so")
    worst = max(abs(ratio - 1) for result in results for ratio in result["ratios"].values())
    if arguments.json:
        print(json.dumps({"ratios": {"worst": worst}, "configurations": results}))
    else:
        header = ("", "GiB", "measured", "ratio", "TFLOP", "measured", "ratio")
        console().print(table("2,048 tokens and 24 images a micro-batch", header, list(map(_row, results))))
        print(f"largest difference: {worst:.1%}")
    sys.exit(int(worst > TOLERANCE))


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    memory = (f"{result[key] / GIB:,.1f}" for key in ("peak_bytes", "measured_peak_bytes"))
    work = (f"{result[key] / 1e12:,.1f}" for key in ("flop", "measured_flop"))
    ratios = result["ratios"]
    return (result["configuration"], *memory, f"{ratios['peak']:.3f}", *work, f"{ratios['flop']:.3f}")


if __name__ == "__main__":
    main()
