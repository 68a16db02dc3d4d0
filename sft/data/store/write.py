"""Raw files -> a finished store: checked before its pieces are written, meanwhile and afterwards."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sft.core.errors import RunError, UserError
from sft.core.files import discard, hash_file, location, remove_leftovers, staged
from sft.core.shipped import resolve
from sft.data.datasets import Adapter
from sft.data.formats import record_limit
from sft.data.store.image_files import stamp_of
from sft.data.store.join import join_pieces
from sft.data.store.pieces import Counts, Settings, read_piece
from sft.data.store.read import MANIFEST, VERSION, Store, is_store_folder
from sft.data.store.schedule import FAILED, OnRecords, open_pieces, piece_folders, pieces_folder, write_pieces

NOTABLE_BYTES = 10**6  # work of fewer bytes is kept without a word


def prepare_store(
    raw: Adapter,
    path: Path,
    *,
    asked: dict[str, Any],
    settings: Settings,
    on_progress: OnRecords = lambda records, share: None,
    called: str | None = None,
) -> Store:
    """Make the store of a dataset, or open the finished one that was made of the same files in the same way.

    `asked` is what the user asked for and is written into the manifest. The store has one writer: the caller locks.
    `called` is what messages about its records call the dataset; left out, by the name of its store.

    Raise UserError where the store there was made by another version of the adapter or of this code, or is damaged; or
    something else is there; or more than `max_skip_share` of the records are bad, or no sample is left. Raise RunError
    where a raw file was changed while it was read.
    """
    called = called or path.name
    files, all_files = raw.files(), raw.all_files()
    wanted = _wanted(raw, asked, settings)
    if not settings.fresh and (store := _finished_store(path, raw, all_files, wanted, settings)):
        _check_share(Counts.from_json(store.manifest), called, path / "skips.jsonl", settings.max_skip_share)
        _clean_up(path)
        return store
    _check_ours(path)
    if settings.fresh:
        discard(path)
        discard(pieces_folder(path))
    stamps = [_stamp(file) for file in all_files]
    plan = wanted | {"verify": settings.verify, "files": stamps}
    pieces = open_pieces(path, [VERSION, plan], settings.max_skip_share)
    with _explain_leftover(pieces):
        with record_limit(settings.max_record_bytes):
            early = write_pieces(raw, files, pieces, settings, on_progress)
        _check_unchanged(stamps, pieces)
        counts = early or Counts.total(read_piece(piece)[0] for piece in piece_folders(pieces))
        _check_counts(counts, called, _skips_of_failure(path), pieces, settings.max_skip_share)
    hashes = [hash_file(file) if file.is_file() else None for file in all_files]
    _check_unchanged(stamps, pieces)
    with staged(path) as target:
        counts.distinct_images, noted = join_pieces(piece_folders(pieces), target)
        entries = [stamp | {"xxh3": xxh3} for stamp, xxh3 in zip(stamps, hashes, strict=True)]
        _write_manifest(target, raw, wanted | {"image_notes": noted}, settings, entries, counts)
    _clean_up(path)
    return Store(path)


@contextmanager
def _explain_leftover(pieces: Path) -> Iterator[None]:
    """Add to a UserError what is kept of the work: the folder is hidden."""
    try:
        yield
    except UserError as error:
        num_bytes = sum(file.stat().st_size for piece in piece_folders(pieces) for file in piece.iterdir())
        if not num_bytes:
            discard(pieces)
        if num_bytes < NOTABLE_BYTES:
            raise
        kept = f"{pieces} keeps {num_bytes:,} bytes of finished work, from which the next run goes on"
        raise UserError(*error.args[:-1], f"{error.args[-1]}; {kept}") from error


def _wanted(raw: Adapter, asked: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Return what a store has to be made of and how, as its manifest says it."""
    how = {key: value for key, value in asdict(settings).items() if key in ("images", "limit", "max_record_bytes")}
    made = {"adapter": {"name": raw.name, "version": raw.version}, "asked": _located(asked, raw.files())}
    return {**made, **how, **asdict(settings.decoding)}


