"""Attention inside groups of tokens: exact, and paid only for pairs of tokens that may see each other.

A micro-batch is one long row of T tokens that belong to many samples. Two questions are asked of it in every layer:
which tokens of its own sample may a token see (self-attention), and which image does it look at (cross-attention).
Both are answered by *groups*: tokens with the same group id attend among themselves, or to the states of that id.

Groups of about equal size are laid side by side as rows padded on the right, a bucket, and each bucket is one call of
`scaled_dot_product_attention`. Right padding needs no mask: under causal attention no real token sees the padding
behind it, and in cross-attention padding can only ask, never be asked; what it asks for is thrown away.

Shape letters: T tokens, G groups of a bucket, L longest group of the bucket, A attention heads, D size of a head,
               S states (tokens or image latents) a group attends, N images.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_SHORT = 256
"""On CPU, sequences up to this length are attended by plain matrix products in bfloat16: the fused kernel's backward
takes up to 10 times as long there (37 x 4 x 58 x 32: 22.9 against 2.3 ms; at 1,024 tokens it is the faster one)."""

_MAX_PADDING = 1.25
"""A bucket holds groups whose lengths differ by at most this factor. Smaller: less padding, more kernel calls."""


class Bucket(NamedTuple):
    """Groups of about equal size, ready to be gathered into rows."""

    ids_G: Tensor
    """The group id of each row."""
    tokens_GL: Tensor
    """Index of each token in the long row; padding repeats the group's first token."""
    real_GL: Tensor
    """False at padding."""


class Groups(NamedTuple):
    """How the T tokens of a micro-batch fall into groups. Tokens with group id -1 attend nothing."""

    buckets: tuple[Bucket, ...]
    order_T: Tensor
    """Where each token's result stands when the buckets' real places are laid end to end behind one row of zeros;
    0 = it attends nothing."""


def group_tokens(group_ids_T: Tensor) -> Groups:
    """Sort tokens into buckets by their group id. Done once a micro-batch, used by every layer."""
    device = group_ids_T.device
    group_ids_T = group_ids_T.cpu()
    by_group = torch.argsort(group_ids_T, stable=True)
    by_group = by_group[group_ids_T[by_group] >= 0]
    ids, sizes = torch.unique_consecutive(group_ids_T[by_group], return_counts=True)
    return _buckets(ids, sizes, by_group, len(group_ids_T), device)


def group_sequences(sequences: Sequence[Tensor], num_tokens: int, device: torch.device) -> Groups:
    """Groups that may share tokens: for each the indices of its tokens, in order.

    Exact for causal attention where sequences that share a token share all before it: then the token's result is the
    same in each of them, and is taken from one.
    """
    sizes = torch.tensor([len(sequence) for sequence in sequences])
    return _buckets(torch.arange(len(sizes)), sizes, torch.cat(list(sequences)), num_tokens, device)


def _buckets(ids: Tensor, sizes: Tensor, by_group: Tensor, num_tokens: int, device: torch.device) -> Groups:
    """Groups of the sizes given, whose tokens are laid end to end in `by_group`; all of it on the CPU."""
    starts = sizes.cumsum(0) - sizes
    buckets = []
    order_T = torch.zeros(num_tokens, dtype=torch.long)
    placed = 1
    for members in _similar_sizes(sizes):
        longest = int(sizes[members].max())
        column = torch.arange(longest)
        real_GL = column < sizes[members, None]
        tokens_GL = by_group[starts[members, None] + column * real_GL]
        # By numpy, where the last of several results for a token is the one that stays; torch leaves it open.
        order_T.numpy()[tokens_GL[real_GL].numpy()] = np.arange(placed, placed + int(real_GL.sum()))
        placed += int(real_GL.sum())
        buckets.append(Bucket(ids[members].to(device), tokens_GL.to(device), real_GL.to(device)))
    return Groups(tuple(buckets), order_T.to(device))


def _similar_sizes(sizes: Tensor) -> list[Tensor]:
    """Indices of `sizes` split into runs of similar size, the largest first."""
    by_size = torch.argsort(sizes, descending=True, stable=True)
    runs: list[Tensor] = []
    first = 0
    for i in range(1, len(by_size) + 1):
        if i == len(by_size) or sizes[by_size[first]] > _MAX_PADDING * sizes[by_size[i]]:
            runs.append(by_size[first:i])
            first = i
    return runs


def grouped_attention(
    module: torch.nn.Module,
    query_1ATD: Tensor,
    key_1ASD: Tensor,
    value_1ASD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    groups: Groups | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of each token to its own group, in the form of transformers' attention interface.

    In a self-attention module (`module.is_cross_attention` false) the states of a group are its own tokens, causally.
    In a cross-attention module they are the S / N states of the image whose number is the group id.
    Without `groups` this is plain attention, masked, or bidirectional in a module that is not causal (the vision
    tower), so that a model set to this implementation still generates.
    Returns the output as (1, T, A, D).

    Raises:
        ValueError: neither `groups` nor a mask is given. Attention would be bidirectional, silently.
    """
    if groups is None:
        if attention_mask is None and module.is_causal:
            raise ValueError("grouped attention was given neither groups nor a mask: it would not be causal")
        output = _attend(query_1ATD, key_1ASD, value_1ASD, dropout, scaling, mask=attention_mask)
        return output.transpose(1, 2).contiguous(), None

    query_TAD, key_SAD, value_SAD = (x[0].transpose(0, 1) for x in (query_1ATD, key_1ASD, value_1ASD))
    is_causal = not module.is_cross_attention
    if not is_causal:
        num_images = kwargs["num_images"]
        key_NLAD, value_NLAD = (x.reshape(num_images, -1, *x.shape[1:]) for x in (key_SAD, value_SAD))

    results = [query_TAD.new_zeros(1, *query_TAD.shape[1:], dtype=value_SAD.dtype)]  # for tokens that attend nothing
    for bucket in groups.buckets:
        query_GAL = query_TAD[bucket.tokens_GL].transpose(1, 2)
        if is_causal:
            key_GA, value_GA = (x[bucket.tokens_GL].transpose(1, 2) for x in (key_SAD, value_SAD))
        else:
            key_GA, value_GA = (x[bucket.ids_G].transpose(1, 2) for x in (key_NLAD, value_NLAD))
        output_GAL = _attend(query_GAL, key_GA, value_GA, dropout, scaling, is_causal=is_causal)
        results.append(output_GAL.transpose(1, 2)[bucket.real_GL])
    output_TAD = torch.cat([x.to(results[-1].dtype) for x in results])[groups.order_T]
    return output_TAD[None], None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    *,
    is_causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """`scaled_dot_product_attention`, or the same by plain matrix products where the fused kernel is slow."""
    is_short = max(query.shape[-2], key.shape[-2]) <= _SHORT
    if mask is not None or not is_short or value.dtype != torch.bfloat16 or value.device.type != "cpu":
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout_p=dropout, is_causal=is_causal, scale=scaling
        )
    scores = torch.matmul(query * (scaling or query.shape[-1] ** -0.5), key.transpose(-1, -2))
    if is_causal:
        scores = scores + torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype).triu(1)
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(value.dtype), dropout)
    return torch.matmul(weights, value)
