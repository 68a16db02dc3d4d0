"""The recipe that `idefics-sft new` writes for data of one's own: one source, commented, valid as it stands."""

from __future__ import annotations

import json
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sft.data.recognise import Recognised

CHARACTERS_PER_TOKEN = 3.5
"""English text under LLaMA's vocabulary has about 4 characters a token; a little less leaves room."""
TOKENS_PER_MESSAGE = 8
"""The words of the chat template about a message."""
TOKENS_PER_IMAGE = 3
"""An image and its markers in the text of IDEFICS-1."""

SAMPLES_PER_STEP = 16
"""A usual batch of fine-tuning."""
MIN_STEPS = 60
"""Adapters learn little in fewer steps, so small data are repeated, up to MAX_EPOCHS times."""
USUAL_EPOCHS, MAX_EPOCHS = 3, 15
PACK_TOKENS = (256, 512, 1024, 2048)


class _Mode(NamedTuple):
    learning_rate: str
    training: tuple[str, ...]


MODES = {
    "qlora": _Mode("2.0e-4", ("optimizer: paged_adamw_8bit", "gradient_checkpointing: true")),
    "lora": _Mode("2.0e-4", ("gradient_checkpointing: true",)),
    "full": _Mode("1.0e-5", ("gradient_checkpointing: true",)),
}
"""The usual peak of adapters, and that of the idefics-9b-instruct card for all weights."""


class Sizes(NamedTuple):
    """How long training is, by the size of the data."""

    sequence_length: int
    tokens_per_step: int
    epochs: int
    steps: int


def sizes_for(found: Recognised) -> Sizes:
    """Return packs that hold the longest sample, steps of about SAMPLES_PER_STEP samples, and as many epochs as it
    takes to make MIN_STEPS steps, between the usual number and MAX_EPOCHS."""
    tokens = [_num_tokens(sample) for sample in found.samples]
    length = next((length for length in PACK_TOKENS if length >= max(tokens) * 1.2), PACK_TOKENS[-1])
    mean = sum(min(number, length) for number in tokens) / len(tokens)
    step = max(round(SAMPLES_PER_STEP * mean / length), 1) * length
    steps_per_epoch = found.estimated_samples * mean / step
    epochs = min(max(ceil(MIN_STEPS / steps_per_epoch), USUAL_EPOCHS), MAX_EPOCHS)
    return Sizes(length, step, epochs, max(ceil(steps_per_epoch * epochs), 1))


def _num_tokens(sample: Any) -> int:
    """Return about how many tokens a sample has, without a tokenizer."""
    characters = sum(len(item) for message in sample.messages for item in message.content if isinstance(item, str))
    parts = TOKENS_PER_MESSAGE * len(sample.messages) + TOKENS_PER_IMAGE * len(sample.images)
    return ceil(characters / CHARACTERS_PER_TOKEN) + parts


def recipe_text(found: Recognised, *, file: Path, model: str, mode: str) -> str:
    """Return the recipe for the data found, which is to be written to `file`."""
    sizes = sizes_for(found)
    dataset = {"dataset": found.dataset, "path": str(found.path)}
    lines = "".join(f"# {line}\n" for line in found.describe())
    training = "".join(f"  {line}\n" for line in MODES[mode].training)
    return f"""\
# yaml-language-server: $schema=recipe.schema.json
# Your own data.
{lines}#
#   idefics-sft validate {file}
#   idefics-sft mix {file}          how full packs are, how many steps and epochs
#   idefics-sft inspect {file} --html pack.html
#   idefics-sft train {file}
model: {{path: {json.dumps(model)}, mode: {mode}}}
data:
  mixture:
    - {{name: mine, share: 100, datasets: [{_flow(dataset)}]}}
    # Replay keeps what the model could do before. To switch it on, set `share: 70` above, download the data as
    # docs/data.md#ultrachat says, and take the # away:
    # - {{name: talk, share: 30, datasets: [{{dataset: ultrachat, path: raw/ultrachat_200k}}]}}
  sequence_length: {sizes.sequence_length}               # a pack; longer conversations keep their first turns
  validation: {{share: {_held_out(found):g}}}           # held out of training, for the held-out loss and sample answers
training:
  epochs: {sizes.epochs}                          # passes over your data: about {sizes.steps:,} steps
  tokens_per_step: {sizes.tokens_per_step}              # about {SAMPLES_PER_STEP} samples
  learning_rate: {MODES[mode].learning_rate}
{training}checkpoints: {{every_steps: {max(sizes.steps // 4, 1)}}}
output_dir: runs/{file.stem}
"""


def _held_out(found: Recognised) -> float:
    """Return the share to hold out: a tenth of small data, about 100 samples of large ones."""
    return max(min(0.1, 100 / found.estimated_samples), 0.01)


def _flow(value: dict[str, Any]) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True).strip()


def default_name(path: Path) -> str:
    """Return a name for the recipe: that of the folder or file, in letters that no shell minds."""
    stem = path.resolve().name.partition(".")[0]
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in stem).strip("-") or "mine"
