"""Model folders of IDEFICS: config.json, and the weights that it asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import IdeficsConfig
from transformers import IdeficsForVisionText2Text as PlainIdefics

from sft import models
from sft.core.errors import UserError
from sft.models.model_folder import write_plain_config


def read_config(path: str | Path) -> dict[str, Any]:
    """Read config.json of a model folder or hub id.

    Raises:
        UserError: there is none, it is damaged, or not of IDEFICS-1.
    """
    config = models.read_config(path)
    if config.get("model_type") != "idefics":
        raise UserError(f"{path}: model_type is {config.get('model_type')!r}; model.family loads 'idefics'")
    return config


def load_config(path: str | Path) -> IdeficsConfig:
    """Load the config of a model folder or hub id, without its weights.

    Raises:
        UserError: there is none, or it is not of IDEFICS-1.
    """
    return IdeficsConfig.from_dict(read_config(path))


def write_config(config: dict[str, Any], directory: Path, dtype: torch.dtype) -> None:
    """Write config.json for weights of `dtype`, as of the plain class."""
    write_plain_config(config, directory, dtype, PlainIdefics.__name__)


def expected_weights(config: dict[str, Any]) -> dict[str, Tensor]:
    """Return the names and shapes of all weights of a model."""
    with torch.device("meta"):
        return dict(PlainIdefics(IdeficsConfig.from_dict(config)).state_dict())


def encoder_settings(config: IdeficsConfig) -> dict[str, Any]:
    """Return the part of a config, as JSON, on which it depends what tower and resampler make of an image."""
    values = config.to_dict()
    return {name: values[name] for name in ("vision_config", "use_resampler", "perceiver_config")}
