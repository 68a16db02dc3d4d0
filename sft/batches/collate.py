"""Packs -> Batch: the only place where tensors are made and images are decoded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import accumulate, chain
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from sft.core.sample import IGNORE_INDEX, NO_SOURCE, Batch, EncodedSample, PlacedSample, SkipSample, TrainOn

Pixels = NDArray[np.uint8]


class KnownFeatures(Protocol):
    """What is known of images that need not be encoded any more; `sft.batches.feature_cache` has it."""

    @property
    def shape(self) -> tuple[int, int]:
        """States of an image, and their size."""

    def read(self, key: int, out: NDArray[np.float16], /) -> bool:
        """Copy the features of an image; false where they are not known."""


DUMMY = PlacedSample(
    EncodedSample(key="", input_ids=np.zeros(2, np.int64), trained_spans=((0, 2),), image_positions=(0,)),
    images=(-1,),
    source=NO_SOURCE,
)
"""Two tokens that look at a black image, one of them predicted. What belongs to no source has no weight in the loss."""


def collate(
    packs: Sequence[Sequence[PlacedSample]],
    load_pixels: Callable[[int], Pixels],
    *,
    train_on: TrainOn,
    pack_isolation: bool = True,
    image_size: int,
    num_trained_tokens: int | None = None,
    forgive_images: bool = False,
    always_whole: bool = False,
    features: KnownFeatures | None = None,
) -> Batch:
    """Lay the packs of a micro-batch one after another and decode each distinct image once.

    With `pack_isolation` every sample is a segment of its own; without it a whole pack is one, as in 2023: its samples
    see each other, and positions run on. Images are isolated either way. `num_trained_tokens` is that of the whole
    optimizer step; left out, the micro-batch is taken for the step. With `forgive_images` an
    image that fails is zeros and what shows it has no labels; everything else stays as it was planned. With
    `always_whole` a batch without images or labels gets a dummy sample that shows a black image and whose loss counts
    nothing, so that every rank makes the same calls and every parameter gets a gradient. One without samples always
    does. With `features` only images of which these know nothing are decoded; a dummy's and one that fails have zeros.

    Raises:
        SkipSample: an image fails, and `forgive_images` is not set.
    """
    samples = list(chain.from_iterable(packs))
    segments = [[sample] for sample in samples] if pack_isolation else [list(pack) for pack in packs]
    rows = {image: row for row, image in enumerate(dict.fromkeys(chain.from_iterable(s.images for s in samples)))}
    known_NSE, known = _known(rows, features)
    pixels, faults = _pixels([image for image in rows if image not in known], load_pixels, forgive_images)
    dirty = {s.encoded.key: faults[image] for s in samples for image in s.images if image in faults}
    labels = [_labels(s.encoded, train_on, is_dirty=not faults.keys().isdisjoint(s.images)) for s in samples]
    num_labels = sum(int((own != IGNORE_INDEX).sum()) for own in labels)
    pack_lengths = [sum(len(sample.encoded.input_ids) for sample in pack) for pack in packs]
    if not samples or (always_whole and not (rows and num_labels)):
        samples.append(DUMMY)
        segments.append([DUMMY])
        labels.append(_labels(DUMMY.encoded, train_on, is_dirty=False))
        rows |= dict.fromkeys(DUMMY.images, len(rows))
    lengths = [sum(len(sample.encoded.input_ids) for sample in segment) for segment in segments]
    return Batch(
        input_ids_T=torch.from_numpy(np.concatenate([sample.encoded.input_ids for sample in samples])),
        labels_T=torch.from_numpy(np.concatenate(labels)),
        position_ids_T=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        segment_ids_T=torch.from_numpy(np.repeat(np.arange(len(segments)), lengths)),
        image_ids_T=torch.from_numpy(np.concatenate([_image_ids(sample, rows) for sample in samples])),
        source_ids_T=torch.from_numpy(
            np.repeat([sample.source for sample in samples], [len(sample.encoded.input_ids) for sample in samples])
        ),
        pixel_values_NCHW=_laid(rows if known_NSE is None else pixels, pixels, image_size),
        features_NSE=None if known_NSE is None else torch.from_numpy(known_NSE[: len(rows)]),
        to_encode={} if known_NSE is None else {rows[image]: image for image in pixels},
        num_trained_tokens=num_labels if num_trained_tokens is None else num_trained_tokens,
        packs=tuple(tuple(sample.encoded.key for sample in pack) for pack in packs),
        pack_ends=tuple(accumulate(pack_lengths)),
        dirty=dirty,
    )


def _known(
    rows: Mapping[int, int], features: KnownFeatures | None
) -> tuple[NDArray[np.float16] | None, frozenset[int]]:
    """The features of each image, and of a dummy's behind them, zeros where there are none; which images have some."""
    if features is None:
        return None, frozenset()
    found_NSE = np.zeros((len(rows) + 1, *features.shape), np.float16)
    known = frozenset(image for image, row in rows.items() if features.read(image, found_NSE[row]))
    for image in rows.keys() - known:
        found_NSE[rows[image]] = 0
    return found_NSE, known


def _pixels(
    images: Iterable[int], load_pixels: Callable[[int], Pixels], forgive: bool
) -> tuple[dict[int, Pixels], dict[int, str]]:
    """The pixels of each image, and why some of them failed."""
    pixels, faults = {}, {}
    for image in images:
        try:
            pixels[image] = load_pixels(image)
        except SkipSample as skip:
            if not forgive:
                raise
            faults[image] = skip.reason
    return pixels, faults


def _laid(images: Collection[int], pixels: Mapping[int, Pixels], size: int) -> torch.Tensor:
    """The pixels of images one after another; black where there are none."""
    laid_NCHW = np.zeros((len(images), 3, size, size), np.uint8)
    for row, image in enumerate(images):
        if image in pixels:
            laid_NCHW[row] = pixels[image]
    return torch.from_numpy(laid_NCHW)


def _labels(encoded: EncodedSample, train_on: TrainOn, *, is_dirty: bool) -> NDArray[np.int64]:
    labels = np.full_like(encoded.input_ids, IGNORE_INDEX)
    if is_dirty:
        return labels
    for start, end in encoded.trained_ranges(train_on):
        labels[start:end] = encoded.input_ids[start:end]
    labels[0] = IGNORE_INDEX  # the token before it belongs to another sample
    return labels


def _image_ids(sample: PlacedSample, rows: dict[int, int]) -> NDArray[np.int64]:
    """Each token looks at the last image at or before it in its own sample; -1 before the first."""
    image_ids = np.full(len(sample.encoded.input_ids), -1)
    for position, image in zip(sample.encoded.image_positions, sample.images, strict=True):
        image_ids[position:] = rows[image]
    return image_ids
