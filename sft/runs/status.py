"""run.json: how far a run is, and what it cost. The file marks a folder as a run of ours."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from sft.core.errors import UserError
from sft.core.files import explain_full_disk, write_atomically

FILE = "run.json"


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """The content of run.json."""

    status: str
    """running, stopped, finished or failed"""
    step: int
    max_steps: int
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    tokens: int = 0
    precision: str = ""
    hardware: str = ""
    versions: dict[str, str] | None = None
    why: str = ""
    """What ended it, in words; empty while it is running."""
    failed_evaluations: dict[str, str] | None = None
    """Checkpoints whose evaluation failed during training, and steps whose validation failed, with the reasons."""

    @staticmethod
    def read(run_dir: Path) -> RunStatus | None:
        """Read the status of a run; None where there is none. Raise UserError for a damaged file."""
        file = run_dir / FILE
        if not file.is_file():
            return None
        try:
            return RunStatus(**json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{file}: damaged, not the status of a run; put a copy of it back; to train, choose another output_dir"
            ) from error

    def write(self, run_dir: Path) -> None:
        """Write run.json, completely or not at all; raise RunError where the disk is full."""
        with explain_full_disk(run_dir / FILE):
            write_atomically(run_dir / FILE, json.dumps(asdict(self), indent=2) + "\n")

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of the whole training, by the clock."""
        return self.tokens / max(self.seconds, 1e-9)
