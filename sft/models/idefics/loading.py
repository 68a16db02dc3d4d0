"""Weights of IDEFICS into memory as training and evaluation want them, and back into a plain folder."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sft.models.idefics.folders import check_weights, local_folder, read_config, weight_files, write_config
from sft.models.idefics.names import GROUPS
from sft.models.idefics.packed import PackedIdefics, use_grouped_attention
from sft.models.idefics.parameters import GROUP_OF, QUANTISED, group_of


def load_model(
    path: str | Path,
    *,
    trained: Collection[str] | None = None,
    frozen_dtype: torch.dtype = torch.float32,
    quantised: bool = False,
    device: torch.device | str = "cpu",
) -> PackedIdefics:
    """Load a model folder or hub id, ready for packed training, evaluation and generation.

    The groups in `trained` (None: all) have float32 weights, since updates of 1e-5 are lost in bfloat16 parameters.
    Matrices of the others are stored in `frozen_dtype`, or in 4 bits where `quantised` and of a group in `QUANTISED`:
    nf4 with double quantisation (Dettmers et al. 2023, QLoRA) of the weights as they are in the folder, computed in
    `frozen_dtype`. Embeddings, head, norms, biases and gates are always float32. Quantised weights stay on the `device`
    they are loaded to.

    Raises:
        UserError: the folder is not an IDEFICS model, or weights are missing, damaged or of another shape.
    """
    folder = local_folder(path)
    check_weights(folder, read_config(folder))
    trained = set(GROUPS if trained is None else trained)
    in_4_bits = [group for group in QUANTISED if quantised and group not in trained]
    if trained >= GROUPS.keys():
        frozen_dtype = torch.float32  # nothing is frozen
    loaded_dtype = torch.float32 if in_4_bits else frozen_dtype  # nothing is rounded before it is quantised
    model: PackedIdefics = PackedIdefics.from_pretrained(
        folder,
        dtype=loaded_dtype,
        attn_implementation="sdpa",
        use_safetensors=True,
        **_quantisation(in_4_bits, frozen_dtype, device) if in_4_bits else {},
    )
    exact = {*kept_exact(model, trained)}
    if loaded_dtype != torch.float32:
        _reload_exactly(model, folder, exact)
    for name, parameter in model.named_parameters():
        if name not in exact and parameter.is_floating_point():
            parameter.data = parameter.data.to(frozen_dtype)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.weight.quant_state.dtype = frozen_dtype  # type: ignore[union-attr]  # what it is dequantised to
            # On a CPU with avx512_bf16 a forward without gradients would repack the weights in place, with which the
            # next one with gradients fails (bitsandbytes 0.50.2).
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    use_grouped_attention(model)
    return model


def _quantisation(groups: Collection[str], dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise the linear layers of some groups."""
    from transformers import BitsAndBytesConfig

    kept = [re.escape(name.removesuffix(".")) for name, group in GROUP_OF.items() if group not in groups]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def kept_exact(model: nn.Module, trained: Collection[str]) -> Iterator[str]:
    """Parameters that are float32, whatever the frozen matrices are stored in: what is trained, and what no matrix
    product would round under autocast. The head computes in float32 in evaluation."""
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and group_of(f"{name}.weight") not in {*trained, "head", "extra_rows"}
    }
    return (name for name, _ in model.named_parameters() if name not in matrices)


def _reload_exactly(model: nn.Module, folder: Path, names: Iterable[str]) -> None:
    """Give parameters their float32 values: loading has rounded them."""
    shards, parameters = weight_files(folder), dict(model.named_parameters())
    by_file: dict[str, list[str]] = {}
    for name in names:
        by_file.setdefault(shards[name], []).append(name)
    for file, held in by_file.items():
        with safe_open(folder / file, framework="pt") as tensors:
            for name in held:
                parameters[name].data = tensors.get_tensor(name).float().to(parameters[name].device)


def save_model(model: nn.Module, directory: Path, dtype: torch.dtype, weights: dict[str, Tensor] | None = None) -> None:
    """Write weights rounded once to `dtype`, and the config, as plain `IdeficsForVisionText2Text`.

    `weights` are those of the model, where its parameters hold but a share of them.
    """
    assert isinstance(model, PackedIdefics)
    weights = {name: tensor.to(dtype) for name, tensor in (weights or model.state_dict()).items()}
    model.save_pretrained(directory, state_dict=weights)
    write_config(json.loads((directory / "config.json").read_text()), directory, dtype)
