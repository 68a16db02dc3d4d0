"""What benches of whole runs train on: a model of idefics-9b's proportions, and conversations about photographs."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_mmbench import build_model
from bench_pixels import jpegs

from sft.core.shipped import resolve
from sft.models.idefics.text import END_OF_UTTERANCE, load_tokenizer
from sft.models.idefics.weights import weights
from sft.recipe import Recipe

WORDS = ("dog", "cat", "red", "blue", "circle", "square", "is", "on", "near", "what", "which", "color", "shape", "how")


def write_model(folder: Path, hidden: int) -> None:
    """A random IDEFICS of idefics-9b's proportions, 224-pixel images, 64 latents; the vocabulary is the quickstart's,
    so that the head is small."""
    tokenizer = load_tokenizer(resolve("shipped:tiny_base"))
    tokenizer.add_tokens([END_OF_UTTERANCE], special_tokens=True)
    weights.save_model(build_model(hidden, tokenizer.vocab_size), folder, torch.float32)
    tokenizer.save_pretrained(folder)


def write_conversations(folder: Path, number: int, *, words: int, images: int, per_image: int = 1) -> None:
    """`number` questions of about `words` words in all with their answers, the first of them with an image each that
    `per_image` samples share; JPEGs of 640 x 480, 100 KB."""
    folder.mkdir(parents=True)
    for index, content in enumerate(jpegs("photo", (640, 480), images)):
        (folder / f"{index}.jpg").write_bytes(content)
    rng = np.random.default_rng(0)
    with (folder / "train.jsonl").open("w") as file:
        for index in range(number):
            text = " ".join(rng.choice(WORDS, words))
            image = index // per_image
            mark = "<image>" if image < images else ""
            turns = [("user", f"{mark}{text[: len(text) // 2]}?"), ("assistant", text[len(text) // 2 :])]
            record: dict[str, Any] = {"messages": [{"role": role, "content": content} for role, content in turns]}
            file.write(json.dumps(record | ({"images": [f"{image}.jpg"]} if mark else {})) + "\n")


def recipe_of(folder: Path, name: str, conversations: Path, **changes: dict[str, Any]) -> Recipe:
    """A recipe on one dataset of conversations; `changes` are parts of it."""
    source = {"name": "talk", "share": 1, "datasets": [{"dataset": "messages", "path": str(conversations)}]}
    parts: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder / "model")},
        "data": {"store": str(folder / "stores"), "sequence_length": 1024, "mixture": [source]},
        "training": {"max_steps": 8, "tokens_per_step": 1024, "learning_rate": 1e-4},
    }
    parts = {key: parts.get(key, {}) | changes.get(key, {}) for key in parts | changes}
    return Recipe.model_validate(parts | {"output_dir": str(folder / name)})


def silently(call: Callable[[], Any]) -> Any:
    """What a call returns; what libraries print goes nowhere."""
    with open("/dev/null", "w") as nowhere, redirect_stdout(nowhere):
        return call()
