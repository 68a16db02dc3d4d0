"""Attention inside groups of tokens: exact, and paid only for pairs of tokens that may see each other.

A micro-batch is one long row of T tokens that belong to many samples. Two questions are asked of it in every layer:
which tokens of its own sample may a token see (self-attention), and which image does it look at (cross-attention).
Both are answered by *groups*: tokens with the same group id attend among themselves, or to the states of that id.

Groups of about equal size are laid side by side as rows padded on the right, a bucket, and each bucket is one call of
`scaled_dot_product_attention`. Right padding needs no mask: under causal attention no real token sees the padding
behind it, and in cross-attention padding can only ask, never be asked; what it asks for is thrown away.

On a GPU that has it, flash attention takes all groups in one call and nothing is padded.

Shape letters: T tokens, P places (the rows of all buckets laid end to end), G groups of a bucket, L longest group of
               the bucket, A attention heads, D size of a head, S states (tokens or image latents), N images.
"""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from inspect import signature
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_SHORT = 1024
"""On CPU, sequences up to this length are attended by plain matrix products in bfloat16: the fused kernel's backward
takes up to 10 times as long there (37 x 4 x 58 x 32: 22.9 against 2.3 ms). Forward and backward, fused and plain: 27.8
and 13.7 ms for 8 x 512 x 64, 71.6 and 64.1 for 8 x 1,024 x 64; longer ones would keep too much."""

_ROWS = 512
"""Queries at a time, then. In causal attention no later key is multiplied with them: 43.4 -> 34.3 ms, 8 x 763 x 64."""

_MAX_PADDING = 1.25
"""A bucket holds groups whose lengths differ by at most this factor. Smaller: less padding, more kernel calls."""

_HALF = (torch.bfloat16, torch.float16)


class Bucket(NamedTuple):
    """Groups of about equal size, the rows of one kernel call."""

    ids_G: Tensor
    """The group id of each row."""
    length: int
    """Of a row, in places."""


class Groups(NamedTuple):
    """How the T tokens of a micro-batch fall into groups. Tokens with group id -1 attend nothing."""

    buckets: tuple[Bucket, ...]
    tokens_P: Tensor
    """The token at each place; padding repeats the group's first token."""
    padding: Tensor
    """The places that are padding."""
    places_T: Tensor
    """The place of each token."""
    alone: Tensor
    """The tokens that attend nothing, and have no place."""
    borders: Tensor
    """int32: where each group starts, and the end of the last; of use where there is no padding."""
    is_shared: bool
    """Whether a token may stand at several places."""
    mask_TT: Tensor | None = None
    """Which tokens each token sees, where that is cheaper than rows; then nothing else is of use."""

    @property
    def longest(self) -> int:
        """Places of the longest row."""
        return max((bucket.length for bucket in self.buckets), default=0)


def group_tokens(group_ids_T: Tensor, *, is_causal: bool = True) -> Groups:
    """Sort tokens into buckets by their group id. Done once a micro-batch, used by every layer. Where attention is not
    causal, no group is padded: its tokens would see the padding."""
    device = group_ids_T.device
    group_ids_T = group_ids_T.cpu()
    by_group = torch.argsort(group_ids_T, stable=True)
    by_group = by_group[group_ids_T[by_group] >= 0]
    ids, sizes = torch.unique_consecutive(group_ids_T[by_group], return_counts=True)
    return _buckets(ids, sizes, by_group, len(group_ids_T), device, _MAX_PADDING if is_causal else 1.0)


def group_sequences(sequences: Sequence[Tensor], num_tokens: int, device: torch.device) -> Groups:
    """Groups that may share tokens: for each the indices of its tokens, in order.

    Exact for causal attention where sequences that share a token share all before it: then the token's result is the
    same in each of them, and is taken from one. Many sequences with a long beginning in common, as the names of 1,000
    classes after one prompt, make one tree under a mask: their rows would hold the beginning as often.
    """
    sizes = torch.tensor([len(sequence) for sequence in sequences])
    if _tree_pays(sizes, num_tokens):
        none, mask_TT = torch.zeros(0, dtype=torch.long), _tree_mask(sequences, num_tokens).to(device)
        return Groups((), none, none, none, none, none, is_shared=True, mask_TT=mask_TT)
    groups = _buckets(torch.arange(len(sizes)), sizes, torch.cat(list(sequences)), num_tokens, device)
    return groups._replace(is_shared=True)


