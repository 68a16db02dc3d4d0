#!/usr/bin/env python3
"""Memory that `idefics-sft merge` takes: that of a few weight matrices, however large the model.

    scripts/bench/bench_merge.py [--gib 4] [--json]

Makes a base of random bfloat16 weights with the layers of IDEFICS and about `--gib` GiB, in files of 5 GiB, and rank-16
adapters of its language and cross-attention layers; merges them in a process of its own and watches that.

    model_bytes   weights of the base
    peak_bytes    largest memory of the process that the system cannot take back (RssAnon), without its imports
    mapped_bytes  largest part of the base that it had mapped meanwhile (RssFile); the system takes it back when needed
    ratios        peak_bytes to the largest matrix in float32, and to the model
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from transformers import IdeficsConfig, IdeficsForVisionText2Text

from sft.core.shipped import resolve
from sft.models.idefics.packed import PackedIdefics
from sft.models.idefics.text import END_OF_UTTERANCE, load_tokenizer
from sft.models.idefics.weights import weights
from sft.models.lora import add_adapters, save_adapters
from sft.recipe import LoraSettings

GIB = 1024**3
HIDDEN = 2048


def make_config(gib: float) -> IdeficsConfig:
    """Layers of IDEFICS, half as wide as those of the 9b model, as many as fill `gib` GiB in bfloat16."""
    own = json.loads((resolve("shipped:tiny_base") / "config.json").read_text())
    per_four = 2 * (4 * (4 * HIDDEN**2 + 3 * HIDDEN * 4 * HIDDEN) + 4 * HIDDEN**2 + 3 * HIDDEN * 4 * HIDDEN)
    return IdeficsConfig(
        **own | {
            "hidden_size": HIDDEN, "intermediate_size": 4 * HIDDEN, "num_attention_heads": 16,
            "num_hidden_layers": max(1, round(gib * GIB / per_four)) * 4, "cross_layer_interval": 4,
            "additional_vocab_size": 3,
        }
    )  # fmt: skip


def write_base(folder: Path, config: IdeficsConfig) -> int:
    """Random weights in files of 5 GiB, config and tokenizer; returns the bytes of the weights."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in IdeficsForVisionText2Text(config).state_dict().items()}
    sizes = {name: shape.numel() * 2 for name, shape in shapes.items()}
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=5 * GIB,
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: 0.02 * torch.randn(shapes[name], dtype=torch.bfloat16) for name in names}, folder / file)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    weights.write_config(config.to_dict(), folder, torch.bfloat16)
    tokenizer = load_tokenizer(resolve("shipped:tiny_base"))
    tokenizer.add_tokens([END_OF_UTTERANCE], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return sum(sizes.values())


def write_adapters(folder: Path, config: IdeficsConfig, base: Path) -> None:
    """Adapters of a model whose weights are nowhere; the adapters themselves are random."""
    with torch.device("meta"):
        model = PackedIdefics(config)
        add_adapters(model, weights.lora_pattern(["language", "cross_attention"]), LoraSettings(r=16), base)
    weights.select_trainable(model, [])
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                setattr(module, name, torch.nn.Parameter(0.02 * torch.randn(parameter.shape)))
    save_adapters(model, folder)


def watch(process: subprocess.Popen[str]) -> tuple[int, int]:
    """Largest RssAnon and RssFile of a process above those at its first line of output, in bytes."""
    assert process.stdout is not None
    process.stdout.readline()
    start = _memory(process.pid)
    peaks = start
    while process.poll() is None:
        peaks = tuple(map(max, peaks, _memory(process.pid)))  # type: ignore[assignment]
        time.sleep(0.005)
    return peaks[0] - start[0], peaks[1] - start[1]


def _memory(pid: int) -> tuple[int, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
    return found.get("RssAnon", 0), found.get("RssFile", 0)


CHILD = """
import sys
from pathlib import Path
from peft import LoraConfig
from transformers import BitsAndBytesConfig, IdeficsImageProcessor, IdeficsProcessor
from sft.inference.merge import merge
print("imported", flush=True)
merge(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench_merge-"))
    try:
        for name in ("base", "adapters"):
            (folder / name).mkdir()
        config = make_config(options.gib)
        model_bytes = write_base(folder / "base", config)
        write_adapters(folder / "adapters", config, folder / "base")
        arguments = (folder / "adapters", folder / "merged")
        started = time.perf_counter()
        child = subprocess.Popen([sys.executable, "-c", CHILD, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
        peak, mapped = watch(child)
        if child.returncode:
            sys.exit(f"merge ended with status {child.returncode}")
        matrix = 4 * HIDDEN * 4 * HIDDEN
        result = {
            "model_bytes": model_bytes,
            "matrix_bytes": matrix,
            "peak_bytes": peak,
            "mapped_bytes": mapped,
            "seconds": time.perf_counter() - started,
            "ratios": {"peak_to_matrix": peak / matrix, "peak_to_model": peak / model_bytes},
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        print(json.dumps(result))
        return
    print(f"{model_bytes / GIB:.2f} GiB merged in {result['seconds']:.0f} s; peak {peak / GIB:.2f} GiB of memory")
    print(f"largest matrix in float32 {matrix / GIB:.3f} GiB; of the base {mapped / GIB:.2f} GiB were mapped")


if __name__ == "__main__":
    main()
