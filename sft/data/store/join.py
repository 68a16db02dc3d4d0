"""Finished pieces -> the two tables of a store, each distinct image once.

The hashes of all images are kept in a file rather than in a set; what stays in memory is about 40 bytes an image.
Image bytes are not written again: the file of a piece becomes a file of the table under a second name, unless some of
its images already stand in an earlier piece.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sft.core.files import link_or_copy
from sft.data.store.image_files import IMAGE_FILES, join_image_files
from sft.data.store.image_keys import write_image_keys
from sft.data.store.pieces import read_noted, read_piece
from sft.data.store.tables import IMAGES, SAMPLES, TableWriter, batches_of, finish_table, renumber_images

_HASH_WORDS = 4
"""sha256 is four words of 64 bits."""


def join_pieces(pieces: Sequence[Path], target: Path) -> tuple[int, Counter[str]]:
    """Write samples/, images/ and the keys of the images into the folder `target`, in the order of the pieces; return
    the number of distinct images, and of how many of them each thing was noted. The pieces are left as they are: an
    interrupted join can begin again."""
    num_images = [read_piece(piece)[0].distinct_images for piece in pieces]
    starts = [0, *accumulate(num_images)]
    noted: Counter[str] = Counter()
    is_kept, row_of = _distinct(pieces, starts, target)
    (target / "samples").mkdir()
    (target / "images").mkdir()
    for number, (piece, start, stop) in enumerate(zip(pieces, starts, starts[1:], strict=False)):
        name = f"{number:08d}.arrow"
        _join_images(piece / "images.arrow", is_kept[start:stop], target / "images" / name)
        _join_samples(piece / "samples.arrow", row_of[start:stop], target / "samples" / name)
        for note, rows in read_noted(piece).items():
            noted[note] += int(is_kept[start:stop][rows].sum())
        with (target / "skips.jsonl").open("ab") as joined, (piece / "skips.jsonl").open("rb") as own:
            shutil.copyfileobj(own, joined)
    join_image_files([piece / IMAGE_FILES for piece in pieces], target / IMAGE_FILES)
    finish_table(target / "samples", SAMPLES)
    finish_table(target / "images", IMAGES)
    return int(is_kept.sum()), noted


def _distinct(
    pieces: Sequence[Path], starts: Sequence[int], target: Path
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Return, for every image of all pieces, end to end, whether it is the first with its content, and the row its
    content gets."""
    total = starts[-1]
    if not total:
        write_image_keys(target, np.empty(0, np.uint64))
        return np.empty(0, bool), np.empty(0, np.int64)
    scratch = target / "hashes.bin"
    hashes = np.memmap(scratch, np.uint64, "w+", shape=(_HASH_WORDS, total))
    for piece, start in zip(pieces, starts, strict=False):
        for batch in batches_of(piece / "images.arrow"):
            digests = bytes.fromhex("".join(batch.column(0).to_pylist()))
            words = np.frombuffer(digests, np.uint64).reshape(-1, _HASH_WORDS)
            hashes[:, start : start + len(words)] = words.T
            start += len(words)
    order = np.lexsort(hashes)  # stable: among equals the first stays first
    differs = np.ones(total, bool)
    differs[1:] = False
    for words in hashes:
        in_order = words[order]
        differs[1:] |= in_order[1:] != in_order[:-1]
    first_of = order[np.maximum.accumulate(np.where(differs, np.arange(total), 0))]
    is_kept = np.zeros(total, bool)
    is_kept[first_of] = True
    row_of = np.empty(total, np.int64)
    row_of[order] = (np.cumsum(is_kept) - 1)[first_of]
    write_image_keys(target, hashes[0][is_kept])
    scratch.unlink()
    return is_kept, row_of


def _join_images(file: Path, is_kept: NDArray[np.bool_], target: Path) -> None:
    if is_kept.all():
        if len(is_kept):
            link_or_copy(file, target)
    elif is_kept.any():
        start = 0
        with TableWriter(target, IMAGES) as table:
            for batch in batches_of(file):
                table.write_batch(batch.filter(pa.array(is_kept[start : start + batch.num_rows])))
                start += batch.num_rows


def _join_samples(file: Path, rows: NDArray[np.int64], target: Path) -> None:
    batches = batches_of(file)
    if not batches:
        return
    if not len(rows):
        link_or_copy(file, target)
        return
    with TableWriter(target, SAMPLES) as table:
        for batch in batches:
            table.write_batch(renumber_images(batch, rows))