def _tree_pays(sizes: Tensor, num_tokens: int) -> bool:
    """Return whether the rows of all sequences have more pairs of tokens than one mask over all tokens."""
    return int((sizes**2).sum()) > num_tokens**2


def _tree_mask(sequences: Sequence[Tensor], num_tokens: int) -> Tensor:
    """Return for each token (T, T) whether it sees another: those before it in its sequences, and itself."""
    mask_TT = torch.eye(num_tokens, dtype=torch.bool)
    is_known_T = torch.zeros(num_tokens, dtype=torch.bool)
    for sequence in sequences:
        places, known = torch.arange(len(sequence)), int(is_known_T[sequence].sum())  # what is known is the beginning
        mask_TT[sequence[known:, None], sequence] = places <= places[known:, None]
        is_known_T[sequence] = True
    return mask_TT


def _buckets(
    ids: Tensor,
    sizes: Tensor,
    by_group: Tensor,
    num_tokens: int,
    device: torch.device,
    max_padding: float = _MAX_PADDING,
) -> Groups:
    """Groups of the sizes given, whose tokens are laid end to end in `by_group`; all of it on the CPU."""
    starts = sizes.cumsum(0) - sizes
    buckets, tokens, is_real = [], [by_group[:0]], [by_group[:0].bool()]
    for members in _similar_sizes(sizes, 1.0 if device.type == "cuda" else max_padding):
        longest = int(sizes[members].max())
        column = torch.arange(longest)
        real_GL = column < sizes[members, None]
        tokens.append(by_group[starts[members, None] + column * real_GL].flatten())
        is_real.append(real_GL.flatten())
        buckets.append(Bucket(ids[members].to(device), longest))
    tokens_P, is_real_P = torch.cat(tokens), torch.cat(is_real)
    places_T = torch.full((num_tokens,), -1)
    # By numpy, where the last of several places of a token is the one that stays; torch leaves it open.
    places_T.numpy()[tokens_P[is_real_P].numpy()] = np.arange(len(tokens_P))[is_real_P.numpy()]
    lengths = torch.tensor([0] + [bucket.length for bucket in buckets for _ in bucket.ids_G])
    return Groups(
        buckets=tuple(buckets),
        tokens_P=tokens_P.to(device),
        padding=(~is_real_P).nonzero()[:, 0].to(device),
        places_T=places_T.clamp(min=0).to(device),
        alone=(places_T < 0).nonzero()[:, 0].to(device),
        borders=lengths.cumsum(0).int().to(device),
        is_shared=False,
    )


def _similar_sizes(sizes: Tensor, factor: float) -> list[Tensor]:
    """Indices of `sizes` split into runs of similar size, up to the `factor`, the largest first."""
    by_size = torch.argsort(sizes, descending=True, stable=True)
    runs: list[Tensor] = []
    first = 0
    for i in range(1, len(by_size) + 1):
        if i == len(by_size) or sizes[by_size[first]] > factor * sizes[by_size[i]]:
            runs.append(by_size[first:i])
            first = i
    return runs


