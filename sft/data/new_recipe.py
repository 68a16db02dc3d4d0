"""The recipe that `idefics-sft new` writes for data of one's own: one source, commented, valid as it stands."""

import json
from math import ceil
from pathlib import Path
from typing import NamedTuple

import yaml

from sft.core.sample import Sample
from sft.core.shipped import is_local, resolve
from sft.data.recognise import Recognised
from sft.recipe import ModelConfig
from sft.recipe.model import INLINE_FAMILIES, INLINE_LENGTH

CHARACTERS_PER_TOKEN = 3.5
"""English text under LLaMA's vocabulary has about 4 characters a token; a little less leaves room."""
TOKENS_PER_MESSAGE = 8  # the words of the chat template about a message
TOKENS_PER_IMAGE = {False: 3, True: 1_150}
"""An image and its markers in the text: of IDEFICS-1, and of a family whose images are part of the text, where it is
most for a square image of SmolVLM-256M (docs/models.md)."""

SAMPLES_PER_STEP = 16  # a usual batch of fine-tuning; small data have smaller ones
MIN_STEPS = 60  # adapters learn little in fewer steps, so small data are repeated, up to MAX_EPOCHS times
USUAL_EPOCHS, MAX_EPOCHS = 3, 15
PACK_TOKENS = {False: (256, 512, 1024, 2048), True: (INLINE_LENGTH,)}
"""Lengths of packs to choose from, without and with images in the text."""

SMALL_MODEL_BYTES = 100_000_000
LEARNING_RATES = {"full": ("1.0e-5", "1.0e-3"), "lora": ("2.0e-4", "2.0e-3"), "qlora": ("2.0e-4", "2.0e-3")}
"""The usual peak by mode, for large models and for those of up to SMALL_MODEL_BYTES. All weights: that of the
idefics-9b-instruct card, and about that of the quickstart; adapters take more."""


class Sizes(NamedTuple):
    """How long training is, by the size of the data."""

    sequence_length: int
    samples_per_step: int
    tokens_per_step: int
    epochs: int
    steps: int


def sizes_for(found: Recognised, family: str) -> Sizes:
    """Return packs that hold the longest sample, steps of up to SAMPLES_PER_STEP samples, and as many epochs as it
    takes to make MIN_STEPS steps, between the usual number and MAX_EPOCHS."""
    is_inline = family in INLINE_FAMILIES
    tokens = [_num_tokens(sample, TOKENS_PER_IMAGE[is_inline]) for sample in found.samples]
    lengths = PACK_TOKENS[is_inline]
    length = next((length for length in lengths if length >= max(tokens) * 1.2), lengths[-1])
    mean = sum(min(number, length) for number in tokens) / len(tokens)
    samples = min(max(found.estimated_samples * MAX_EPOCHS // MIN_STEPS, 1), SAMPLES_PER_STEP)
    packs = max(round(samples * mean / length), 1)
    steps_per_epoch = found.estimated_samples * mean / (packs * length)
    epochs = min(max(ceil(MIN_STEPS / steps_per_epoch), USUAL_EPOCHS), MAX_EPOCHS)
    steps = max(ceil(steps_per_epoch * epochs), 1)
    return Sizes(length, max(round(packs * length / mean), 1), packs * length, epochs, steps)


def _num_tokens(sample: Sample, per_image: int) -> int:
    """Return about how many tokens a sample has, without a tokenizer."""
    characters = sum(len(item) for message in sample.messages for item in message.content if isinstance(item, str))
    parts = TOKENS_PER_MESSAGE * len(sample.messages) + per_image * len(sample.images)
    return ceil(characters / CHARACTERS_PER_TOKEN) + parts


def recipe_text(found: Recognised, *, file: Path, model: str, mode: str) -> str:
    """Return the recipe for the data found, which is to be written to `file`."""
    family = family_of(model)
    sizes = sizes_for(found, family)
    dataset = {"dataset": found.dataset, "path": str(found.path), "options": dict(found.options)}
    dataset = {key: value for key, value in dataset.items() if value}
    flow = yaml.safe_dump(dataset, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True)
    lines = "".join(f"# {line}\n" for line in found.describe())
    held_out = max(min(0.1, round(100 / found.estimated_samples, 3)), 0.01)  # of large data about 100 samples
    optimizer = "\n  optimizer: paged_adamw_8bit" if mode == "qlora" else ""
    return f"""\
# yaml-language-server: $schema=recipe.schema.json
# Your own data.
{lines}#
#   idefics-sft mix {file}         # after `prepare`: how full packs are, epochs and steps
#   idefics-sft inspect {file} --html pack.html
#   idefics-sft plan {file}        # memory and time
#   idefics-sft train {file}
model: {{path: {json.dumps(model)}, family: {family}, mode: {mode}}}
data:
  mixture:
    - name: mine
      share: 100
      datasets: [{flow.strip()}]
    # Replay keeps what the model could do before. To switch it on, set `share: 70` above, download the data as
    # docs/data.md#ultrachat says, and remove the # here:
    # - {{name: talk, share: 30, datasets: [{{dataset: ultrachat, path: raw/ultrachat_200k}}]}}
  {_commented(f"sequence_length: {sizes.sequence_length}", "tokens of a pack; longer ones keep their first turns")}
  {_commented(f"validation: {{share: {held_out:g}}}", "held out: for the held-out loss and sample answers")}
training:
  {_commented(f"epochs: {sizes.epochs}", f"passes over your data: about {sizes.steps:,} steps")}
  {_commented(f"tokens_per_step: {sizes.tokens_per_step}", f"about {sizes.samples_per_step} samples")}
  learning_rate: {LEARNING_RATES[mode][_is_small(model)]}{optimizer}
  {_commented("gradient_checkpointing: true", "less memory, a third more work")}
checkpoints: {{every_steps: {max(sizes.steps // 4, 1)}}}
output_dir: runs/{file.stem}
"""


def _commented(setting: str, comment: str) -> str:
    return f"{setting:33} # {comment}"


def family_of(model: str) -> str:
    """Return the family of a base model: by the config.json of a folder, by the name of a hub id."""
    named = model.lower()
    if is_local(model) and (config := resolve(model) / "config.json").is_file():
        named = str(json.loads(config.read_text(encoding="utf-8")).get("model_type"))
    usual = str(ModelConfig.model_fields["family"].default)
    return next((family for family in INLINE_FAMILIES if family in named), usual)


def _is_small(model: str) -> bool:
    """Return whether a model is here and small, as the shipped ones are."""
    files = resolve(model).glob("*.safetensors") if is_local(model) else ()
    return 0 < sum(file.stat().st_size for file in files) <= SMALL_MODEL_BYTES


def default_name(path: Path) -> str:
    """Return a name for the recipe: that of the folder or file, in letters that need no quotes in a shell."""
    stem = path.resolve().name.partition(".")[0]
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in stem).strip("-") or "mine"
