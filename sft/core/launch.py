"""Starting several processes of this machine that work together, and ending them together."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Thread
from types import FrameType

from sft.core.errors import RunError

STOPPED = 75  # exit status of a run that was stopped and can go on (EX_TEMPFAIL of sysexits.h)
GRACE_SECONDS = 10.0  # how long processes have to end by themselves after one of them failed
_LIFELINE = "IDEFICS_SFT_LIFELINE"
"""Environment variable with the number of a pipe's end: it is closed when the process that started this one ends."""


def launch(number: int, arguments: Sequence[str]) -> int:
    """Run `idefics-sft ARGUMENTS` in several processes of this machine and return the exit status of them all; raise
    RunError where one was killed. Signals are passed on, once to each process, and a process that fails ends all.
    torch's launcher is not used: it prints a screen of its own about a user's mistake, hides the exit status, and kills
    what needs more than 30 seconds to stop."""
    processes: list[subprocess.Popen[bytes]] = []
    read, write = os.pipe()
    shared = _environment(number) | {_LIFELINE: str(read)}
    with _signals_passed_on(processes):
        try:
            for rank in range(number):
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "sft.cli.main", *arguments],
                        env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        pass_fds=(read,),
                        start_new_session=True,  # else a terminal would interrupt them, and then we would again
                    )
                )
            return _status_of_all(processes)
        finally:
            for process in processes:
                process.kill()
            os.close(read)
            os.close(write)


def end_with_launcher() -> bool:
    """Let this process end when the one that launched it does, and return whether that was `launch`. A process whose
    launcher is killed would wait for the others, or train on unseen."""
    lifeline = os.environ.pop(_LIFELINE, None)
    if lifeline is None:
        return False

    def watch() -> None:
        os.read(int(lifeline), 1)
        os._exit(1)

    Thread(target=watch, daemon=True).start()
    return True


def _environment(number: int) -> dict[str, str]:
    """Return the environment of all processes, in torchrun's variables: where they meet, and how many they are."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max((os.cpu_count() or 1) // number, 1)
    shared = {"OMP_NUM_THREADS": str(threads)} | os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return shared | {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}


@contextmanager
def _signals_passed_on(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    def pass_on(signal_number: int, _: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal_number)

    before = {sign: signal.signal(sign, pass_on) for sign in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


def _status_of_all(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Return the worst exit status of all, GRACE_SECONDS after one failed at most; raise RunError for a killed one."""
    deadline = None
    while any(process.poll() is None for process in processes):
        time.sleep(0.1)
        if deadline is None and any(process.returncode not in (None, 0, STOPPED) for process in processes):
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            break
    ended = {number: process.poll() for number, process in enumerate(processes)}
    statuses = {status for status in ended.values() if status is not None}
    killed = {number: -status for number, status in ended.items() if status is not None and status < 0}
    if killed and 2 not in statuses:
        number, sign = next(iter(killed.items()))
        why = ", perhaps for want of memory" if sign == signal.SIGKILL else ""
        raise RunError(f"process {number} of {len(ended)} was ended by {signal.Signals(sign).name}{why}")
    worst_first = (2, *sorted(status for status in statuses if status not in (0, 2, STOPPED)), STOPPED, 0)
    return next(status for status in worst_first if status in statuses)
