"""Raw files -> a finished store, piece by piece.

The records of each raw file are cut into pieces of fixed borders; pieces are written by one or several processes and
joined at the end. A piece that is finished is never written again: after a kill the raw file is read on to where it
stopped, and an unfinished piece has left nothing. The result is the same for any number of processes.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from sft.core.errors import RunError, UserError
from sft.core.files import discard, hash_file, remove_leftovers, staged
from sft.core.parallel import ordered_map
from sft.core.sample import ImageRef, Sample, SkipSample
from sft.data.formats import MAX_RECORD_BYTES, Row, record_limit
from sft.data.store.image_files import IMAGE_FILES, changed_image_files, stamp_of
from sft.data.store.join import join_pieces
from sft.data.store.pieces import Counts, Images, Piece, Verify, read_piece, write_piece
from sft.data.store.read import MANIFEST, VERSION, Store, is_store_folder

PIECE_RECORDS = 4096
PIECE_BYTES = 48 * 1024 * 1024
"""A piece ends at so many records or bytes of them, whichever is first; a process holds one piece in memory."""

EARLY_RECORDS = 2000
"""After so many records of which most are bad, more of them will not help."""

_FAILED = "failed.json"
"""In the folder of pieces: the `max_skip_share` that was not enough."""

Progress = Callable[[int, float], None]
"""Called with the records done so far, and the share of all raw bytes."""


class RawDataset(Protocol):
    """What a store is made from; `sft.data.datasets.Adapter` is one."""

    name: str

    @property
    def version(self) -> int:
        """Raised when the same records become other samples."""

    @property
    def licence(self) -> str:
        """Of the data."""

    def files(self) -> list[Path]:
        """The raw files, in a fixed order."""

    def all_files(self) -> list[Path]:
        """The raw files and whatever else the rows are read from."""

    def rows(self, file: Path) -> Iterable[Row | SkipSample]:
        """The raw records of a file."""

    def to_sample(self, row: Row) -> Sample:
        """One record as a sample."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a store is made."""

    images: Images = "embed"
    """`embed`: their bytes are copied into the store. `reference`: image files stay where they are."""
    verify: Verify = "decode"
    """`decode`: each distinct image is decoded once. `header`: only its header is read."""
    limit: int | None = None
    """Only the first so many records."""
    max_record_bytes: int = MAX_RECORD_BYTES
    max_skip_share: float = 0.05
    """More bad records than this are a failure."""
    num_proc: int = 1
    fresh: bool = False
    """Make it anew, whatever is there."""


def prepare_store(
    raw: RawDataset,
    path: Path,
    *,
    asked: dict[str, Any],
    settings: Settings,
    on_progress: Progress = lambda records, share: None,
    called: str | None = None,
) -> Store:
    """Make the store of a dataset, or open the finished one that was made of the same files in the same way.

    `asked` is what the user asked for and is written into the manifest. The store has one writer: the caller locks.
    `called` is what messages about its records call the dataset; left out, by the name of its store.

    Raises:
        UserError: the store there was made by another version of the adapter or of this code, or is damaged; or
            something else is there; or more than `max_skip_share` of the records are bad, or no sample is left.
        RunError: a raw file was changed while it was read.
    """
    called = called or path.name
    files, all_files = raw.files(), raw.all_files()
    wanted = {"adapter": {"name": raw.name, "version": raw.version}, "asked": asked} | {
        key: value for key, value in asdict(settings).items() if key in ("images", "limit", "max_record_bytes")
    }
    if (path / MANIFEST).is_file() and not settings.fresh:
        store = Store(path)
        _check_adapter(store, raw)
        if _is_of(store, wanted, settings.verify) and not store.changed_files(all_files):
            _check_share(Counts.from_json(store.manifest), called, path / "skips.jsonl", settings.max_skip_share)
            _clean_up(path)
            return store
    _check_ours(path)
    if settings.fresh:
        discard(path)
        discard(_staging(path))
    stamps = [_stamp(file) for file in all_files]
    pieces = _open_staging(path, wanted | {"verify": settings.verify, "files": stamps}, settings.max_skip_share)
    with record_limit(settings.max_record_bytes):
        early = _write_pieces(raw, files, pieces, settings, on_progress)
    _check_unchanged(stamps, pieces)
    finished = _piece_folders(pieces)
    counts = early or Counts()
    for piece in [] if early else finished:
        counts.add(read_piece(piece)[0])
    _check_counts(counts, called, _skips_of_failure(path), pieces, settings.max_skip_share)
    entries = [
        stamp | {"xxh3": hash_file(file) if file.is_file() else None}
        for file, stamp in zip(all_files, stamps, strict=True)
    ]
    _check_unchanged(stamps, pieces)
    with staged(path) as target:
        counts.distinct_images = join_pieces(finished, target)
        manifest = {
            "version": VERSION,
            **wanted,
            "verify": settings.verify,
            "files": entries,
            **counts.to_json(),
            "licence": raw.licence,
            "versions": {name: version(name) for name in ("idefics-sft", "pyarrow", "pillow")},
        }
        (target / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    _clean_up(path)
    return Store(path)


def _clean_up(path: Path) -> None:
    """Remove what is of no use beside a finished store: leftovers of a kill, the skips of a failure."""
    discard(_staging(path))
    for place in (path, _staging(path)):
        remove_leftovers(place)
    _skips_of_failure(path).unlink(missing_ok=True)


def _check_ours(path: Path) -> None:
    """What is no store is not removed to make room for one."""
    if path.exists() and not is_store_folder(path) and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path}: is there already and is no prepared dataset; choose another folder")


