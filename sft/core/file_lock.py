"""One process at a time in a folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sft.core.errors import UserError


@contextmanager
def locked(folder: Path, *, beside: bool = False) -> Iterator[None]:
    """Hold a folder for this process; it is let go when the process ends, however it ends.

    The file that tells lies in the folder, which is made if need be; or `beside` it, where the folder itself is to be
    replaced. It is there only as long as the folder is held.

    Raises:
        UserError: another process holds it.
    """
    path = folder.with_name(f".{folder.name}.lock") if beside else folder / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = _locked_file(path)
    except BlockingIOError as error:
        raise UserError(
            f"{folder}: another idefics-sft is writing here; wait for it, or choose another folder"
        ) from error
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is held, so that it is no one else's


def _locked_file(path: Path) -> IO[str]:
    """The file at `path`, held. One that its last holder has just removed holds nothing: then there is another."""
    while True:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BaseException:
            file.close()
            raise
        file.close()
