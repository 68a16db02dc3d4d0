"""run.json: how far a run is, and what it cost."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """What run.json says."""

    status: str
    step: int
    max_steps: int
    seconds: float
    cpu_seconds: float
    tokens: int
    precision: str

    @staticmethod
    def read(run_dir: Path) -> RunStatus | None:
        """The status of a run, or None where there is none."""
        file = run_dir / "run.json"
        if not file.is_file():
            return None
        values = json.loads(file.read_text())
        return RunStatus(**{name: values[name] for name in RunStatus.__annotations__})

    @property
    def tokens_per_second(self) -> float:
        """Of the whole training, by the clock."""
        return self.tokens / max(self.seconds, 1e-9)
