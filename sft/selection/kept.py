"""Evaluations that a run keeps, in the files of sft.evaluation.results: the summary last, which vouches for both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft.evaluation.results import result_file
from sft.files import write_atomically


def hash_of(parts: dict[str, Any]) -> str:
    """16 hexadecimal digits for everything but the weights that a score depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def is_kept(run_dir: Path, benchmark: str, protocol_hash: str, checkpoint: str, *, weights: str) -> bool:
    """Whether these weights were asked this before."""
    file = result_file(run_dir, benchmark, protocol_hash, checkpoint)
    return file.is_file() and bool(json.loads(file.read_text(encoding="utf-8"))["weights"] == weights)


def keep(
    run_dir: Path, benchmark: str, protocol_hash: str, checkpoint: str, summary: dict[str, Any], lines: Sequence[object]
) -> None:
    """Write one line per question, then the summary, which names the `weights`."""
    file = result_file(run_dir, benchmark, protocol_hash, checkpoint)
    head = {"checkpoint": checkpoint, "benchmark": benchmark, "protocol_hash": protocol_hash}
    write_atomically(file.with_suffix(".jsonl"), "".join(json.dumps(line) + "\n" for line in lines))
    write_atomically(file, json.dumps(head | summary, indent=2) + "\n")
