"""Stopping when asked: at the end of a step, with a checkpoint, so that nothing is lost."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what SLURM is told to send some minutes before a job ends."""
FILE = "stop"


class StopRequest:
    """While it is entered, the first of SIGNALS asks training to stop; a second one ends it at once.

    So does a file `stop` in the folder of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        self.file = run_dir / FILE
        self.signal: str | None = None
        self._before: dict[signal.Signals, object] = {}

    @property
    def why(self) -> str | None:
        """What asks to stop, None where nothing does."""
        return self.signal or (f"{self.file} is there" if self.file.exists() else None)

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]
        if kind is None:
            self.file.unlink(missing_ok=True)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
