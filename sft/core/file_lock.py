"""One process at a time in a folder."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from sft.core.errors import UserError

_TIMEOUT_SECONDS = 0.1  # to try again where the lock file was removed between opening and locking it


@contextmanager
def locked(folder: Path, *, beside: bool = False) -> Iterator[None]:
    """Hold a folder until the block ends; the system releases it when the process is killed. Raise UserError where
    another process holds it, OSError where it cannot be made or written to. The lock is a hidden file in the folder,
    which is created if need be, or `beside` the folder where the folder itself will be replaced. It is removed while
    the lock is still held, so that it is no other process's."""
    path = folder.with_name(f".{folder.name}.lock") if beside else folder / ".lock"
    lock = FileLock(path, timeout=_TIMEOUT_SECONDS, poll_interval=_TIMEOUT_SECONDS / 5)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(Timeout):
            lock.acquire()
        if not lock.is_locked:
            path.touch()  # filelock waits in vain, too, for a file that cannot be made
            raise UserError(f"{folder}: another idefics-sft is writing here; wait for it, or choose another folder")
    except OSError as error:
        raise OSError(error.errno, f"cannot be made or written to: {error.strerror}", str(folder)) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
