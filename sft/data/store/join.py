"""Finished pieces -> the two tables of a store, each distinct image once.

What stays in memory is about 65 bytes an image and 60 bytes an image file.
Image bytes are not written again: the file of a piece becomes a file of the table under a second name, unless some of
its images already stand in an earlier piece.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from sft.core.files import link_or_copy
from sft.data.store.image_files import IMAGE_FILES
from sft.data.store.image_keys import image_key, write_image_keys
from sft.data.store.pieces import read_piece
from sft.data.store.tables import IMAGES, SAMPLES, TableWriter, batches_of, finish_table, renumber_images


def join_pieces(pieces: Sequence[Path], target: Path) -> tuple[int, Counter[str]]:
    """Write samples/, images/ and the keys of the images into `target`, in the order of the pieces, which are left as
    they are; return the number of distinct images, and of how many of them each thing was noted."""
    starts = [0, *accumulate(read_piece(piece)[0].distinct_images for piece in pieces)]
    noted, listed = Counter[str](), set[int]()
    keys, is_kept, row_of = _distinct(pieces)
    write_image_keys(target, keys[is_kept])
    (target / "samples").mkdir()
    (target / "images").mkdir()
    for number, (piece, start, stop) in enumerate(zip(pieces, starts, starts[1:], strict=False)):
        name = f"{number:08d}.arrow"
        _join_images(piece / "images.arrow", is_kept[start:stop], target / "images" / name)
        _join_samples(piece / "samples.arrow", row_of[start:stop], target / "samples" / name)
        for note, rows in read_piece(piece)[2].items():
            noted[note] += int(is_kept[start:stop][rows].sum())
        with (target / "skips.jsonl").open("ab") as joined, (piece / "skips.jsonl").open("rb") as own:
            shutil.copyfileobj(own, joined)
        with (target / IMAGE_FILES).open("ab") as joined, (piece / IMAGE_FILES).open("rb") as own:
            for line in own:
                if (digest := xxhash.xxh3_64_intdigest(line)) not in listed:
                    listed.add(digest)
                    joined.write(line)
    finish_table(target / "samples", SAMPLES)
    finish_table(target / "images", IMAGES)
    return int(is_kept.sum()), noted


def _distinct(pieces: Sequence[Path]) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
    """Return, for every image of all pieces, end to end, its key, whether it is the first with its content, and the row
    its content gets. Equal keys are equal images, as they are for whoever finds an image by its key."""
    batches = (batch for piece in pieces for batch in batches_of(piece / "images.arrow"))
    keys = np.fromiter((image_key(sha256) for batch in batches for sha256 in batch.column(0).to_pylist()), np.int64)
    _, first, content = np.unique(keys, return_index=True, return_inverse=True)
    is_kept = np.zeros(len(keys), bool)
    is_kept[first] = True
    return keys, is_kept, (np.cumsum(is_kept) - 1)[first][content]


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
