"""Complete checkpoints only: staged, listed with their hashes, renamed once.

A folder `checkpoint-<step>` exists only after everything in it is on disk; its manifest.json lists each file with its
size and xxh3 hash. Whatever a killed process left is in a hidden staging folder and is never found.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from errno import EDQUOT, ENOSPC
from pathlib import Path

from safetensors import SafetensorError

from sft.errors import RunError, UserError
from sft.files import hash_file, remove_leftovers, staged

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_name(step: int) -> str:
    """`checkpoint-<step>`."""
    return f"checkpoint-{step}"


def step_of(path: Path) -> int:
    """The step a checkpoint folder is named after."""
    match = _NAME.fullmatch(path.name)
    if not match:
        raise UserError(f"{path}: not a checkpoint folder; expected a name like checkpoint-100")
    return int(match[1])


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a folder, hash it, sync it to disk and give it its name in one rename.

    Raises:
        RunError: the disk is full. Nothing is left of the folder then.
    """
    try:
        _write_folder(path, write)
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        remove_leftovers(path)
        raise RunError(f"{path}: the disk is full; checkpoints before it are whole") from error


def is_disk_full(error: OSError | SafetensorError) -> bool:
    """safetensors tells of it in words only."""
    return getattr(error, "errno", None) in (ENOSPC, EDQUOT) or os.strerror(ENOSPC) in str(error)


def _write_folder(path: Path, write: Callable[[Path], None]) -> None:
    with staged(path) as staging:
        write(staging)
        files = sorted(file for file in staging.rglob("*") if file.is_file())
        manifest = {str(f.relative_to(staging)): {"bytes": f.stat().st_size, "xxh3": hash_file(f)} for f in files}
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def is_complete(path: Path) -> bool:
    """Whether every file of the manifest is there in its size. Contents are checked by `broken_files`."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        return False
    files = json.loads(manifest.read_text())
    return all((path / n).is_file() and (path / n).stat().st_size == f["bytes"] for n, f in files.items())


def broken_files(path: Path) -> list[str]:
    """Files whose content is not what the manifest says."""
    files = json.loads((path / MANIFEST).read_text())
    return [name for name, file in files.items() if hash_file(path / name) != file["xxh3"]]


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints in a folder, by step."""
    found = [path for path in directory.glob("checkpoint-*") if _NAME.fullmatch(path.name) and is_complete(path)]
    return sorted(found, key=step_of)
