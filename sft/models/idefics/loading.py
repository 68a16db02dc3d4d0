"""Weights of IDEFICS into memory as training and evaluation want them, and back into a plain folder."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from sft.models.idefics.folders import expected_weights, read_config, write_config
from sft.models.idefics.packed import PackedIdefics, use_grouped_attention
from sft.models.idefics.parameters import EXACT, GROUP_OF, QUANTISED
from sft.models.model_folder import load_weights, local_folder


def load_model(
    path: str | Path,
    *,
    trained: Collection[str] | None = None,
    frozen_dtype: torch.dtype = torch.float32,
    quantised: bool = False,
    device: torch.device | str = "cpu",
) -> PackedIdefics:
    """Load a model folder or hub id, ready for packed training, evaluation and generation (`load_weights`).

    The head is always float32: it computes in float32 in evaluation.

    Raises:
        UserError: the folder is not an IDEFICS model, or weights are missing, damaged or of another shape.
    """
    folder = local_folder(path)
    model = load_weights(
        PackedIdefics,
        folder,
        expected_weights(read_config(folder)),
        trained=trained,
        frozen_dtype=frozen_dtype,
        exact=EXACT,
        in_4_bits=QUANTISED if quantised else (),
        group_of=GROUP_OF,
        device=device,
    )
    use_grouped_attention(model)
    return model


def save_model(model: nn.Module, directory: Path, dtype: torch.dtype, weights: dict[str, Tensor] | None = None) -> None:
    """Write weights rounded once to `dtype`, and the config, as plain `IdeficsForVisionText2Text`.

    `weights` are those of the model, where its parameters hold but a share of them.
    """
    assert isinstance(model, PackedIdefics)
    weights = {name: tensor.to(dtype) for name, tensor in (weights or model.state_dict()).items()}
    model.save_pretrained(directory, state_dict=weights)
    write_config(json.loads((directory / "config.json").read_text()), directory, dtype)
