"""One process at a time in a folder."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sft.errors import UserError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; it is made if need be, and let go when the process ends, however it ends.

    Raises:
        UserError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder}: another idefics-sft is writing here; wait for it, or choose another folder"
            ) from error
        yield
