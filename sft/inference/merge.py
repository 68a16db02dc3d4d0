"""From a checkpoint to a model to hand on: a plain transformers folder with processor, chat template and model card.

Adapters are merged into their unquantised base (merging into 4 bits would round again), one weight at a time: the
memory that takes does not grow with the model (scripts/bench/bench_merge.py). The checkpoint of a full run is copied.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from torch import Tensor

from sft.batches.collate import collate
from sft.batches.image_source import NoiseImages
from sft.core.contain import on_error
from sft.core.errors import UserError
from sft.core.files import explain_full_disk, remove_leftovers, staged
from sft.core.sample import Batch, ImageRef, Message, PlacedSample
from sft.inference.model_card import Merged, model_card
from sft.models.family import Family
from sft.models.loaded_model import Loaded, find_base, find_family, load_for_inference, load_template
from sft.models.lora import Merger, is_adapter_folder
from sft.models.plain_folder import save_processor
from sft.recipe import load_recipe
from sft.runs.checkpoint import MANIFEST

SHARD_BYTES = 5 * 1024**3
"""Largest file of weights."""


def merge(
    checkpoint: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Merged:
    """Write the model of a checkpoint to the folder `output`, whole or not at all.

    `dtype`: of the merged weights, bfloat16 if left out. The sum is made in float32 and rounded once.
    `on_progress` is told (tensors done, tensors in all) after each file of weights.

    Raises:
        UserError: there is something in `output`, other than a model to `overwrite`, the checkpoint is not one, the
            base of adapters is missing or another, or a `dtype` is given for a full run's checkpoint.
        RunError: the disk is full.
    """
    recipe_file = checkpoint / "recipe.yaml"
    recipe = load_recipe(recipe_file) if recipe_file.is_file() else None
    family = find_family(checkpoint)
    base = find_base(checkpoint) if is_adapter_folder(checkpoint) else None
    if base is None and dtype is not None:
        raise UserError(f"{checkpoint}: holds no adapters; its weights are copied as they are, without --base-dtype")
    holds_source = any(part.resolve().is_relative_to(output.resolve()) for part in (checkpoint, base) if part)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if holds_source:
            raise UserError(f"{output}: is or holds the model that is merged; choose another --output")
        if not (overwrite and (output / "config.json").is_file()):
            why = "holds no model, so --overwrite leaves it alone" if overwrite else "is there already"
            raise UserError(f"{output}: {why}; choose another --output" + ", or --overwrite a model" * (not overwrite))
    template = load_template(family, checkpoint)
    with whole_or_nothing(output) as folder:
        if base is None:
            _copy(checkpoint, folder)
        else:
            _write_merged(family, base, Merger(checkpoint), folder, dtype or torch.bfloat16, shard_bytes, on_progress)
        save_processor(family, template, family.weights.load_config(base or checkpoint), folder)
        made = Merged(str(output), str(checkpoint), str(base) if base else None, *_weights_of(folder))
        architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
        card = "\n".join(model_card(checkpoint, recipe, made, architecture))
        (folder / "README.md").write_text(card + "\n", encoding="utf-8")
    return made


@contextmanager
def whole_or_nothing(output: Path, advice: str = "choose another --output") -> Iterator[Path]:
    """Give a hidden folder that becomes `output`; after an error none of its gigabytes are left. Raise RunError where
    the disk is full."""
    with (
        on_error(lambda error: remove_leftovers(output)),
        explain_full_disk(output, advice),
        staged(output) as folder,
    ):
        yield folder


def _copy(checkpoint: Path, folder: Path) -> None:
    """Copy what transformers loads, without training state and without a recipe that has paths of this machine."""
    for file in checkpoint.iterdir():
        if file.is_file() and file.name not in (MANIFEST, "recipe.yaml"):
            shutil.copyfile(file, folder / file.name)


def _write_merged(
    family: Family,
    base: Path,
    merger: Merger,
    folder: Path,
    dtype: torch.dtype,
    shard_bytes: int,
    on_progress: Callable[[int, int], None],
) -> None:
    files = family.weights.weight_files(base)
    with ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(base / file, framework="pt")) for file in set(files.values())}
        sizes = {
            name: math.prod(opened[file].get_slice(name).get_shape()) * dtype.itemsize
            for name, file in sorted(files.items(), key=lambda item: (item[1], item[0]))
        }
        split = split_state_dict_into_shards_factory(
            sizes,
            get_storage_size=lambda size: size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=shard_bytes,
        )
        done = 0
        for file, names in split.filename_to_tensors.items():
            shapes = {name: opened[files[name]].get_slice(name).get_shape() for name in names}
            weights = (merger.merged(name, opened[files[name]].get_tensor(name)) for name in names)
            write_safetensors(folder / file, shapes, dtype, weights)
            done += len(names)
            on_progress(done, len(sizes))
    merger.check_all_used()
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    family.weights.write_config(json.loads((base / "config.json").read_text()), folder, dtype)


def write_safetensors(
    file: Path,
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype | Mapping[str, torch.dtype],
    weights: Iterable[Tensor],
) -> None:
    """Write tensors as they come, each rounded to its `dtype`: a file of safetensors in the memory of one of them.

    The library's `save_file` wants all tensors of a file at once and copies them: three times the file was seen.
    Format: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    dtypes = dtype if isinstance(dtype, Mapping) else dict.fromkeys(shapes, dtype)
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtypes[name].itemsize
        header[name] = {"dtype": FORMAT_NAMES[dtypes[name]], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data are aligned
    with file.open("wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in zip(shapes, weights, strict=True):
            output.write(tensor.to(dtypes[name]).contiguous().view(torch.uint8).numpy().data)


FORMAT_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def _weights_of(folder: Path) -> tuple[str, int, int]:
    """Return the types, the number and the size in bytes of the weights of a model folder."""
    kinds, number, size = set(), 0, 0
    for file in folder.glob("*.safetensors"):
        size += file.stat().st_size
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                kinds.add(part.get_dtype())
                number += math.prod(part.get_shape())
    names = {name: str(dtype).removeprefix("torch.") for dtype, name in FORMAT_NAMES.items()}
    return ", ".join(names.get(kind, kind) for kind in sorted(kinds)), number, size


# -------------------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class LogitDifference:
    """The distance between the logits of two models, on the same tokens."""

    largest: float
    mean: float
    same_choice: float
    """Share of positions where both find the same token the likeliest."""


def compare(checkpoint: Path, output: Path) -> dict[str, LogitDifference]:
    """Compare the merged model with its parts: the unquantised base with adapters, and the 4-bit base with adapters. Of
    a full run: the checkpoint that was copied. One model is in memory at a time. What is asked is two conversations,
    one about an image of noise; everything is computed in float32."""
    merged = _logits(output)
    if not is_adapter_folder(checkpoint):
        return {"checkpoint": _difference(merged, _logits(checkpoint))}
    return {
        "base + adapters": _difference(merged, _logits(checkpoint)),
        "4-bit base + adapters": _difference(merged, _logits(checkpoint, load_in_4bit=True)),
    }


def _logits(path: Path, *, load_in_4bit: bool = False) -> Tensor:
    loaded = load_for_inference(path, precision="float32", load_in_4bit=load_in_4bit)
    device = next(loaded.model.parameters()).device
    with torch.inference_mode():
        logits_PV: Tensor = loaded.model(batch=_probe(loaded).to(device)).logits_PV
    return logits_PV.float().cpu()


def _difference(a_PV: Tensor, b_PV: Tensor) -> LogitDifference:
    apart_PV, is_same_P = (a_PV - b_PV).abs(), a_PV.argmax(-1) == b_PV.argmax(-1)
    return LogitDifference(float(apart_PV.max()), float(apart_PV.mean()), float(is_same_P.float().mean()))


def _probe(loaded: Loaded) -> Batch:
    """Return two conversations whose every token is looked at."""
    noise = NoiseImages(loaded.images)
    image = ImageRef(source=b"noise", size=noise.size)
    turns = (
        ((image, "What is in this image?"), "There is nothing but noise in this image."),
        (("What is the capital of France, and what is it known for?",), "Paris. It is known for the Eiffel Tower."),
    )
    placed = []
    for asked, answer in turns:
        sample, _ = loaded.template.encode_answer((Message(role="user", content=asked),), answer)
        whole = replace(sample, trained_spans=((1, len(sample.input_ids)),))
        placed.append(PlacedSample(whole, (0,) * len(sample.image_positions), source=0))
    return collate([placed], noise, train_on="assistant", num_trained_tokens=1)
