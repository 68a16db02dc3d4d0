"""GPUs: what they can hold and how fast they multiply."""

from __future__ import annotations

from typing import Literal, NamedTuple

from sft.core.errors import UserError

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
    "t4-16": Device("T4 16 GB", 14.5, 65e12, half="float16"),
    "p100-16": Device("P100 PCIe 16 GB", 15.4, 18.7e12, half="float16"),
    "v100-16": Device("V100 SXM2 16 GB", 15.3, 125e12, half="float16"),
    "v100-32": Device("V100 SXM2 32 GB", 31.3, 125e12, half="float16"),
    "rtx3090-24": Device("RTX 3090 24 GB", 23.2, 71e12),
    "rtx4090-24": Device("RTX 4090 24 GB", 23.2, 165e12),
    "rtx5090-32": Device("RTX 5090 32 GB", 30.9, 209e12),
    "rtx6000ada-48": Device("RTX 6000 Ada 48 GB", 47.0, 364e12),
    "a10g-24": Device("A10G 24 GB", 21.6, 70e12),
    "l4-24": Device("L4 24 GB", 21.7, 121e12),
    "a40-48": Device("A40 48 GB", 44.0, 150e12),
    "l40s-48": Device("L40S 48 GB", 44.0, 362e12),
    "a100-40": Device("A100 40 GB", 39.0, 312e12),
    "a100-80": Device("A100 80 GB", 78.6, 312e12),
    "h100-80": Device("H100 SXM 80 GB", 78.6, 989e12),
    "h200-141": Device("H200 SXM 141 GB", 139.3, 989e12),
    "b200-180": Device("B200 180 GB", 177.9, 2250e12),
}
"""Peaks: data sheets of T4 (65), P100 PCIe (18.7), V100 SXM2 (125), A10G (70), L4 (121), A40 (149.7), L40S (362), A100
(312), H100 and H200 SXM (989) and B200 (2,250), each without sparsity; whitepapers of GA102 for the RTX 3090 (71), of
Ada for the RTX 4090 (165.2) and RTX 6000 Ada (364), of Blackwell for the RTX 5090 (209.5), all with FP32 accumulate.

Memory: nvidia-smi shows 81,920, 81,559, 23,034 and 15,360 MiB for A100 80 GB, H100, L4 and T4
(modal-labs/modal-client#2797). torch reports 22.03 GiB on an L4 (ArcInstitute/evo2#190), 14.75 on a T4, where 14.55
could be allocated (hpcaitech/Open-Sora#697), 23.65 on an RTX 4090 (tloen/llama-int8#7) and 31.36 on an RTX 5090
(TrajectoryCrafter#20); the others are from memory. A CUDA context takes 0.2 to 0.5 GiB of that."""


def find_device(name: str) -> Device:
    """Return the GPU with a name of the table, or with a part that only one name has: `RTX 4090`, `h100`, `A100 40`.

    Raises:
        UserError: none or several have that name.
    """
    wanted = "".join(filter(str.isalnum, name.lower()))
    names = {known.replace("-", ""): known for known in DEVICES}
    found = [known for known in DEVICES if wanted == known.partition("-")[0]]
    found = found or [known for short, known in names.items() if wanted in short]
    if len(found) != 1:
        known = ", ".join(found or DEVICES)
        raise UserError(f"--gpu {name}: expected one of {known}; --gpu-memory GIB plans for any other")
    return DEVICES[found[0]]


def device_of_memory(gib: float) -> Device:
    """Return a GPU of which only the usable memory is known, so that no time can be given."""
    return Device(f"GPU with {gib:g} GiB", gib, None)
