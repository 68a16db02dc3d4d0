"""Model folders of IDEFICS: config.json, and safetensors files that hold every weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import IdeficsConfig
from transformers import IdeficsForVisionText2Text as PlainIdefics

from sft import models
from sft.core.errors import UserError


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


def check_weights(folder: Path, config: dict[str, Any]) -> None:
    """Check that every weight of the model is in the folder, in its shape; transformers would invent what is missing.

    Reads the headers of the safetensors files only.

    Raises:
        UserError: naming the first that is missing or of another shape, or the file that is damaged.
    """
    with torch.device("meta"):
        expected = PlainIdefics(IdeficsConfig.from_dict(config)).state_dict()
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


def read_config(path: str | Path) -> dict[str, Any]:
    """Read config.json of a model folder or hub id.

    Raises:
        UserError: there is none, it is damaged, or not of IDEFICS-1.
    """
    config = models.read_config(path)
    if config.get("model_type") != "idefics":
        raise UserError(f"{path}: model_type is {config.get('model_type')!r}; this family loads 'idefics'")
    return config


def load_config(path: str | Path) -> IdeficsConfig:
    """Load the config of a model folder or hub id, without its weights.

    Raises:
        UserError: there is none, or it is not of IDEFICS-1.
    """
    return IdeficsConfig.from_dict(read_config(path))


def write_config(config: dict[str, Any], directory: Path, dtype: torch.dtype) -> None:
    """Write config.json for weights of `dtype`, as of the plain class."""
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    config |= {"architectures": [PlainIdefics.__name__], "dtype": str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def encoder_settings(config: IdeficsConfig) -> dict[str, Any]:
    """Return the part of a config, as JSON, on which it depends what tower and resampler make of an image."""
    values = config.to_dict()
    return {name: values[name] for name in ("vision_config", "use_resampler", "perceiver_config")}
