"""Checkpoints that are complete or not there: staged, listed with their hashes, renamed once.

A folder `checkpoint-<step>` exists only after everything in it is on disk. It has two parts, each complete by its own
manifest.json, which lists each file with its size and xxh3 hash: the weights, which are everything outside `state/`,
and in `state/` what training needs to resume. Files of a killed process are in a hidden staging folder, which is never
read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from sft.core.contain import on_error
from sft.core.distributed import ALONE, Rank, barrier
from sft.core.errors import RunError, UserError
from sft.core.files import discard, explain_full_disk, hash_file, remove_leftovers, staged, staging_of

MANIFEST = "manifest.json"
STATE = "state"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_name(step: int) -> str:
    """Return `checkpoint-<step>`."""
    return f"checkpoint-{step}"


def step_of(path: Path) -> int:
    """Return the step that a checkpoint folder is named after; raise UserError for another name."""
    match = _NAME.fullmatch(path.name)
    if not match:
        raise UserError(f"{path}: not a checkpoint folder; expected a name like checkpoint-100")
    return int(match[1])


def write_folder(
    path: Path, write: Callable[[Path], None], write_state: Callable[[Path], None] | None = None, rank: Rank = ALONE
) -> None:
    """Let `write` fill a folder, and `write_state` its `state/`; hash both, sync them to disk and give the folder its
    name in one rename. All processes call it. The main one does everything; the others add their shards of the state to
    the same folder. Raise RunError where the disk is full; nothing is left of the folder then."""

    def remove_if_full(error: BaseException) -> None:
        if rank.is_main and isinstance(error, RunError):
            remove_leftovers(path)

    own = staged(path) if rank.is_main else nullcontext(staging_of(path))
    with on_error(remove_if_full), explain_full_disk(path), own as staging:
        if rank.is_main:
            write(staging)
            write_manifest(staging)
        if write_state:
            if rank.is_main:
                (staging / STATE).mkdir()
            barrier()
            write_state(staging / STATE)
            barrier()
            if rank.is_main:
                write_manifest(staging / STATE)
    barrier()


def write_manifest(folder: Path) -> None:
    """Write the size and hash of each file of a folder, which is complete then."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    manifest = {str(f.relative_to(folder)): {"bytes": f.stat().st_size, "xxh3": hash_file(f)} for f in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def is_complete(path: Path) -> bool:
    """Return whether every file of the manifest is there in its size. `broken_files` checks the contents."""
    try:
        files = json.loads((path / MANIFEST).read_text())
        return all(_has_size(path / name, file["bytes"]) for name, file in files.items())
    except (OSError, ValueError, AttributeError, KeyError, TypeError):  # none, or a damaged one
        return False


def broken_files(path: Path) -> list[str]:
    """Return the files whose content does not match the manifest."""
    files = json.loads((path / MANIFEST).read_text())
    return [name for name, file in files.items() if hash_file(path / name) != file["xxh3"]]


def problem_of_weights(path: Path) -> str | None:
    """Read all weights of a checkpoint and return what is wrong with them; None where they are as they were written."""
    if not is_complete(path):
        return "files of its weights are missing or cut off"
    if broken := broken_files(path):
        return f"{', '.join(broken)} changed since it was written"
    return None


def listed_hashes(path: Path) -> dict[str, str]:
    """Return the xxh3 hash of each file of a checkpoint, by its manifest, if the file has its size; empty for any other
    folder."""
    manifest = path / MANIFEST
    if not (_NAME.fullmatch(path.name) and manifest.is_file()):
        return {}
    files = json.loads(manifest.read_text())
    return {name: file["xxh3"] for name, file in files.items() if _has_size(path / name, file["bytes"])}


def weights_hash(folder: Path) -> str:
    """Return one hash over the weight files of a model folder. It is read back where a manifest lists theirs; otherwise
    all of them are read, 18 GB of idefics-9b."""
    known = listed_hashes(folder)
    return "-".join(known.get(file.name) or hash_file(file) for file in sorted(folder.glob("*.safetensors")))


def _has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, by step."""
    return [path for path in _by_step(directory) if is_complete(path)]


def _by_step(directory: Path) -> list[Path]:
    return sorted((path for path in directory.glob("checkpoint-*") if _NAME.fullmatch(path.name)), key=step_of)


def incomplete_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints whose weights were written, but are damaged; not those whose weights were removed."""
    return [path for path in _by_step(directory) if (path / MANIFEST).is_file() and not is_complete(path)]


def newest_state(directory: Path, log: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint whose state is complete and as it was written; None where there is none. `log` gets
    the reason why a newer one is skipped."""
    for path in reversed(_by_step(directory)):
        if not (problem := _problem_of_state(path)):
            return path
        log(f"{path}: not resumed from: {problem}")
    return None


def check_state(path: Path) -> None:
    """Raise UserError where a checkpoint has no state to resume from, or the state is incomplete or has changed."""
    if problem := _problem_of_state(path):
        raise UserError(f"{path}: cannot be resumed from: {problem}")


def _problem_of_state(path: Path) -> str | None:
    state = path / STATE
    if not path.is_dir():
        return "it is not there"
    if not state.is_dir():
        return "it holds weights alone, without state/"
    if not is_complete(state):
        return "files of state/ are missing or cut off"
    if broken := broken_files(state):
        return f"{STATE}/{broken[0]} is not what its hash says"
    return None


def keep_newest_states(directory: Path, number: int) -> None:
    """Remove the state of all checkpoints but the newest `number`, and folders whose weights were removed before."""
    found = [path for path in _by_step(directory) if (path / STATE).is_dir()]
    for path in found[:-number]:
        discard(path / STATE)
        if not (path / MANIFEST).exists():
            discard(path)
