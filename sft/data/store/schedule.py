"""The pieces of a store that is being made: which are finished, which are still to be written.

The records of each raw file are cut into pieces of fixed borders, which one or several processes write. A piece that is
finished is never written again: after a kill the raw file is read on to where it stopped, and an unfinished piece has
left nothing. The pieces are the same for any number of processes.

.<dataset>.pieces/<file>-<number>/  a finished piece, see `sft.data.store.pieces`
                  failed.json       the `max_skip_share` that was not enough
                  <digest>          an empty file, named after what the pieces are made for
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from sft.core.files import discard
from sft.core.parallel import ordered_map
from sft.core.sample import ImageRef, SkipSample
from sft.data.datasets import Adapter
from sft.data.formats import Row
from sft.data.store.image_files import IMAGE_FILES, changed_image_files
from sft.data.store.pieces import Counts, PieceTask, Settings, read_piece, write_piece

PIECE_RECORDS = 4096
PIECE_BYTES = 48 * 1024 * 1024
"""A piece ends at so many records or bytes of them, whichever is first; a process holds one piece in memory."""

EARLY_RECORDS = 2000  # after so many records of which most are bad, more of them will not help

FAILED = "failed.json"

Finished = dict[int, dict[int, tuple[Counts, bool]]]
"""For each raw file, by the number of each finished piece, its counts and whether the file ends with it."""

OnRecords = Callable[[int, float], None]  # called with the records done so far, and the share of all raw bytes


def pieces_folder(path: Path) -> Path:
    """Return the folder of the unfinished work on the store `path`."""
    return path.with_name(f".{path.name}.pieces")


def open_pieces(path: Path, plan: list[Any], max_skip_share: float) -> Path:
    """Return the folder of unfinished work, emptied unless it was begun for the same plan. After too many bad records,
    pieces with some are kept only for whoever allows more of them now; else something was mended, if only in the
    adapter."""
    pieces = pieces_folder(path)
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    if not (pieces / digest).is_file():
        discard(pieces)
        pieces.mkdir(parents=True)
        (pieces / digest).touch()
    if (pieces / FAILED).is_file():
        if max_skip_share <= json.loads((pieces / FAILED).read_text()):
            for piece in piece_folders(pieces):
                if read_piece(piece)[0].skipped:
                    discard(piece)
        (pieces / FAILED).unlink()
    return pieces


def piece_folders(pieces: Path) -> list[Path]:
    """Return the finished pieces, in order. A hidden folder is one that was being written, whatever it holds."""
    return sorted(piece.parent for piece in pieces.glob("[0-9]*/piece.json"))


def write_pieces(
    raw: Adapter, files: Sequence[Path], pieces: Path, settings: Settings, on_progress: OnRecords
) -> Counts | None:
    """Write the missing pieces; return the counts so far if that was given up because most records are bad."""
    finished = _finished_pieces(pieces)
    done = Counts.total(counts for of_file in finished.values() for counts, _ in of_file.values())
    missing = _missing_pieces(raw, files, pieces, finished, settings)
    for counts, share in ordered_map(write_piece, missing, settings.num_proc):
        done.add(counts)
        on_progress(done.records, share)
        if done.records >= EARLY_RECORDS and done.skip_share > max(0.5, settings.max_skip_share):
            return done
    return None


def _missing_pieces(
    raw: Adapter, files: Sequence[Path], pieces: Path, finished: Finished, settings: Settings
) -> Iterator[PieceTask]:
    """Yield the pieces that are still to be written, in order."""
    sizes = [file.stat().st_size for file in files]
    whole = max(sum(sizes), 1)
    left = settings.limit
    for number, file in enumerate(files):
        if left is not None and left <= 0:
            return
        own = finished.get(number, {})
        records = 0
        if _is_whole(own):
            records = sum(counts.records for counts, _ in own.values())
        else:
            for block, (rows, is_last) in enumerate(_blocks(islice(raw.rows(file), left))):
                if block not in own:
                    share = 1.0 if is_last else _share_read(rows)
                    yield PieceTask(
                        adapter=raw,
                        rows=rows,
                        first=records,
                        is_last=is_last,
                        share_read=(sum(sizes[:number]) + share * sizes[number]) / whole,
                        path=pieces / f"{number:05d}-{block:06d}",
                        settings=settings,
                    )
                records += len(rows)
        left = None if left is None else left - records


def _share_read(rows: Sequence[Row | SkipSample]) -> float:
    """Return how much of its file was read with the last of these rows: `__at__`, if the adapter keeps it."""
    return next((row["__at__"] for row in reversed(rows) if isinstance(row, dict) and "__at__" in row), 0.0)


def _blocks(rows: Iterable[Row | SkipSample]) -> Iterator[tuple[list[Row | SkipSample], bool]]:
    """Yield rows in blocks of PIECE_RECORDS or PIECE_BYTES, and whether it is the last; no rows make an empty block."""
    block: list[Row | SkipSample] = []
    num_bytes = 0
    for row in rows:
        if len(block) >= PIECE_RECORDS or num_bytes >= PIECE_BYTES:
            yield block, False
            block, num_bytes = [], 0
        block.append(row)
        num_bytes += _num_bytes(row)
    yield block, True


def _num_bytes(row: object) -> int:
    """Return about the size of a row: of its texts and bytes, however deep they are."""
    num_bytes, waiting = 0, [row]
    while waiting:
        value = waiting.pop()
        if isinstance(value, ImageRef):
            value = value.source
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)
        else:
            num_bytes += len(value) if isinstance(value, str | bytes) else 8
    return num_bytes


def _finished_pieces(pieces: Path) -> Finished:
    """Return the finished pieces of each raw file, by number; several processes may have finished a later one first. A
    piece whose image files have changed since is removed."""
    finished: Finished = defaultdict(dict)
    for piece in piece_folders(pieces):
        if any(changed_image_files(piece / IMAGE_FILES)):
            discard(piece)
            continue
        file_number, _, number = piece.name.partition("-")
        finished[int(file_number)][int(number)] = read_piece(piece)[:2]
    return finished


def _is_whole(finished: dict[int, tuple[Counts, bool]]) -> bool:
    """Return whether these are all the pieces of their raw file."""
    return bool(finished) and len(finished) == max(finished) + 1 and finished[max(finished)][1]
