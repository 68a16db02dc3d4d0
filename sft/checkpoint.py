"""Complete checkpoints only: staged, listed with their hashes, renamed once.

A folder `checkpoint-<step>` exists only after everything in it is on disk; its manifest.json lists each file with its
size and xxh3 hash. Whatever a killed process left is in a hidden staging folder and is never found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from sft.errors import UserError
from sft.files import hash_file, staged

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
    """Have `write` fill a folder, hash it, sync it to disk and give it its name in one rename."""
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
    return all(_has_size(path / name, file["bytes"]) for name, file in files.items())


def broken_files(path: Path) -> list[str]:
    """Files whose content is not what the manifest says."""
    files = json.loads((path / MANIFEST).read_text())
    return [name for name, file in files.items() if hash_file(path / name) != file["xxh3"]]


def listed_hashes(path: Path) -> dict[str, str]:
    """The xxh3 hash that a checkpoint's manifest gives each file which has its size; empty for any other folder."""
    manifest = path / MANIFEST
    if not (_NAME.fullmatch(path.name) and manifest.is_file()):
        return {}
    files = json.loads(manifest.read_text())
    return {name: file["xxh3"] for name, file in files.items() if _has_size(path / name, file["bytes"])}


def _has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints in a folder, by step."""
    found = [path for path in directory.glob("checkpoint-*") if _NAME.fullmatch(path.name) and is_complete(path)]
    return sorted(found, key=step_of)
