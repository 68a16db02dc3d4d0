"""What is computed in. Weights stay float32; autocast rounds on the way through a layer."""

import torch

from sft.errors import UserError


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes bfloat16 natively: on CPU by AMX or avx512_bf16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def choose_precision(asked: str, device: torch.device) -> str:
    """`bfloat16` or `float32`, as asked, or as the device allows for `auto`.

    Raises:
        UserError: bfloat16 is asked of a GPU that has none.
    """
    if asked == "auto":
        return "bfloat16" if has_bfloat16(device) else "float32"
    if asked == "bfloat16" and device.type == "cuda" and not has_bfloat16(device):
        raise UserError("training.precision: this GPU has no bfloat16; set auto or float32")
    return asked