def _located(asked: dict[str, Any], files: Sequence[Path] = ()) -> dict[str, Any]:
    """Return what was asked for with the `location` of its path: that of the file where a folder holds one alone."""
    path = asked.get("path")
    if not isinstance(path, str) or not resolve(path).exists():
        return asked
    own, found = location(resolve(path)), list(map(location, files))
    return {**asked, "path": str(found[0] if len(found) == 1 and found[0].parent == own else own)}


def _finished_store(
    path: Path, raw: Adapter, all_files: Sequence[Path], wanted: dict[str, Any], settings: Settings
) -> Store | None:
    """Return the finished store that is there, if it is what is wanted and no file has changed since; raise UserError
    where it was made by another version of the adapter, or is damaged."""
    if not (path / MANIFEST).is_file():
        return None
    store = Store(path)
    _check_adapter(store, raw)
    is_wanted = all(store.manifest[key] == value for key, value in wanted.items())
    is_verified = store.manifest["verify"] in ("decode", settings.verify)  # decoded is good enough for `header`
    return store if is_wanted and is_verified and not store.changed_files(all_files) else None


def _write_manifest(
    target: Path, raw: Adapter, wanted: dict[str, Any], settings: Settings, files: list[dict[str, Any]], counts: Counts
) -> None:
    manifest = {
        "version": VERSION,
        **wanted,
        "verify": settings.verify,
        "files": files,
        **counts.to_json(),
        "licence": raw.licence,
        "versions": {name: version(name) for name in ("idefics-sft", "pyarrow", "pillow")},
    }
    (target / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _clean_up(path: Path) -> None:
    """Remove what a finished store makes useless: leftovers of a kill, the skips of a failure."""
    discard(pieces_folder(path))
    for place in (path, pieces_folder(path)):
        remove_leftovers(place)
    _skips_of_failure(path).unlink(missing_ok=True)


def _check_ours(path: Path) -> None:
    """Refuse to remove what is no store to make room for one."""
    if path.exists() and not is_store_folder(path) and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path}: is there already and is no prepared dataset; choose another folder")


def _check_unchanged(stamps: Sequence[dict[str, Any]], pieces: Path) -> None:
    for stamp in stamps:
        if stamp_of(Path(stamp["path"])) != (stamp["bytes"], stamp["mtime_ns"]):
            discard(pieces)
            raise RunError(f"{stamp['path']}: changed while it was read; prepare again")


def _check_adapter(store: Store, raw: Adapter) -> None:
    made_by = store.manifest["adapter"]
    if made_by != {"name": raw.name, "version": raw.version}:
        found = f"made by version {made_by['version']} of the adapter {made_by['name']!r}"
        ours = f"this is version {raw.version} of {raw.name!r}"
        raise UserError(f"{store.path}: {found}, {ours}; prepare with --fresh to make it anew")


def _stamp(file: Path) -> dict[str, Any]:
    stat = file.stat()
    return {"path": str(location(file)), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _skips_of_failure(path: Path) -> Path:
    return path.with_name(f"{path.name}.skips.jsonl")


def _check_counts(counts: Counts, called: str, listed: Path, pieces: Path, max_skip_share: float) -> None:
    """Stop when too much is bad, or nothing is left. The list of skips stays; so do the pieces, see `open_pieces`."""
    if counts.samples and counts.skip_share <= max_skip_share:
        return
    with listed.open("wb") as file:
        for piece in piece_folders(pieces):
            file.write((piece / "skips.jsonl").read_bytes())
    (pieces / FAILED).write_text(json.dumps(max_skip_share))
    _check_share(counts, called, listed, max_skip_share)
    discard(pieces)
    reasons = _table(counts.filtered + counts.skipped, counts)
    raise UserError(f"{called}: no record of {counts.records:,} is left: {reasons}")


def _check_share(counts: Counts, called: str, listed: Path, max_skip_share: float) -> None:
    if counts.skip_share > max_skip_share:
        share = f"{counts.skip_share * 100:.1f} % of {counts.records:,} record{'s' * (counts.records != 1)} bad"
        why = f"{_table(counts.skipped, counts)}; all of them: {listed}"
        raise UserError(f"{called}: {share} (allowed: {max_skip_share * 100:.1f} %): {why}")


def _table(reasons: Counter[str], counts: Counts) -> str:
    return ", ".join(f"{n:,} {reason} (as {counts.examples[reason]})" for reason, n in reasons.most_common())
