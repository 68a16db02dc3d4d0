#!/usr/bin/env python3
"""How the cost grows: CPU seconds against what is scaled, and how far that is from what the arithmetic says.

    scripts/bench/bench_scaling.py [--json] [--quick] [--rounds 3] [--only sequence_length,images,…]

A random IDEFICS of idefics-9b's proportions (hidden 256, an image costs as many text tokens as there), float32, one
thread, full training; sides alternate, medians of CPU seconds.

    sequence_length   a forward and backward over one pack of isolated samples of 128 tokens, for each trained token
    images            the same over 1,024 tokens with 0 to 32 images, beside the line through the first and the last
    dataset_planning  planning a window, for each token; 1x is 5,000 samples, four about an image
    dataset_opening   opening the source, for each sample: samples about the same images are found
    ranks             a run of one or two processes, from its first step on, for each trained token: CPU seconds of the
                      main process, as often as there are processes
    checkpoint_write  of a state with its hashes, for each gigabyte; checkpoint_read  into the model, with the hashes

Each row is what is scaled, seconds for each unit, and `times`: seconds for each unit / what the arithmetic says, which
is the first row's, or the line's for images. `ratios` are the largest and the last of these.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from bench_mmbench import build_model
from measuring import cpu_medians
from prepared_work import recipe_of, write_conversations, write_model

from sft.batches.collate import collate
from sft.batches.image_source import NoiseImages
from sft.batches.pack_stream import Planner
from sft.cli.terminal import console, quiet_libraries, table
from sft.core.files import mapped
from sft.core.sample import Batch, EncodedSample, PlacedSample
from sft.data.encoded_arrays import EncodedSamples
from sft.data.orders import mix64
from sft.data.prepared_source import PreparedDataset, PreparedSource
from sft.data.validation_split import Side
from sft.models.idefics.images import IdeficsImages
from sft.models.idefics.weights import weights
from sft.recipe import DataConfig
from sft.runs.checkpoint import STATE, broken_files, write_folder
from sft.training.engines.resume_state import load_state, save_state

HIDDEN, VOCABULARY, SAMPLE_TOKENS = 256, 2000, 128
Rows = list[dict[str, float]]


def rows_of(seconds: Mapping[int, float], units: Mapping[int, float], expected: Mapping[int, float]) -> Rows:
    """One a size: seconds for each unit, and how many times that is what was expected."""
    return [
        {"size": size, "seconds_per_unit": took / units[size], "times": took / units[size] / expected[size]}
        for size, took in seconds.items()
    ]


def flat(seconds: Mapping[int, float], units: Mapping[int, float]) -> Rows:
    """Where each unit should cost what it costs at the smallest size."""
    first = min(seconds)
    return rows_of(seconds, units, dict.fromkeys(seconds, seconds[first] / units[first]))


# ---------------------------------------------------------------------------------------------------- the model


def pack_of(tokens: int, images: int) -> Batch:
    """Isolated samples, half of each trained; the first of them show images, one sample as many as it has to."""
    samples = []
    number = tokens // SAMPLE_TOKENS
    for index, own in enumerate(np.array_split(np.arange(images), number)):
        ids = np.random.default_rng(index).integers(3, VOCABULARY, SAMPLE_TOKENS)
        places = tuple(range(1, 1 + len(own)))
        encoded = EncodedSample(
            key="", input_ids=ids, trained_spans=((SAMPLE_TOKENS // 2, SAMPLE_TOKENS),), image_positions=places
        )
        samples.append(PlacedSample(encoded, tuple(own.tolist()), source=0))
    return collate(
        [samples],
        NoiseImages(IdeficsImages.of_size(224)),
        train_on="assistant",
    )


def training(batches: Mapping[int, Batch], rounds: int) -> dict[int, float]:
    """CPU seconds of forward and backward over each batch."""
    model = build_model(HIDDEN, VOCABULARY).train()
    weights.select_trainable(model)

    def side(batch: Batch) -> Callable[[], None]:
        def run() -> None:
            model(batch=batch).loss.backward()
            model.zero_grad(set_to_none=False)

        return run

    seconds = cpu_medians({str(size): side(batch) for size, batch in batches.items()}, rounds)
    return {int(size): took for size, took in seconds.items()}


def sequence_length(folder: Path, rounds: int, quick: bool) -> dict[str, Rows]:
    """512 to 8,192 tokens."""
    batches = {size: pack_of(size, 0) for size in (512, 1024, 2048, 4096, 8192)[: 3 if quick else 5]}
    seconds = training(batches, rounds)
    return {"sequence_length": flat(seconds, {size: size / 2 for size in seconds})}


def images(folder: Path, rounds: int, quick: bool) -> dict[str, Rows]:
    """0 to 32."""
    batches = {size: pack_of(1024, size) for size in ((0, 1, 8) if quick else (0, 1, 2, 4, 8, 16, 32))}
    seconds = training(batches, rounds)
    units = dict.fromkeys(seconds, 512.0)
    first, last = min(seconds), max(seconds)
    slope = (seconds[last] - seconds[first]) / last
    line = {size: (seconds[first] + slope * size) / 512 for size in seconds}
    return {"images": rows_of(seconds, units, line)}


# ----------------------------------------------------------------------------------------------------- planning


def write_arrays(folder: Path, samples: int) -> None:
    """What a prepared and encoded dataset has on disk, of which the planner reads everything but the text."""
    rows = np.arange(samples)
    lengths = 40 + (mix64(rows, 1) % np.uint64(160)).astype(np.int64)
    arrays = {
        "token_offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "image_offsets": np.arange(samples + 1),
        "num_trained": lengths // 2,
        "image_rows": rows // 4,
        "image_keys": (mix64(np.arange(-(-samples // 4)), 2) >> np.uint64(1)).astype(np.int64),
        "samples": rows,
        "trained_spans": rows[:0],
    }
    for name, values in arrays.items():
        values.astype(np.int64).tofile(folder / f"{name}.bin")
    dtypes = dict.fromkeys((name for name in arrays if name != "image_keys"), "<i8")
    index = {"tokens": int(lengths.sum()), "changes": {}, "dtypes": dtypes}
    (folder / "index.json").write_text(json.dumps(index))


def planning(folder: Path, rounds: int, quick: bool) -> dict[str, Rows]:
    """1x to 1,000x."""
    source = {"name": "talk", "share": 1, "datasets": [{"dataset": "messages", "path": "raw"}]}
    data = DataConfig.model_validate({"mixture": [source]})
    sizes = [5000 * times for times in (1, 10, 100, 1000)[: 3 if quick else 4]]
    parts, windows, tokens = {}, {}, {}

    def opened(size: int) -> PreparedSource:
        own = PreparedSource(data.mixture[0], 1.0, [parts[size]], data, None, Side.TRAIN)
        assert own.groups is not None
        return own

    for size in sizes:
        path = folder / f"dataset-{size}"
        path.mkdir()
        write_arrays(path, size)
        keys = mapped(path / "image_keys.bin", np.dtype(np.int64))
        store = SimpleNamespace(path=path, num_images=size // 4, image_keys=keys)
        parts[size] = PreparedDataset(store, EncodedSamples(path))  # type: ignore[arg-type]
        windows[size] = Planner([opened(size)], data, packs_per_step=100, seed=0).windows()
        packs = next(windows[size])  # look-ahead is filled
        tokens[size] = float(len(packs) * data.sequence_length)
    plan = cpu_medians({str(size): lambda size=size: next(windows[size]) for size in sizes}, 10 * rounds)
    open_ = cpu_medians({str(size): lambda size=size: opened(size) for size in sizes}, rounds)
    return {
        "dataset_planning": flat({int(size): took for size, took in plan.items()}, tokens),
        "dataset_opening": flat({int(size): took for size, took in open_.items()}, {s: float(s) for s in sizes}),
    }


# -------------------------------------------------------------------------------------------------------- ranks


def ranks(folder: Path, rounds: int, quick: bool) -> dict[str, Rows]:
    """One process and two, on the same steps."""
    write_model(folder / "model", HIDDEN)
    write_conversations(folder / "talk", 200, words=50, images=40, per_image=4)
    recipe = recipe_of(
        folder, "run", folder / "talk",
        training={"tokens_per_step": 2048, "precision": "float32"}, distributed={"engine": "ddp"},
        checkpoints={"every_steps": 1000},
    )  # fmt: skip
    file = folder / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "sft.cli.main"]
    subprocess.run([*command, "prepare", str(file)], check=True, capture_output=True)

    def seconds(number: int) -> float:
        options = [f"training.max_steps={steps}", f"output_dir={folder / f'run-{number}'}", "--resume", "none"]
        options += ["--nproc", str(number), "--json"]
        done = subprocess.run([*command, "train", str(file), *options], check=True, capture_output=True, text=True)
        return number * float(json.loads(done.stdout)["cpu_seconds"])

    steps = 4 if quick else 10
    found: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(1 if quick else 2):
        for number in found:
            found[number].append(seconds(number))
    metrics = (folder / "run-1" / "metrics.jsonl").read_text().splitlines()
    trained = float(sum(json.loads(line)["trained_tokens"] for line in metrics))
    return {"ranks": flat({number: float(np.median(took)) for number, took in found.items()}, {1: trained, 2: trained})}


# -------------------------------------------------------------------------------------------------- checkpoints


def checkpoint(folder: Path, rounds: int, quick: bool) -> dict[str, Rows]:
    """States of models of growing width."""
    models, sizes = {}, {}
    for hidden in (128, 256, 512)[: 2 if quick else 3]:
        model = build_model(hidden, VOCABULARY)
        weights.select_trainable(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        models[hidden] = model, optimizer

    def path(hidden: int) -> Path:
        return folder / f"state-{hidden}" / "checkpoint-1"

    def write(hidden: int) -> None:
        write_folder(path(hidden), lambda folder: None, lambda folder: save_state(folder, *models[hidden]))

    def read(hidden: int) -> None:
        assert not broken_files(path(hidden) / STATE)
        load_state(path(hidden) / STATE, *models[hidden])

    for hidden in models:
        write(hidden)
        sizes[hidden] = sum(file.stat().st_size for file in path(hidden).rglob("*") if file.is_file()) // 2**20
    gigabytes = {size: size * 2**20 / 1e9 for size in sizes.values()}

    def scaled(call: Callable[[int], None]) -> Rows:
        seconds = cpu_medians({str(hidden): lambda hidden=hidden: call(hidden) for hidden in models}, rounds)
        return flat({sizes[int(hidden)]: took for hidden, took in seconds.items()}, gigabytes)

    return {"checkpoint_write": scaled(write), "checkpoint_read": scaled(read)}


PARTS = {f.__name__: f for f in (sequence_length, images, planning, ranks, checkpoint)}
UNITS = {
    "sequence_length": ("tokens of a pack", "trained token"),
    "images": ("images of a pack", "trained token"),
    "dataset_planning": ("samples", "token"),
    "dataset_opening": ("samples", "sample"),
    "ranks": ("processes", "trained token"),
    "checkpoint_write": ("MiB", "GB"),
    "checkpoint_read": ("MiB", "GB"),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    figures: dict[str, Rows] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only.split(","):
            started = time.process_time()
            found = PARTS[name](Path(folder), 1 if arguments.quick else arguments.rounds, arguments.quick)
            figures |= found
            print(f"{name}: {time.process_time() - started:.0f} CPU seconds", file=sys.stderr, flush=True)
            if not arguments.json:
                show(found)
    ratios = {
        name: {"largest": max(row["times"] for row in rows), "last": rows[-1]["times"]}
        for name, rows in figures.items()
    }
    if arguments.json:
        print(json.dumps({"ratios": ratios, **figures}))


def show(figures: Mapping[str, Rows]) -> None:
    """A table for each."""
    for name, rows in figures.items():
        size, unit = UNITS[name]
        printed = [(f"{row['size']:,}", f"{row['seconds_per_unit']:.3g}", f"{row['times']:.2f}") for row in rows]
        console().print(table(name, (size, f"CPU s per {unit}", "times"), printed))


if __name__ == "__main__":
    main()
