"""Number formats of the computation. Trained weights stay float32; autocast rounds on the way through a layer."""

import torch

from sft.core.errors import UserError


def device() -> torch.device:
    """Return the current GPU by its number (accelerate takes `cuda` and `cuda:0` for two), or the CPU without one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the device computes bfloat16 natively: on CPU by AMX or avx512_bf16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def choose_precision(wanted: str, device: torch.device) -> str:
    """Return `bfloat16`, `float16` or `float32`: what is asked for, or for `auto` what the device allows. Raise
    UserError where bfloat16 is asked of a GPU that has none, or float16 without a GPU. float16, for GPUs before Ampere
    (a T4, say), is for training, where a gradient scaler keeps small gradients."""
    if wanted == "auto":
        return "bfloat16" if has_bfloat16(device) else "float16" if device.type == "cuda" else "float32"
    if wanted == "bfloat16" and device.type == "cuda" and not has_bfloat16(device):
        raise UserError("training.precision: this GPU has no bfloat16; set auto, float16 or float32")
    if wanted == "float16" and device.type != "cuda":
        raise UserError("training.precision: float16 needs a GPU; set auto, bfloat16 or float32")
    return wanted


def torch_dtype(precision: str) -> torch.dtype:
    """Return the dtype of that name: `bfloat16` -> `torch.bfloat16`."""
    dtype: torch.dtype = getattr(torch, precision)
    return dtype
