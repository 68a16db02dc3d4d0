#!/usr/bin/env python3
"""The quickstart's training in two worktrees: CPU seconds of a step, before a change and after.

    git worktree add /elsewhere/before REVISION
    scripts/bench/bench_trees.py /elsewhere/before . [--json] [--rounds 3] [--steps 52]

Each tree prepares the quickstart itself and trains it by its own command, on one thread, in turns. A run of `--steps`
steps less one of twelve, the medians of each, is what the steps between take: start and checkpoint cancel out.

    ratio      CPU seconds of a step, after / before
    before, after   CPU seconds of a step
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import print_figures

FEW = 12


def command(tree: Path, work: Path, *arguments: str) -> str:
    """What `idefics-sft` of a tree prints, in a working folder of its own."""
    environment = os.environ | {"PYTHONPATH": str(tree.resolve()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "sft.cli.main", *arguments],
        cwd=work, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    return done.stdout


def cpu_seconds(tree: Path, work: Path, steps: int) -> float:
    """Of training so many steps of the quickstart, as its run says."""
    overrides = (f"training.max_steps={steps}", "checkpoints.every_steps=100000", f"output_dir={work / 'run'}")
    return float(
        json.loads(command(tree, work, "train", "quickstart", *overrides, "--resume", "none", "--json"))["cpu_seconds"]
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=52)
    arguments = parser.parse_args()
    trees = {"before": arguments.before, "after": arguments.after}
    taken: dict[tuple[str, int], list[float]] = {
        (name, steps): [] for name in trees for steps in (FEW, arguments.steps)
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, tree in trees.items():
            (Path(folder) / name).mkdir()
            command(tree, Path(folder) / name, "prepare", "quickstart")
        for _ in range(arguments.rounds):
            for name, steps in taken:
                taken[name, steps].append(cpu_seconds(trees[name], Path(folder) / name, steps))
                print(f"{name}, {steps} steps: {taken[name, steps][-1]:.1f} CPU s", file=sys.stderr)
    middle = {side: statistics.median(seconds) for side, seconds in taken.items()}
    step = {name: (middle[name, arguments.steps] - middle[name, FEW]) / (arguments.steps - FEW) for name in trees}
    figures = {"ratio": step["after"] / step["before"], **step}
    print(json.dumps(figures)) if arguments.json else print_figures(figures)


if __name__ == "__main__":
    main()
