"""Evaluations that a run keeps, in the files of sft.evaluation.results: the summary last, which vouches for both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sft.evaluation.processes import from_main, is_main_process, together
from sft.evaluation.results import result_file
from sft.files import write_atomically
from sft.scoring import weights_hash


def asked_once(
    path: Path,
    run_dir: Path,
    benchmark: str,
    protocol: dict[str, Any],
    ask: Callable[[], tuple[dict[str, Any], Sequence[object]]],
) -> str:
    """See to it that the run keeps the answers of the checkpoint in `path`, and return the hash they are kept under.

    `protocol` is everything but the weights that a score depends on. `ask` makes the summary and a line per question;
    it is called by all processes, and by none where these weights were asked this before.
    """
    protocol_hash = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]
    weights = from_main(lambda: weights_hash(path))
    if not from_main(lambda: is_kept(run_dir, benchmark, protocol_hash, path.name, weights=weights)):
        summary, lines = ask()
        with together():
            if is_main_process():
                keep(run_dir, benchmark, protocol_hash, path.name, {"weights": weights} | summary, lines)
    return protocol_hash


def is_kept(run_dir: Path, benchmark: str, protocol_hash: str, checkpoint: str, *, weights: str) -> bool:
    """Whether these weights were asked this before, and the answers can be read."""
    file = result_file(run_dir, benchmark, protocol_hash, checkpoint)
    try:
        for line in file.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines():
            json.loads(line)
        return bool(json.loads(file.read_text(encoding="utf-8"))["weights"] == weights)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def keep(
    run_dir: Path, benchmark: str, protocol_hash: str, checkpoint: str, summary: dict[str, Any], lines: Sequence[object]
) -> None:
    """Write one line per question, then the summary, which names the `weights`."""
    file = result_file(run_dir, benchmark, protocol_hash, checkpoint)
    head = {"checkpoint": checkpoint, "benchmark": benchmark, "protocol_hash": protocol_hash}
    write_atomically(file.with_suffix(".jsonl"), "".join(json.dumps(line) + "\n" for line in lines))
    write_atomically(file, json.dumps(head | summary, indent=2) + "\n")
