"""What sequences have in common from their beginning is computed once, and every token attends as if its own sequence
stood alone: questions about one image share the image, options of an answer share the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sft.core.sample import Batch

Ints = NDArray[np.int64]

_PAYS = 1 / 8
"""The share of its tokens that a batch must save: most samples begin with the same few."""


def share(sequences: Sequence[Ints]) -> tuple[list[Ints], Ints]:
    """Return where the tokens of each sequence stand when all are laid into one row, and which token, counted over all
    sequences end to end, stands at each place. Sequences are laid sorted: there one shares with the one before it as
    much as with any other before it."""
    places: dict[int, Ints] = {}
    before, laid, num_tokens = sequences[0][:0], np.arange(0), 0
    for number in sorted(range(len(sequences)), key=lambda number: order(sequences[number])):
        own = sequences[number]
        shared = num_shared(before, own)
        laid = np.concatenate([laid[:shared], np.arange(num_tokens, num_tokens + len(own) - shared)])
        places[number], before, num_tokens = laid, own, num_tokens + len(own) - shared
    in_order = [places[number] for number in range(len(sequences))]
    return in_order, np.unique(np.concatenate(in_order), return_index=True)[1]


def order(tokens: Ints) -> bytes:
    """Return what sequences are sorted by."""
    return tokens.astype(">i8").tobytes()


def num_shared(one: Ints, other: Ints) -> int:
    """Return how many tokens two sequences have in common from their beginning."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length


def share_beginnings(batch: Batch, read_P: Tensor) -> tuple[Batch, Tensor]:
    """Return a batch whose segments share what they begin with, where that pays, and the positions `read_P` in it. Its
    images are part of the text; only what the language model reads is changed."""
    if batch.sequences:
        return batch, read_P
    segments_T, ids_T, states_T = torch.stack((batch.segment_ids_T, batch.input_ids_T, batch.state_ids_T)).cpu().numpy()
    places, kept = share(np.split(ids_T + (states_T + 1 << 32), np.flatnonzero(np.diff(segments_T)) + 1))
    if len(kept) > (1 - _PAYS) * len(ids_T):
        return batch, read_P
    kept_K, places_T = (torch.from_numpy(x).to(read_P.device) for x in (kept, np.concatenate(places)))
    tokens = {name: getattr(batch, name)[kept_K] for name in ("input_ids_T", "position_ids_T", "state_ids_T")}
    return replace(batch, **tokens, sequences=tuple(map(torch.from_numpy, places))), places_T[read_P]
