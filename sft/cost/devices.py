"""GPUs: what they can hold and how fast they multiply."""

from __future__ import annotations

from typing import Literal, NamedTuple

GIB = 2**30


class Device(NamedTuple):
    """A GPU: its memory, and its speed where that is known."""

    name: str
    usable_gib: float
    """The total capacity that torch reports in "CUDA out of memory", less what the CUDA context takes."""
    flop_per_second: float | None
    """Peak of dense half-precision matrix products that add up in float32, from NVIDIA's data sheets."""
    half: Literal["bfloat16", "float16"] = "bfloat16"
    """The half-precision type that it computes natively."""

    @property
    def usable_bytes(self) -> int:
        """Usable memory in bytes."""
        return round(self.usable_gib * GIB)


DEVICES = {
    "a100-80": Device("A100 80 GB", 78.6, 312e12),
    "h100-80": Device("H100 SXM 80 GB", 78.6, 989e12),
    "l4-24": Device("L4 24 GB", 21.7, 121e12),
    "t4-16": Device("T4 16 GB", 14.5, 65e12, half="float16"),
    "rtx4090-24": Device("RTX 4090 24 GB", 23.2, 165e12),
}
"""Peaks: data sheets of A100 (312), H100 SXM (1,979 with sparsity, 989 without), L4 (242 with sparsity, 121 without)
and T4 (65); Ada whitepaper for the RTX 4090 (165.2, FP32 accumulate).

Memory: nvidia-smi shows 81,920, 81,559, 23,034 and 15,360 MiB for A100, H100, L4 and T4 (modal-labs/modal-client#2797).
torch reports 22.03 GiB on an L4 (ArcInstitute/evo2#190), 14.75 on a T4, where 14.55 could be allocated
(hpcaitech/Open-Sora#697), and 23.65 on an RTX 4090 (tloen/llama-int8#7); 79.1 on the two others is from memory. A CUDA
context takes 0.2 to 0.5 GiB of that."""


def device_of_memory(gib: float) -> Device:
    """Return a GPU of which only the usable memory is known, so that no time can be given."""
    return Device(f"GPU with {gib:g} GiB", gib, None)
