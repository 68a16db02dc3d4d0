"""What sequences have in common from their beginning is computed once, and every token attends to its own sequence as if
it stood alone: questions about one image share the image, options of an answer share the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sft.core.sample import Batch

_PAYS = 1 / 8
"""The share of its tokens that a batch must save: most samples begin with the same few."""

Ints = NDArray[np.int64]


def share(sequences: Sequence[Ints]) -> list[Ints]:
    """Return where the tokens of each sequence stand once all are laid into one row. They are laid in their order, where
    one shares with the one before it as much as with any other before it."""
    places: dict[int, Ints] = {}
    before, laid, num_tokens = sequences[0][:0], np.arange(0), 0
    for number in sorted(range(len(sequences)), key=lambda number: order(sequences[number])):
        own = sequences[number]
        shared = num_shared(before, own)
        laid = np.concatenate([laid[:shared], np.arange(num_tokens, num_tokens + len(own) - shared)])
        places[number], before, num_tokens = laid, own, num_tokens + len(own) - shared
    return [places[number] for number in range(len(sequences))]


def order(tokens: Ints) -> bytes:
    """Return what sequences are sorted by."""
    return tokens.astype(">i8").tobytes()


def num_shared(one: Ints, other: Ints) -> int:
    """Return how many tokens two sequences have in common from their beginning."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length


def first_of_each(places: Sequence[Ints]) -> Ints:
    """Return which tokens, of all sequences end to end, are laid: the first at each place."""
    return np.unique(np.concatenate(places), return_index=True)[1]


def share_beginnings(batch: Batch, read_P: Tensor) -> tuple[Batch, Tensor]:
    """Return a batch of inline images in which segments share what they begin with, where that pays, and the positions
    `read_P` in it. Only what the language model reads is changed: tokens, their positions and states."""
    if batch.sequences:
        return batch, read_P
    segments_T, ids_T, states_T = torch.stack((batch.segment_ids_T, batch.input_ids_T, batch.state_ids_T)).cpu().numpy()
    tokens_T = ids_T + (states_T + 1 << 32)
    places = share(np.split(tokens_T, np.flatnonzero(np.diff(segments_T)) + 1))
    kept = first_of_each(places)
    if len(kept) > (1 - _PAYS) * len(ids_T):
        return batch, read_P
    device = read_P.device
    kept_K, places_T = (torch.from_numpy(x).to(device) for x in (kept, np.concatenate(places)))
    names = ("input_ids_T", "position_ids_T", "state_ids_T")
    tokens = {name: getattr(batch, name)[kept_K] for name in names}
    return replace(batch, **tokens, sequences=tuple(map(torch.from_numpy, places))), places_T[read_P]
