"""Checks that need no model: library versions, the device and what it computes, the disk."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import nn

from sft.checks.finding import Finding, Result
from sft.core.contain import contained
from sft.core.precision import choose_precision, device, has_bfloat16
from sft.core.shipped import shipped_root

LIBRARIES = ("torch", "transformers", "trl", "accelerate", "peft", "bitsandbytes", "datasets")
"""Libraries whose versions can change what is trained."""

GIB = 1024**3
LITTLE_DISK = GIB
"""Free disk space below which not even the quickstart's stores and checkpoints fit."""


def environment(folder: Path) -> list[Finding]:
    """Run every check that needs no model. `folder` is where runs are to be written."""
    return [*check_versions(), check_device(), check_precision(), check_bitsandbytes(), check_free_disk(folder)]


def tested_versions() -> dict[str, str]:
    """Return the version of each library that this toolkit is tested with, by constraints.txt."""
    lines = (shipped_root() / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def check_versions() -> list[Finding]:
    """Compare each library with the tested version, and with the versions that this package allows."""
    tested = tested_versions()
    allowed = {r.name: r.specifier for r in map(Requirement, requires("idefics-sft") or ()) if r.marker is None}
    return [_check_version(name, tested[name], allowed[name]) for name in LIBRARIES]


def _check_version(name: str, pinned: str, allowed: SpecifierSet) -> Finding:
    advice = f'pip install "{name}=={pinned}"'
    try:
        installed = Version(version(name))
    except PackageNotFoundError:
        return Finding(name, "failed", "not installed", advice)
    if not allowed.contains(installed.base_version, prereleases=True):
        return Finding(name, "failed", f"{installed}, needs {allowed}", advice)
    if installed.public != pinned:
        return Finding(name, "warning", f"{installed}, tested with {pinned}", advice)
    return Finding(name, "ok", str(installed))


def versions_in_a_line() -> Finding:
    """Return the versions of all libraries as one finding."""
    findings = check_versions()
    worst: tuple[Result, ...] = ("failed", "warning")
    for result in worst:
        if listed := "; ".join(f"{one.name} {one.found}" for one in findings if one.result == result):
            return Finding("versions", result, listed, "`idefics-sft doctor` says what to install")
    return Finding("versions", "ok", "those this toolkit is tested with")


def check_device() -> Finding:
    """Report the device that is computed on, and its memory."""
    chosen = device()
    if chosen.type == "cuda":
        free, total = torch.cuda.mem_get_info(chosen)
        others = f", 1 of {torch.cuda.device_count()}" if torch.cuda.device_count() > 1 else ""
        name = f"{torch.cuda.get_device_name(chosen)}{others}"
        return Finding("device", "ok", f"{name}: {free / GIB:.1f} of {total / GIB:.1f} GiB free")
    return Finding("device", "ok", f"CPU, {os.cpu_count()} cores, {free_memory(chosen) / GIB:.1f} GiB of memory free")


def free_memory(of: torch.device) -> int:
    """Return the bytes that can be allocated, on the GPU or in this machine."""
    if of.type == "cuda":
        return int(torch.cuda.mem_get_info(of)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_precision() -> Finding:
    """Report whether the device computes bfloat16 natively, and which precision `auto` means."""
    native = "native" if has_bfloat16(device()) else "not native"
    return Finding("bfloat16", "ok", f"{native}; precision auto takes {choose_precision('auto', device())}")


def check_bitsandbytes() -> Finding:
    """Compute with 4-bit weights as QLoRA stores them, and make a step of an 8-bit optimizer, on this device. The
    forward is done with gradients, without, and with them again: on CPUs with avx512_bf16, bitsandbytes 0.50.2 fails at
    the third if it may repack weights."""
    name = "bitsandbytes on this device"
    wrong = ""
    with contained() as failure, torch.random.fork_rng(devices=[]):  # the seed of a training is not touched
        wrong = _wrong_with_bitsandbytes(device())
    if failure.error:  # a library without code for the device raises RuntimeError, OSError and others
        first_line = str(failure.error).strip().partition("\n")[0]
        wrong = f"{type(failure.error).__name__}: {first_line}"
    if wrong:
        advice = "model.mode qlora and the 8-bit optimizers do not work here; `python -m bitsandbytes` tells more"
        return Finding(name, "failed", wrong, advice)
    return Finding(name, "ok", f"4-bit weights and 8-bit AdamW work on {device().type}")


def _wrong_with_bitsandbytes(on: torch.device) -> str:
    """Return what is computed wrong; empty where nothing is."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    weight, inputs = torch.randn(64, 128), torch.randn(4, 128).to(on)
    layer = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer.support_avx512bf16_for_cpu = False  # as `idefics.load_model` sets it
    layer.to(on)
    stored = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    if (stored.cpu() - weight).abs().mean() > 0.15 * weight.abs().mean():  # 0.09 of it is what nf4 rounds away
        return "4-bit weights are not what was quantised"
    expected = inputs @ stored.T + layer.bias
    for training in (True, False, True):
        layer.train(training)
        with torch.set_grad_enabled(training):
            given = inputs.clone().requires_grad_(training)
            output = layer(given)
        if (output - expected).abs().max() > 0.01 * expected.abs().max():
            return "a product with 4-bit weights is wrong"
        if training:
            output.sum().backward()
            if given.grad is None or (given.grad - stored.sum(0)).abs().max() > 0.01 * stored.sum(0).abs().max():
                return "the gradient of a product with 4-bit weights is wrong"
    moved = nn.Parameter(torch.ones(64, 64, device=on))  # 4,096 elements: fewer keep float32 states
    moved.grad = torch.ones_like(moved)
    bnb.optim.AdamW8bit([moved], lr=0.5, weight_decay=0.0).step()
    if (moved.detach() - 0.5).abs().max() > 0.05:
        return "a step of 8-bit AdamW is wrong"
    return ""


def check_free_disk(folder: Path) -> Finding:
    """Report the free disk space where runs would be written."""
    free = shutil.disk_usage(existing(folder)).free
    found = f"{free / 1e9:.1f} GB; a checkpoint of idefics-9b takes 17.9 GB"
    if free < LITTLE_DISK:
        return Finding("free disk", "warning", found, "set output_dir and data.store elsewhere")
    return Finding("free disk", "ok", found)


def existing(path: Path) -> Path:
    """Return the folder itself, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
