"""Model folders of every family: safetensors files that hold all weights; into memory as training and evaluation want
them, and into the folder of a prepared base."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sft.core.errors import UserError
from sft.core.files import link_or_copy, staged


def weight_files(folder: Path) -> dict[str, str]:
    """Return the name of the safetensors file that holds each tensor.

    Raises:
        UserError: there is none, or it is damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            weight_map: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index}: damaged, does not say which file holds which tensor") from error
        return weight_map
    single = folder / "model.safetensors"
    if not single.exists():
        raise UserError(f"{folder}: no model.safetensors found; weights are read from safetensors only")
    try:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single.name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{single}: not readable as safetensors ({error})") from error


def check_weights(folder: Path, expected: Mapping[str, Tensor]) -> None:
    """Check that every weight of a model is in the folder, in its shape; transformers would invent what is missing.

    Reads the headers of the safetensors files only. `expected` may be of the meta device.

    Raises:
        UserError: naming the first that is missing or of another shape, or the file that is damaged.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(set(weight_files(folder).values())):
        try:
            with safe_open(folder / file, framework="pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / file}: not readable as safetensors ({error})") from error
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise UserError(f"{folder}: {len(missing)} weights are missing, {missing[0]} among them")
    for name, tensor in expected.items():
        if shapes[name] != tuple(tensor.shape):
            raise UserError(f"{folder}: {name} has shape {shapes[name]}, config.json asks for {tuple(tensor.shape)}")


def local_folder(path: str | Path) -> Path:
    """Return the folder itself, or the local snapshot of a hub id.

    Raises:
        UserError: there is no such folder, nor is it in the local cache or on a hub that can be reached.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{path}: no such folder, not in the local cache, and not to be had of the hub ({reason})"
        ) from error


@contextmanager
def new_base(source: Path, output: Path, replaced: Collection[str] = ()) -> Iterator[Path]:
    """Give a folder for what a prepared base has of its own. After it everything else of `source` is linked into it,
    but the files named in `replaced`, and it becomes `output`.

    Raises:
        UserError: `source` is `output`.
    """
    if source.resolve() == output.resolve():
        raise UserError(f"{output}: the prepared base would replace the base it is made from; give another folder")
    with staged(output) as folder:
        yield folder
        own = {*replaced, *(file.name for file in folder.iterdir())}
        for file in source.iterdir():
            if file.suffix in (".safetensors", ".json") and file.name not in own:
                link_or_copy(file.resolve(), folder / file.name)


def quantisation(kept: Collection[str], dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise the linear layers, but those whose names begin with one of `kept`.
    Any such list takes the place of transformers' own, which keeps the head."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[re.escape(name.removesuffix(".")) for name in kept],
    )
    return {"quantization_config": config, "device_map": {"": device}}


def find_group(name: str, group_of: Mapping[str, str]) -> str:
    """Return the group of the first beginning that a parameter's name has.

    Raises:
        KeyError: not a parameter of this model.
    """
    matching = [group for start, group in group_of.items() if name.startswith(start)]
    if not matching:
        raise KeyError(name)
    return matching[0]


def kept_exact(
    model: nn.Module, trained: Collection[str], exact: tuple[str, ...], group_of: Mapping[str, str]
) -> Iterator[str]:
    """Parameters that are float32, whatever the frozen matrices are stored in: those of groups that are trained, those
    that begin with one of `exact`, and what no matrix product would round under autocast."""
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and not f"{name}.".startswith(exact)
        and find_group(f"{name}.weight", group_of) not in trained
    }
    return (name for name, _ in model.named_parameters() if name not in matrices)


def reload_exactly(model: nn.Module, folder: Path, names: Iterable[str]) -> None:
    """Give parameters their float32 values: loading has rounded them."""
    shards, parameters = weight_files(folder), dict(model.named_parameters())
    by_file: dict[str, list[str]] = {}
    for name in names:
        by_file.setdefault(shards[name], []).append(name)
    for file, held in by_file.items():
        with safe_open(folder / file, framework="pt") as tensors:
            for name in held:
                parameters[name].data = tensors.get_tensor(name).float().to(parameters[name].device)


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file as transformers does, with its keys in order."""
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
