#!/usr/bin/env python3
"""How fast `prepare` is, as ratios taken side by side in one run.

    scripts/bench/bench_prepare.py [--json] [--images 400] [--dialogues 4000] [--rounds 5]

Everything is made here: photographs of noise and gradients of about 100 KB as base64 in M3IT's loader form, dialogues
in UltraChat's form. Sides alternate; a ratio is of medians of CPU seconds of one process, larger is better for us:

    header_to_plain    `datasets.map` that decodes and encodes each image again / prepare, `verify: header`
    header_to_bare     a loop that reads, parses, decodes base64 and hashes / prepare, `verify: header`
    decode_to_bare     the same loop that also decodes each image / prepare, `verify: decode`
    text_to_json       a loop of json.loads over UltraChat lines / prepare
    encode_to_bare     the bare tokenizer over the same texts / encoding
    memory             peak memory of prepare over ten times the rows / over the rows

The bare loops use the standard library's base64 and decode whole images with Pillow. Prepare does less than that, which
is why it can be faster than "bare": pybase64, and JPEGs decoded at an eighth of their size, which reads all their data.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measuring import cpu_medians, peak_bytes
from PIL import Image

from sft.data.datasets import Adapter
from sft.data.store import Settings, Store, prepare_store

WORDS = ("the", "of", "to", "and", "in", "is", "it", "you", "that", "water", "for", "on", "are", "because", "picture")


def jpeg(rng: np.random.Generator) -> bytes:
    """A picture of 640 x 480 with edges, gradients and some noise: about 100 KB, as photographs have."""
    y, x = np.mgrid[0:480, 0:640]
    waves = [128 + 100 * np.sin(x / rng.uniform(5, 90) + y / rng.uniform(5, 90)) for _ in range(3)]
    pixels = np.stack(waves, axis=-1) + rng.normal(0, 12, (480, 640, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
    return file.getvalue()


def write_images(file: Path, number: int) -> None:
    """Rows of M3IT's loader form, every image another."""
    rng = np.random.default_rng(0)
    with file.open("w") as lines:
        for n in range(number):
            row = {"instruction": "Describe the image.", "inputs": "", "outputs": f"Waves, number {n}."}
            lines.write(json.dumps(row | {"image_base64_str": [base64.b64encode(jpeg(rng)).decode()]}) + "\n")


def write_dialogues(file: Path, number: int) -> None:
    """Lines of UltraChat: six turns of about 150 words."""
    rng = random.Random(0)
    with file.open("w") as lines:
        for n in range(number):
            turns = [" ".join(rng.choices(WORDS, k=rng.randint(20, 280))) + "." for _ in range(6)]
            lines.write(json.dumps({"id": str(n), "data": turns}) + "\n")


# -------------------------------------------------------------------------------------------------------- sides


def prepare(name: str, file: Path, store: Path, **settings: Any) -> Store:
    """Our side."""
    shutil.rmtree(store, ignore_errors=True)
    options = {"subsets": ["coco"]} if name == "m3it" else {}
    adapter = Adapter(name, str(file), "train", options)
    return prepare_store(adapter, store, asked={"dataset": name}, settings=Settings(**settings))


def bare(file: Path, *, decode: bool) -> None:
    """Read, parse, decode base64, hash; and decode the image when told."""
    with file.open("rb") as lines:
        for line in lines:
            content = base64.b64decode(json.loads(line)["image_base64_str"][0])
            hashlib.sha256(content).hexdigest()
            if decode:
                Image.open(io.BytesIO(content)).load()


def plain(file: Path, folder: Path) -> None:
    """What a script does with `datasets`: images are decoded, and encoded again in their own format."""
    import datasets

    datasets.disable_progress_bars()
    shutil.rmtree(folder, ignore_errors=True)
    rows = datasets.load_dataset("json", data_files=str(file), cache_dir=str(folder), split="train")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        image = Image.open(io.BytesIO(base64.b64decode(row["image_base64_str"][0])))
        image.load()
        return {"image": image, "text": row["outputs"]}

    rows.map(convert, features=features, remove_columns=rows.column_names)