class _Move(torch.autograd.Function):
    """Rows of `x` by their index, and zeros at some of them. The way back is another such move, not a sum over rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: tuple[Tensor, Tensor], back: tuple[Tensor, Tensor]) -> Tensor:
        ctx.back = back
        return _moved(x, *there)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _moved(gradient, *ctx.back), None, None


def _move(x: Tensor, there: tuple[Tensor, Tensor], back: tuple[Tensor, Tensor] | None) -> Tensor:
    """Move rows there; without a way back, where a token stands at several places, its gradient is their sum."""
    return _moved(x, *there) if back is None else torch.as_tensor(_Move.apply(x, there, back))  # type: ignore[no-untyped-call]


def _moved(x: Tensor, index: Tensor, empty: Tensor) -> Tensor:
    if not len(x):  # no token has a place
        return x.new_zeros(len(index), *x.shape[1:])
    rows = x.index_select(0, index)
    return rows.index_fill_(0, empty, 0) if len(empty) else rows


def grouped_attention(
    module: torch.nn.Module,
    query_1ATD: Tensor,
    key_1ASD: Tensor,
    value_1ASD: Tensor,
    attention_mask: Tensor | Groups | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    groups: Groups | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of each token to its own group, in the form of transformers' attention interface.

    In a self-attention module (`module.is_cross_attention` false or missing) the states of a group are its own tokens:
    all of them, or causally in a module that is causal, and of those the last `sliding_window` if one is given. In a
    cross-attention module they are the S / N states of the image whose number is the group id. `groups` may stand in
    the place of the mask, which is all that some modules hand on. Without `groups` this is plain attention, masked, or
    bidirectional in a module that is not causal (the vision tower), so that a model set to this implementation still
    generates. Returns the output as (1, T, A, D).

    Raises:
        ValueError: neither `groups` nor a mask is given. Attention would be bidirectional, silently.
    """
    shared = query_1ATD.shape[1] // key_1ASD.shape[1]
    if shared > 1:  # several query heads share a head of keys and values (grouped-query attention)
        key_1ASD, value_1ASD = (x.repeat_interleave(shared, dim=1) for x in (key_1ASD, value_1ASD))
    if isinstance(attention_mask, Groups):
        groups, attention_mask = attention_mask, None
    if groups is None:
        if attention_mask is None and module.is_causal:
            raise ValueError("grouped attention was given neither groups nor a mask: it would not be causal")
        output = _attend(query_1ATD, key_1ASD, value_1ASD, dropout, scaling, mask=attention_mask)
        return output.transpose(1, 2).contiguous(), None

    if groups.mask_TT is not None:
        mask_TT = groups.mask_TT
        if sliding_window:
            places_T = mask_TT.sum(1)
            mask_TT = mask_TT & (places_T[:, None] - places_T < sliding_window)
        output = _attend(query_1ATD, key_1ASD, value_1ASD, dropout, scaling, mask=mask_TT)
        return output.transpose(1, 2).contiguous(), None
    query_TAD, key_SAD, value_SAD = (x[0].transpose(0, 1) for x in (query_1ATD, key_1ASD, value_1ASD))
    to_places, to_tokens = (groups.tokens_P, groups.padding), (groups.places_T, groups.alone)
    is_shared = groups.is_shared

    def to_rows(x_TAD: Tensor) -> Tensor:
        return _move(x_TAD, to_places, None if is_shared else to_tokens)

    query_PAD = to_rows(query_TAD)
    if getattr(module, "is_cross_attention", False):
        key_NSAD, value_NSAD = (x.reshape(kwargs["num_images"], -1, *x.shape[1:]) for x in (key_SAD, value_SAD))
        output_PAD = _attend_images(query_PAD, key_NSAD, value_NSAD, groups, dropout, scaling)
    else:
        key_PAD, value_PAD = to_rows(key_SAD), to_rows(value_SAD)
        is_causal = bool(module.is_causal)
        output_PAD = _attend_themselves(
            query_PAD, key_PAD, value_PAD, groups, dropout, scaling, is_causal=is_causal, window=sliding_window
        )
    return _move(output_PAD, to_tokens, None if is_shared else to_places)[None], None


def _attend_themselves(
    query_PAD: Tensor,
    key_PAD: Tensor,
    value_PAD: Tensor,
    groups: Groups,
    dropout: float,
    scaling: float | None,
    *,
    is_causal: bool,
    window: int | None,
) -> Tensor:
    """Self-attention of every group; in causal attention to the last `window` tokens at most."""
    if has_flash_attention(value_PAD) and not dropout:
        return _flash(query_PAD, key_PAD, value_PAD, groups, groups.borders, groups.longest, scaling, is_causal, window)
    results = []
    for query, key, value in zip(*(_rows(x, groups) for x in (query_PAD, key_PAD, value_PAD)), strict=True):
        length, mask = query.shape[2], None
        if window and length > window:
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
        output_GALD = _attend(query, key, value, dropout, scaling, is_causal=is_causal and mask is None, mask=mask)
        results.append(output_GALD.transpose(1, 2).flatten(0, 1))
    return torch.cat(results)


