"""Packs -> Batch: the only place where tensors of training data are made and images are decoded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain, compress
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sft.batches.feature_cache import FeatureCache
from sft.batches.image_source import ImageSource
from sft.core.sample import IGNORE_INDEX, NO_SOURCE, Batch, EncodedSample, PlacedSample, SkipSample, Tiling, TrainOn
from sft.models.family import Tiles

Ints = NDArray[np.int64]


DUMMY = PlacedSample(
    EncodedSample(key="", input_ids=np.zeros(2, np.int64), trained_spans=((0, 2),), image_positions=(0,)),
    images=(-1,),
    source=NO_SOURCE,
)
"""Two tokens that look at a black image, one of them predicted. What belongs to no source has no weight in the loss."""


def collate(
    packs: Sequence[Sequence[PlacedSample]],
    source: ImageSource,
    *,
    train_on: TrainOn,
    pack_isolation: bool = True,
    num_trained_tokens: int | None = None,
    forgive_images: bool = False,
    always_whole: bool = False,
    features: FeatureCache | None = None,
) -> Batch:
    """Lay the packs of a micro-batch one after another and decode each distinct image once.

    With `pack_isolation` every sample is a segment of its own; without it a whole pack is one, as in 2023: its samples
    see each other, positions run on, and with `train_on` all the `<s>` of a sample is predicted from the `</s>` before
    it. Images are isolated either way. `num_trained_tokens` is that of the whole optimizer step; left out, the
    micro-batch is taken for the step. With `forgive_images` an image that fails is black and what shows it has no
    labels; everything else stays as it was planned. With `always_whole` a batch without images or labels gets a dummy
    sample that shows a black image and whose loss counts nothing, so that every rank makes the same calls and every
    parameter gets a gradient. One without samples always does. With `features` only images of which these know nothing
    are decoded.

    Raises:
        SkipSample: an image fails, and `forgive_images` is not set.
    """
    samples = list(chain.from_iterable(packs))
    segments = [[sample] for sample in samples] if pack_isolation else [list(pack) for pack in packs]
    keys = list(dict.fromkeys(chain.from_iterable(sample.images for sample in samples)))
    known = {key: states for key in keys if features and (states := features.read(key)) is not None}
    tiles, faults = _load([key for key in keys if key not in known], source, forgive_images)
    dirty = {s.encoded.key: faults[image].reason for s in samples for image in s.images if image in faults}
    state_id = source.images.state_token_id
    labels = [_labels(s.encoded, train_on, state_id, is_dirty=not faults.keys().isdisjoint(s.images)) for s in samples]
    if train_on == "all" and not pack_isolation:
        later = [number > 0 and sample.encoded.key not in dirty for pack in packs for number, sample in enumerate(pack)]
        for sample, own in zip(compress(samples, later), compress(labels, later), strict=True):
            own[0] = sample.encoded.input_ids[0]
    num_labels = sum(int((own != IGNORE_INDEX).sum()) for own in labels)
    if not samples or (always_whole and not (keys and num_labels)):
        samples.append(DUMMY)
        segments.append([DUMMY])
        labels.append(_labels(DUMMY.encoded, train_on, None, is_dirty=False))
        keys += DUMMY.images
    shown = Shown.of(keys, source)
    lengths = [sum(len(sample.encoded.input_ids) for sample in segment) for segment in segments]
    return Batch(
        input_ids_T=torch.from_numpy(np.concatenate([sample.encoded.input_ids for sample in samples])),
        labels_T=torch.from_numpy(np.concatenate(labels)),
        position_ids_T=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        segment_ids_T=torch.from_numpy(np.repeat(np.arange(len(segments)), lengths)),
        image_ids_T=torch.from_numpy(np.concatenate([shown.image_ids(sample) for sample in samples])),
        source_ids_T=torch.from_numpy(
            np.repeat([sample.source for sample in samples], [len(sample.encoded.input_ids) for sample in samples])
        ),
        state_ids_T=torch.from_numpy(np.concatenate([shown.state_ids(sample, state_id) for sample in samples])),
        tiles=shown.lay_tiles(tiles, keys if features is None else tiles),
        num_states=tuple(shown.num_states.values()),
        tilings=tuple(shown.tilings.values()),
        features_RE=_laid(shown.num_states, known, (source.images.state_size,), np.float16) if features else None,
        to_encode={shown.numbers[key]: key for key in tiles} if features else {},
        num_trained_tokens=num_labels if num_trained_tokens is None else num_trained_tokens,
        packs=tuple(tuple(sample.encoded.key for sample in pack) for pack in packs),
        pack_ends=tuple(accumulate(sum(len(sample.encoded.input_ids) for sample in pack) for pack in packs)),
        dirty=dirty,
    )


def _load(images: Iterable[int], source: ImageSource, forgive: bool) -> tuple[dict[int, Tiles], dict[int, SkipSample]]:
    """Return the tiles of each image, and why some of them failed."""
    tiles, faults = {}, {}
    for image in images:
        try:
            tiles[image] = source.tiles(image)
        except SkipSample as skip:
            if not forgive:
                raise
            faults[image] = skip
    return tiles, faults


class Shown(NamedTuple):
    """The distinct images of a batch by their keys, in the order of their numbers."""

    numbers: dict[int, int]
    tilings: dict[int, Tiling]
    num_states: dict[int, int]

    @classmethod
    def of(cls, keys: Iterable[int], source: ImageSource) -> Shown:
        """Number images as `Batch.num_states` says: tiles of one size follow one another."""
        images = source.images
        tilings = {key: images.one_tile if key in DUMMY.images else source.tiling(key) for key in keys}
        sizes = list(dict.fromkeys((tiling.height, tiling.width) for tiling in tilings.values()))
        ordered = sorted(tilings, key=lambda key: sizes.index((tilings[key].height, tilings[key].width)))
        tilings = {key: tilings[key] for key in ordered}
        num_states = {key: images.num_states(tiling) for key, tiling in tilings.items()}
        return cls({key: number for number, key in enumerate(ordered)}, tilings, num_states)

    def lay_tiles(self, tiles: Mapping[int, Tiles], keys: Iterable[int]) -> tuple[Tensor, ...]:
        """Lay the tiles of some images one after another, a tensor for each size; black where `tiles` has none."""
        wanted = frozenset(keys)
        by_size: dict[tuple[int, int], list[int]] = {}
        for key, tiling in self.tilings.items():
            if key in wanted:
                by_size.setdefault((tiling.height, tiling.width), []).append(key)
        return tuple(
            _laid({key: self.tilings[key].num_tiles for key in own}, tiles, (3, *size), np.uint8)
            for size, own in by_size.items()
        )

    def image_ids(self, sample: PlacedSample) -> Ints:
        """Return which image each token looks at: the last at or before it in its own sample, -1 before the first."""
        image_ids = np.full(len(sample.encoded.input_ids), -1)
        for position, image in zip(sample.encoded.image_positions, sample.images, strict=True):
            image_ids[position:] = self.numbers[image]
        return image_ids

    def state_ids(self, sample: PlacedSample, state_token_id: int | None) -> Ints:
        """Return which image state stands in place of each token, -1 for the token itself."""
        state_ids = np.full(len(sample.encoded.input_ids), -1)
        if state_token_id is None or not sample.images or sample.source == NO_SOURCE:
            return state_ids
        starts = dict(zip(self.num_states, accumulate(self.num_states.values(), initial=0), strict=False))
        rows = [np.arange(starts[image], starts[image] + self.num_states[image]) for image in sample.images]
        state_ids[sample.encoded.input_ids == state_token_id] = np.concatenate(rows)
        return state_ids


def _laid(rows: Mapping[int, int], known: Mapping[int, Any], shape: tuple[int, ...], kind: type[np.generic]) -> Tensor:
    """Lay the rows of some keys one after another, by how many each has; zeros where they are not known."""
    laid = np.zeros((sum(rows.values()), *shape), kind)
    for key, stop in zip(rows, accumulate(rows.values()), strict=True):
        if key in known:
            laid[stop - rows[key] : stop] = known[key]
    return torch.from_numpy(laid)


def _labels(encoded: EncodedSample, train_on: TrainOn, state_token_id: int | None, *, is_dirty: bool) -> Ints:
    labels = np.full_like(encoded.input_ids, IGNORE_INDEX)
    if is_dirty:
        return labels
    for start, end in encoded.trained_ranges(train_on):
        labels[start:end] = encoded.input_ids[start:end]
    labels[0] = IGNORE_INDEX  # the token before it belongs to another sample
    if state_token_id is not None:  # nobody should predict it: what stands there is not the token
        labels[labels == state_token_id] = IGNORE_INDEX
    return labels