def parse(file: Path) -> None:
    """json.loads of every line."""
    with file.open("rb") as lines:
        for line in lines:
            json.loads(line)


# ------------------------------------------------------------------------------------------------------ measuring


def preparation_peak_bytes(file: Path, store: Path) -> int:
    """Largest memory of a process that prepares a file."""
    arguments = [sys.executable, __file__, "--peak-of", str(file), "--store", str(store)]
    return int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


def access_microseconds(store: Store, number: int = 2000) -> float:
    """Median time to read a sample with the bytes of its images, at random, of a file that is in the page cache."""
    rng = random.Random(0)
    times = []
    for _ in range(number):
        row = rng.randrange(len(store))
        started = time.perf_counter()
        store.sample(row)
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def encoding_sides(store: Store, folder: Path) -> dict[str, Callable[[], Any]]:
    """Encoding a store, and the bare tokenizer on the same texts."""
    from sft.core.shipped import resolve
    from sft.data.encoded_arrays import encode_samples
    from sft.models import get_family
    from sft.models.loaded_model import load_template

    family = get_family("idefics")
    base = folder / "base"
    if not base.exists():
        family.weights.prepare_base(resolve("shipped:tiny_base"), base)
    template = load_template(family, base)
    texts = [template.text(sample.messages) for sample, _ in store.stored_samples()]

    def ours() -> None:
        shutil.rmtree(folder / "encoded", ignore_errors=True)
        encode_samples(store, template, folder / "encoded")

    def tokenizer() -> None:
        for text in texts:
            template.tokenizer(text, add_special_tokens=False)

    return {"ours": ours, "bare": tokenizer}


def measure(folder: Path, num_images: int, num_dialogues: int, rounds: int) -> dict[str, Any]:
    """All figures."""
    images, tenfold, dialogues = (folder / name for name in ("images.jsonl", "tenfold.jsonl", "train_0.jsonl"))
    write_images(images, num_images)
    write_dialogues(dialogues, num_dialogues)
    store = folder / "store"
    image_sides: dict[str, Callable[[], Any]] = {
        "header": lambda: prepare("m3it", images, store, verify="header"),
        "bare": lambda: bare(images, decode=False),
        "plain": lambda: plain(images, folder / "plain"),
        "decode": lambda: prepare("m3it", images, store, verify="decode"),
        "bare_decode": lambda: bare(images, decode=True),
    }
    cpu = cpu_medians(image_sides, rounds)
    accessed = access_microseconds(prepare("m3it", images, store, verify="header"))
    text_sides = {"ours": lambda: prepare("ultrachat", dialogues, store), "json": lambda: parse(dialogues)}
    text = cpu_medians(text_sides, rounds)
    encoding = cpu_medians(encoding_sides(prepare("ultrachat", dialogues, store), folder), rounds)
    peak = preparation_peak_bytes(images, store)
    write_images(tenfold, num_images * 10)
    return {
        "ratios": {
            "header_to_plain": cpu["plain"] / cpu["header"],
            "header_to_bare": cpu["bare"] / cpu["header"],
            "decode_to_bare": cpu["bare_decode"] / cpu["decode"],
            "text_to_json": text["json"] / text["ours"],
            "encode_to_bare": encoding["bare"] / encoding["ours"],
            "memory": preparation_peak_bytes(tenfold, store) / peak,
        },
        "access_microseconds": accessed,
        "cpu_seconds": cpu,
        "dialogues_per_cpu_second": num_dialogues / text["ours"],
        "encoded_per_cpu_second": num_dialogues / encoding["ours"],
        "peak_bytes": peak,
        "images": num_images,
        "bytes_per_image": images.stat().st_size / num_images * 3 / 4,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--dialogues", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        prepare("m3it", arguments.peak_of, arguments.store, verify="header")
        print(peak_bytes())
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), arguments.images, arguments.dialogues, arguments.rounds)
    if arguments.json:
        print(json.dumps(figures))
        return
    for name, ratio in figures.pop("ratios").items():
        print(f"{name:18} {ratio:8.2f}")
    for name, value in figures.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
