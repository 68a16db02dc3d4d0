"""Images of a benchmark that stand in prepared datasets: a model that was trained on them is not tested by them.

By content: the same bytes, by their sha256. By sight: the same picture, scaled or compressed anew, by the 64 bits of a
perceptual hash (`imagehash.phash`: which of the 64 lowest frequencies are above their median, so that 32 bits are set).
A picture that lies under two hashes at most MAX_DISTANCE bits apart is the same one.

Shape letters: B images of the benchmark, S images of a piece of a store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.core import images
from sft.core.errors import UserError
from sft.core.parallel import ordered_map
from sft.core.sample import AS_SHOWN, Decoding, ImageRef, SkipSample
from sft.data.store import Store
from sft.data.store.image_keys import image_key
from sft.evaluation.task import PromptedTask, Task

MAX_DISTANCE = 6
"""Bits. Of 32 photographs, every copy made by JPEG at quality 20 to 90, by scaling to a quarter, a half or a square, in
grey, brighter by a fifth, of less contrast or cut by 1 % at each side is within 6 bits; different ones are 31.3 bits
apart, with a standard deviation of 4.0, and never under 18. Two random hashes of 32 set bits are within 6 once in
7.4e10 pairs: less than once for 1,164 images against ten million; within 8, once in 1.4e9. A larger cut (5 % at each
side) or a mirrored copy is not found."""
_MIN_BITS = 16
"""A hash with fewer bits set is of a picture without features (one colour has 0 or 1), as all of them have."""
_PIECE = 256
"""Images of a store that are compared at once: B x 256 distances."""


class Hash(NamedTuple):
    """The perceptual hash of an image."""

    bits: int
    has_features: bool


def perceptual_hash(content: bytes, decoding: Decoding = AS_SHOWN) -> Hash:
    """Return the perceptual hash of an encoded image.

    Raises:
        SkipSample: it does not decode.
    """
    import imagehash

    flags = imagehash.phash(images.decode_rgb(content, decoding)).hash.ravel()
    bits = int.from_bytes(np.packbits(flags).tobytes(), "big")
    return Hash(bits, has_features=int(flags.sum()) >= _MIN_BITS)


@dataclass(frozen=True, kw_only=True)
class BenchmarkImages:
    """The distinct images of a benchmark."""

    sha256s: tuple[str, ...]
    questions: tuple[tuple[int | str, ...], ...]
    """The names of the questions about each; the passes of a question share theirs."""
    hashes_B: NDArray[np.uint64]
    has_features_B: NDArray[np.bool_]


def benchmark_images(*tasks: Task) -> BenchmarkImages:
    """Return the images of the tasks' items.

    Raises:
        UserError: an image is missing or does not decode.
    """
    items: dict[ImageRef, dict[int | str, None]] = {}
    for task in tasks:
        if isinstance(task, PromptedTask):
            for item, queries in zip(task.items, task.all_queries(), strict=True):
                for image in (image for query in queries for image in query.sample.images):
                    items.setdefault(image, {})[item.id] = None
    shown: dict[str, dict[int | str, None]] = {}
    hashes: dict[str, Hash] = {}
    for image, names in items.items():
        content = images.read_bytes(image)
        sha256 = hashlib.sha256(content).hexdigest()
        shown[sha256] = shown.get(sha256, {}) | names
        hashes.setdefault(sha256, perceptual_hash(content))
    return BenchmarkImages(
        sha256s=tuple(shown),
        questions=tuple(tuple(indices) for indices in shown.values()),
        hashes_B=np.array([found.bits for found in hashes.values()], dtype=np.uint64),
        has_features_B=np.array([found.has_features for found in hashes.values()], dtype=np.bool_),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Leak:
    """An image of the benchmark that a store has."""

    by: Literal["content", "sight"]
    distance: int
    """Bits by which the perceptual hashes differ."""
    image_sha256: str
    """In the benchmark."""
    questions: tuple[int | str, ...]
    """Their names in the benchmark."""
    row: int
    """In the store's images/."""
    samples: tuple[str, ...]
    """Keys of the samples that show it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreLeaks:
    """What a store has of a benchmark."""

    store: str
    images: int
    unreadable: int
    """Images of the store that could not be read any more, so that nothing is known of them."""
    leaks: tuple[Leak, ...]


class _Near(NamedTuple):
    """An image of a store that looks like one of the benchmark."""

    row: int
    number: int
    distance: int


def find_leaks(
    benchmark: BenchmarkImages,
    path: Path,
    *,
    num_proc: int = 1,
    on_progress: Callable[[int], None] = lambda images: None,
) -> StoreLeaks:
    """Compare every image of a store with every image of a benchmark, in `num_proc` processes.

    Memory: one image and 256 x B distances a process; nothing grows with the store but the leaks that are found.

    Raises:
        UserError: there is no finished store at `path`.
    """
    store = Store(path)
    same = {row: number for number, row in _same_content(benchmark, store)}
    near: list[_Near] = []
    unreadable = 0
    pieces = range(0, store.num_images, _PIECE)
    for first, (found, failed) in zip(
        pieces, ordered_map(partial(_compare, benchmark, store), pieces, num_proc), strict=True
    ):
        near += [hit for hit in found if same.get(hit.row) != hit.number]
        unreadable += failed
        on_progress(min(first + _PIECE, store.num_images))
    samples = _samples_showing(store, same.keys() | {hit.row for hit in near})
    hits = [("content", _Near(row, number, 0)) for row, number in same.items()] + [("sight", hit) for hit in near]
    return StoreLeaks(
        store=str(path),
        images=store.num_images,
        unreadable=unreadable,
        leaks=tuple(
            Leak(
                by=by,  # type: ignore[arg-type]
                distance=hit.distance,
                image_sha256=benchmark.sha256s[hit.number],
                questions=benchmark.questions[hit.number],
                row=hit.row,
                samples=tuple(samples.get(hit.row, ())),
            )
            for by, hit in sorted(hits, key=lambda hit: (hit[1].number, hit[1].distance, hit[1].row))
        ),
    )


def _same_content(benchmark: BenchmarkImages, store: Store) -> Iterator[tuple[int, int]]:
    """Yield (number in the benchmark, row in the store) of images of the same bytes."""
    for number, sha256 in enumerate(benchmark.sha256s):
        if (row := store.find_image(image_key(sha256))) is not None:
            yield number, row


def _compare(benchmark: BenchmarkImages, store: Store, first: int) -> tuple[list[_Near], int]:
    """Return what looks like an image of the benchmark among _PIECE images of a store, and how many could not be
    read."""
    rows, hashes, unreadable = [], [], 0
    for row in range(first, min(first + _PIECE, store.num_images)):
        try:
            found = perceptual_hash(store.image_bytes(row), store.decoding)
        except SkipSample:
            unreadable += 1
            continue
        if found.has_features:
            rows.append(row)
            hashes.append(found.bits)
    distances_SB = np.bitwise_count(np.array(hashes, dtype=np.uint64)[:, None] ^ benchmark.hashes_B)
    places = np.argwhere((distances_SB <= MAX_DISTANCE) & benchmark.has_features_B)
    near = [_Near(rows[place], int(number), int(distances_SB[place, number])) for place, number in places.tolist()]
    return near, unreadable


def _samples_showing(store: Store, rows: set[int]) -> dict[int, list[str]]:
    """Return, for rows of images/, the keys of the samples that show them."""
    showing: dict[int, list[str]] = {}
    if rows:
        for sample, shown in store.stored_samples():
            for row in rows.intersection(shown):
                showing.setdefault(row, []).append(sample.key)
    return showing


def check_imagehash() -> None:
    """
    Raises:
        UserError: the library of perceptual hashes is not installed.
    """
    try:
        import imagehash  # noqa: F401
    except ImportError as error:
        raise UserError("leaks: needs the library imagehash; pip install 'idefics-sft[evaluation]'") from error


def summary(name: str, benchmark: BenchmarkImages, found: Sequence[StoreLeaks]) -> dict[str, Any]:
    """Return counts and ids, as `idefics-sft leaks --json` prints them."""
    leaked = {leak.image_sha256: leak.questions for store in found for leak in store.leaks}
    return {
        "benchmark": name,
        "images": len(benchmark.sha256s),
        "questions": len({index for indices in benchmark.questions for index in indices}),
        "images_without_features": int((~benchmark.has_features_B).sum()),
        "max_distance": MAX_DISTANCE,
        "leaked_images": len(leaked),
        "leaked_questions": len({index for indices in leaked.values() for index in indices}),
        "stores": [
            {
                "store": store.store,
                "images": store.images,
                "unreadable": store.unreadable,
                "by_content": len({leak.image_sha256 for leak in store.leaks if leak.by == "content"}),
                "by_sight": len({leak.image_sha256 for leak in store.leaks if leak.by == "sight"}),
                "leaks": [asdict(leak) for leak in store.leaks],
            }
            for store in found
        ],
    }
