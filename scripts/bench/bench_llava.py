#!/usr/bin/env python3
"""What `prepare` of LLaVA records costs: CPU seconds and peak memory of one process.

    scripts/bench/bench_llava.py [--json] [--megabytes 200] [--images 56]

The records are made here: three rounds of about 170 words each about one of a few photographs of noise, in one JSON
list, as LLaVA's files are.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from bench_prepare import WORDS, jpeg


def write_list(folder: Path, num_bytes: int, num_images: int) -> int:
    """Write a list of records and their images, and return how many records there are."""
    rng, words = np.random.default_rng(0), random.Random(0)
    for number in range(num_images):
        (folder / f"{number:012d}.jpg").write_bytes(jpeg(rng))
    texts = [" ".join(words.choices(WORDS, k=words.randint(5, 110))) for _ in range(1000)]
    done = count = 0
    with (folder / "train.json").open("w") as file:
        while done < num_bytes:
            turns = [{"from": ["human", "gpt"][n % 2], "value": words.choice(texts)} for n in range(6)]
            turns[0]["value"] = f"<image>\n{turns[0]['value']}"
            record = {"id": str(count), "image": f"{count % num_images:012d}.jpg", "conversations": turns}
            done += file.write(("," if count else "[") + json.dumps(record) + "\n")
            count += 1
        file.write("]")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--images", type=int, default=56)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = write_list(folder, given.megabytes * 10**6, given.images)
        asked = ["--dataset", "llava_instruct", "--path", str(folder / "train.json"), "--output", str(folder / "store")]
        start = time.perf_counter()
        command = [sys.executable, "-m", "sft.cli.main", "prepare", *asked, "--json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wall = time.perf_counter() - start
        listed = sum(1 for _ in (folder / "store" / "image_files.jsonl").open())
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {
        "megabytes": given.megabytes,
        "records": records,
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "wall_seconds": round(wall, 1),
        "peak_megabytes": used.ru_maxrss // 1000,
        "image_files": listed,
    }
    print(json.dumps(found) if given.json else "\n".join(f"{key:16}{value:>12,}" for key, value in found.items()))


if __name__ == "__main__":
    main()