def _check_unchanged(stamps: Sequence[dict[str, Any]], pieces: Path) -> None:
    for stamp in stamps:
        if stamp_of(Path(stamp["path"])) != (stamp["bytes"], stamp["mtime_ns"]):
            discard(pieces)
            raise RunError(f"{stamp['path']}: changed while it was read; prepare again")


def _check_adapter(store: Store, raw: RawDataset) -> None:
    made_by = store.manifest["adapter"]
    if made_by != {"name": raw.name, "version": raw.version}:
        raise UserError(
            f"{store.path}: made by version {made_by['version']} of the adapter {made_by['name']!r}, this is version "
            f"{raw.version} of {raw.name!r}; prepare with --fresh to make it anew"
        )


def _is_of(store: Store, wanted: dict[str, Any], verify: Verify) -> bool:
    """Whether a finished store is what is wanted; images that were decoded are also good enough for `header`."""
    manifest = store.manifest
    return all(manifest[key] == value for key, value in wanted.items()) and manifest["verify"] in ("decode", verify)


def _stamp(file: Path) -> dict[str, Any]:
    stat = file.stat()
    return {"path": str(file.absolute()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _staging(path: Path) -> Path:
    return path.with_name(f".{path.name}.pieces")


def _skips_of_failure(path: Path) -> Path:
    return path.with_name(f"{path.name}.skips.jsonl")


def _open_staging(path: Path, plan: dict[str, Any], max_skip_share: float) -> Path:
    """The folder of unfinished work: emptied unless it was begun for the same plan.

    After too many bad records, pieces with some are kept only for whoever allows more of them now; else something was
    mended, if only in the adapter.
    """
    pieces = _staging(path)
    digest = hashlib.sha256(json.dumps([VERSION, plan], sort_keys=True).encode()).hexdigest()
    if not (pieces / digest).is_file():
        discard(pieces)
        pieces.mkdir(parents=True)
        (pieces / digest).touch()
    if (pieces / _FAILED).is_file():
        if max_skip_share <= json.loads((pieces / _FAILED).read_text()):
            for piece in _piece_folders(pieces):
                if read_piece(piece)[0].skipped:
                    discard(piece)
        (pieces / _FAILED).unlink()
    return pieces


def _piece_folders(pieces: Path) -> list[Path]:
    """The finished pieces, in order. A hidden folder is one that was being written, whatever it holds."""
    return sorted(piece.parent for piece in pieces.glob("[0-9]*/piece.json"))


def _write_pieces(
    raw: RawDataset, files: Sequence[Path], pieces: Path, settings: Settings, on_progress: Progress
) -> Counts | None:
    """Write the missing pieces; return the counts so far if that was given up because most records are bad."""
    finished = _finished_pieces(pieces)
    done = Counts()
    for of_file in finished.values():
        for counts, _ in of_file.values():
            done.add(counts)
    missing = _missing_pieces(raw, files, pieces, finished, settings)
    for counts, share in ordered_map(_write, missing, settings.num_proc):
        done.add(counts)
        on_progress(done.records, share)
        if done.records >= EARLY_RECORDS and done.skip_share > max(0.5, settings.max_skip_share):
            return done
    return None


def _write(piece: Piece) -> tuple[Counts, float]:
    return write_piece(piece), piece.share_read


def _missing_pieces(
    raw: RawDataset,
    files: Sequence[Path],
    pieces: Path,
    finished: dict[int, dict[int, tuple[Counts, bool]]],
    settings: Settings,
) -> Iterator[Piece]:
    """The pieces that are still to be written, in order."""
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
                    yield Piece(
                        adapter=raw,
                        rows=rows,
                        first=records,
                        is_last=is_last,
                        share_read=(sum(sizes[:number]) + share * sizes[number]) / whole,
                        path=pieces / f"{number:05d}-{block:06d}",
                        images=settings.images,
                        verify=settings.verify,
                    )
                records += len(rows)
        left = None if left is None else left - records


def _share_read(rows: Sequence[Row | SkipSample]) -> float:
    """How much of its file was read when the last of these rows was; what an adapter keeps of `__at__` tells."""
    return next((row["__at__"] for row in reversed(rows) if isinstance(row, dict) and "__at__" in row), 0.0)


def _blocks(rows: Iterable[Row | SkipSample]) -> Iterator[tuple[list[Row | SkipSample], bool]]:
    """Rows in blocks of PIECE_RECORDS or PIECE_BYTES, and whether it is the last; no rows make one empty block."""
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
    """About the size of a row: of its texts and bytes, however deep they are."""
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


def _finished_pieces(pieces: Path) -> dict[int, dict[int, tuple[Counts, bool]]]:
    """The finished pieces of each raw file, by number; of those written side by side a later one may be done first.
    One of image files that changed since is removed."""
    finished: dict[int, dict[int, tuple[Counts, bool]]] = defaultdict(dict)
    for piece in _piece_folders(pieces):
        if any(changed_image_files(piece / IMAGE_FILES)):
            discard(piece)
            continue
        file_number, _, number = piece.name.partition("-")
        finished[int(file_number)][int(number)] = read_piece(piece)
    return finished


def _is_whole(finished: dict[int, tuple[Counts, bool]]) -> bool:
    """Whether these are all the pieces of their raw file."""
    return bool(finished) and len(finished) == max(finished) + 1 and finished[max(finished)][1]


def _check_counts(counts: Counts, called: str, listed: Path, pieces: Path, max_skip_share: float) -> None:
    """Stop when too much is bad, or nothing is left. The list of skips stays; so do the pieces, see `_open_staging`."""
    if counts.samples and counts.skip_share <= max_skip_share:
        return
    with listed.open("wb") as file:
        for piece in _piece_folders(pieces):
            file.write((piece / "skips.jsonl").read_bytes())
    (pieces / _FAILED).write_text(json.dumps(max_skip_share))
    _check_share(counts, called, listed, max_skip_share)
    discard(pieces)
    raise UserError(
        f"{called}: none of {counts.records:,} records is left: {_table(counts.filtered + counts.skipped, counts)}"
    )


def _check_share(counts: Counts, called: str, listed: Path, max_skip_share: float) -> None:
    if counts.skip_share > max_skip_share:
        raise UserError(
            f"{called}: {counts.skip_share:.1%} of {counts.records:,} records bad (allowed: {max_skip_share:.1%}): "
            f"{_table(counts.skipped, counts)}; all of them: {listed}"
        )


def _table(reasons: Any, counts: Counts) -> str:
    return ", ".join(f"{n:,} {reason} (as {counts.examples[reason]})" for reason, n in reasons.most_common())
