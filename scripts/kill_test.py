#!/usr/bin/env python
"""Kill a training again and again at random moments, start it again each time, and compare its end with an undisturbed
run: `scripts/kill_test.py --kills 20 [--json]`.

The kills are SIGKILL, which no process can catch, at moments drawn over a whole step and its checkpoint; every second
one is aimed at the writing of a checkpoint, by waiting for its staging folder. What is trained is the toy of the
test-suite: the shipped base on a few made questions, a checkpoint at every step. Equal means to the bit: weights,
optimizer, schedule, place in the data, and every line of metrics.jsonl but for times and memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parent.parent
STEPS_A_KILL = 10
"""So many more steps are trained for each kill, since a step takes a tenth of a second or two."""
SECONDS = 0.3
"""A kill comes up to so long after the first checkpoint of a start, or after the staging folder of one was seen."""


def write_recipe(folder: Path, stores: Path, steps: int) -> Path:
    """A recipe of `steps` steps with a checkpoint at each, into `folder`."""
    data = REPOSITORY / "tests" / "fixtures"
    pictures = [{"dataset": "easy_vqa", "path": str(data / "easy_vqa"), "options": {"form": "questions"}}]
    talk = [{"dataset": "messages", "path": str(data / "messages")}]
    values = {
        "model": {"path": "shipped:tiny_base"},
        "data": {
            "store": str(stores),
            "sequence_length": 128,
            "mixture": [
                {"name": "pictures", "share": 75, "datasets": pictures},
                {"name": "talk", "share": 25, "datasets": talk},
            ],
        },
        "training": {
            "max_steps": steps,
            "tokens_per_step": 256,
            "warmup_steps": 2,
            "learning_rate": 1e-3,
            "precision": "float32",
        },
        "checkpoints": {"every_steps": 1},
        "output_dir": str(folder),
    }
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(values))
    return file


def start(recipe: Path) -> subprocess.Popen[bytes]:
    """`idefics-sft train RECIPE`, in a session of its own."""
    command = [sys.executable, "-c", "from sft.cli.main import main; main()", "train", str(recipe)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    log = recipe.with_suffix(".log").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def newest_step(run_dir: Path) -> int:
    """Of the checkpoints that are there."""
    return max((int(path.name.split("-")[1]) for path in run_dir.glob("checkpoints/checkpoint-*")), default=0)


def kill_once(recipe: Path, run_dir: Path, random_: random.Random, aimed: bool) -> int | None:
    """Train until the kill; the steps that were done and are lost by it, None where training ended before."""
    process = start(recipe)
    begun = newest_step(run_dir)
    while newest_step(run_dir) == begun and process.poll() is None:  # it is under way when it has made one more
        time.sleep(0.01)
    if aimed:
        while not [*run_dir.glob("checkpoints/.*.staging")] and process.poll() is None:
            time.sleep(0.002)
    time.sleep(random_.uniform(0, SECONDS / 10 if aimed else SECONDS))
    if process.poll() is not None:
        return None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    done = sum(line.endswith("}") for line in lines)
    return done - newest_step(run_dir)


def finish(recipe: Path) -> None:
    """Train to the end.

    Raises:
        SystemExit: training failed.
    """
    process = start(recipe)
    if process.wait():
        sys.exit(f"training failed with {process.returncode}: {recipe.with_suffix('.log').read_text()[-2000:]}")


def what_came_out(run_dir: Path, steps: int) -> dict[str, Any]:
    """Hashes of the last checkpoint, and the metrics that do not depend on time."""
    checkpoint = run_dir / "checkpoints" / f"checkpoint-{steps}"
    weights = json.loads((checkpoint / "manifest.json").read_text())
    state = json.loads((checkpoint / "state" / "manifest.json").read_text())
    progress = json.loads((checkpoint / "state" / "progress.json").read_text())
    took = ("time", "tokens_per_second", "data_wait", "peak_memory_bytes")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": weights["model.safetensors"]["xxh3"],
        "trained": state["trained.safetensors"]["xxh3"],
        "optimizer": state["optimizer.pt"]["xxh3"],
        "progress": {key: value for key, value in progress.items() if key != "spent"},
        "metrics": [{key: value for key, value in line.items() if key not in took} for line in lines],
    }


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    steps = STEPS_A_KILL * (options.kills + 1)
    with tempfile.TemporaryDirectory(prefix="idefics-sft-kill-") as name:
        folder = Path(name)
        whole, killed = folder / "whole", folder / "killed"
        recipes = [write_recipe(run_dir, folder / "stores", steps) for run_dir in (whole, killed)]
        finish(recipes[0])
        random_ = random.Random(options.seed)
        lost = []
        for number in range(options.kills):
            found = kill_once(recipes[1], killed, random_, aimed=number % 2 == 1)
            if found is None:
                break
            lost.append(found)
        finish(recipes[1])
        before, after = (what_came_out(run_dir, steps) for run_dir in (whole, killed))
    differing = [key for key in before if before[key] != after[key]]
    result = {"kills": len(lost), "equal": not differing, "lost_steps": sum(lost), "differing": differing}
    if options.json:
        print(json.dumps(result))
    else:
        print(f"{len(lost)} kills, {sum(lost)} steps trained again: {differing if differing else 'equal'}")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