def _attend_images(
    query_PAD: Tensor, key_NSAD: Tensor, value_NSAD: Tensor, groups: Groups, dropout: float, scaling: float | None
) -> Tensor:
    """Attention of every group to the states of its image."""
    if not groups.buckets:
        return query_PAD + 0 * (key_NSAD.sum() + value_NSAD.sum())  # nobody looks; gradients are zeros all the same
    if has_flash_attention(value_NSAD) and not dropout:
        ids = torch.cat([bucket.ids_G for bucket in groups.buckets])
        states = value_NSAD.shape[1]
        borders = torch.arange(len(ids) + 1, dtype=torch.int32, device=ids.device) * states
        key, value = (x[ids].flatten(0, 1) for x in (key_NSAD, value_NSAD))
        return _flash(query_PAD, key, value, groups, borders, states, scaling, False)
    results = []
    for bucket, query in zip(groups.buckets, _rows(query_PAD, groups), strict=True):
        key, value = (x[bucket.ids_G].transpose(1, 2) for x in (key_NSAD, value_NSAD))
        results.append(_attend(query, key, value, dropout, scaling).transpose(1, 2).flatten(0, 1))
    return torch.cat(results)


def _rows(x_PAD: Tensor, groups: Groups) -> list[Tensor]:
    """Return the places of each bucket as (G, A, L, D)."""
    pieces = torch.split(x_PAD, [len(bucket.ids_G) * bucket.length for bucket in groups.buckets])
    return [
        piece.view(len(bucket.ids_G), bucket.length, *piece.shape[1:]).transpose(1, 2)
        for piece, bucket in zip(pieces, groups.buckets, strict=True)
    ]


def has_flash_attention(value: Tensor) -> bool:
    """Return whether torch's own flash attention over sequences of any lengths (`varlen_attn`) takes this: a GPU from
    Ampere on, in half precision, heads of at most 256 numbers, a multiple of 8."""
    return (
        value.is_cuda
        and value.dtype in _HALF
        and value.shape[-1] <= 256
        and value.shape[-1] % 8 == 0  # a kernel of any size is in `scaled_dot_product_attention`, which pads
        and torch.cuda.get_device_capability(value.device) >= (8, 0)
        and _has_varlen()
    )


@cache
def _has_varlen() -> bool:
    """Return whether torch has `varlen_attn`, and with a window and a scale: 2.10 is without them, 2.9 without it."""
    if find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention import varlen

    return {"scale", "window_size"} <= signature(varlen.varlen_attn).parameters.keys()


def _flash(
    query_PAD: Tensor,
    key_SAD: Tensor,
    value_SAD: Tensor,
    groups: Groups,
    state_borders: Tensor,
    most_states: int,
    scaling: float | None,
    is_causal: bool,
    window: int | None = None,
) -> Tensor:
    """Attend all groups in one call (measured on an H200 by `scripts/check_gpu attention`)."""
    from torch.nn.attention import varlen

    output = varlen.varlen_attn(
        query_PAD.to(value_SAD.dtype),
        key_SAD.to(value_SAD.dtype),
        value_SAD,
        groups.borders,
        state_borders,
        groups.longest,
        most_states,
        scale=scaling,
        window_size=((window or 0) - 1, 0) if is_causal else (-1, -1),
    )
    return torch.as_tensor(output)


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
    results, seen = [], 0
    for rows in torch.split(query * (scaling or query.shape[-1] ** -0.5), _ROWS, dim=-2):
        before, seen = seen, seen + rows.shape[-2]
        end = seen if is_causal else key.shape[-2]
        scores = torch.matmul(rows, key[..., :end, :].transpose(-1, -2))
        if is_causal:
            scores = scores + torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype).triu(before + 1)
        # The kernel computes in float32 inside; asked for a float32 result it reads and writes twice as much.
        weights = F.dropout(scores.softmax(-1), dropout)
        results.append(torch.matmul(weights, value[..., :end, :]))
    return torch.cat(results, dim=-2) if len(results) > 1 else results[0]
