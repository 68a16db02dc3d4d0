"""Stopping on request: at the end of a step, with a checkpoint, so that nothing is lost."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType, TracebackType

from sft.core.distributed import any_process

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what SLURM is told to send some minutes before a job ends."""
FILE = "stop"


class StopRequest:
    """While it is entered, the first of SIGNALS, or a file `stop` in the folder of the run, asks training to stop. A
    second signal ends it at once."""

    def __init__(self, run_dir: Path) -> None:
        self.file = run_dir / FILE
        self.why: str | None = None  # what asks to stop, if anything does
        self._before: dict[signal.Signals, object] = {}

    def is_agreed(self) -> bool:
        """Return whether this process, or one that trains with it, was asked to stop. All of them call this."""
        if self.why is None and self.file.exists():
            self.why = f"{self.file} is there"
        if any_process(self.why is not None):
            self.why = self.why or "another process was asked to"
        return self.why is not None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]
        if kind is None and self.why is not None:
            self.file.unlink(missing_ok=True)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.why:
            raise KeyboardInterrupt
        self.why = signal.Signals(number).name
