"""What tests of commands in processes of their own share."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

SECONDS = 600
"""More than enough even on a busy machine."""


def sft(*arguments: object, launcher: tuple[str, ...] = ("-m", "sft.cli.main"), **environment: str):
    """A command in a process of its own, as a person starts it."""
    command = [sys.executable, *launcher, *map(str, arguments)]
    own = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        command, env=own | environment, capture_output=True, text=True, timeout=SECONDS, cwd=REPOSITORY
    )


def lines_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_same_steps(found: Path, expected: Path) -> None:
    for line, own in zip(lines_of(found), lines_of(expected), strict=True):
        for key in ("step", "tokens", "trained_tokens", "dirty_samples", "learning_rate"):
            assert line[key] == own[key]
        assert line["loss"] == pytest.approx(own["loss"], rel=1e-5, abs=1e-5)
        # A key's bias has no gradient but rounding, and AdamW's first steps are as long for it as for the others.
        assert line["grad_norm"] == pytest.approx(own["grad_norm"], rel=1e-5 if line["step"] == 1 else 1e-4)
        for part in ("sources", "validation"):
            for name, source in own.get(part, {}).items():
                assert line[part][name] == pytest.approx(source, rel=1e-5, abs=1e-5) or not source["trained_tokens"]
        assert line.get("generations") == own.get("generations")
