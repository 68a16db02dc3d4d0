"""Instruction fine-tuning for IDEFICS vision-language models.

import sft
model = sft.load("runs/quickstart")
model.chat("What is in this image?", images=["dog.jpg"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch and transformers are loaded when a model is
    from pathlib import Path

    from sft.inference.api import Model

__all__ = ["load"]


def load(model: str | Path, *, load_in_4bit: bool = False, precision: str = "auto") -> Model:
    """Load a model to ask: a folder, a run, `RUN@STEP`, a hub id or `shipped:tiny_base`. See
    `sft.inference.api.load`."""
    from sft.inference.api import load

    return load(model, load_in_4bit=load_in_4bit, precision=precision)
