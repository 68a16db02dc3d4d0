"""Attention by groups is dense attention with a mask, at a fraction of the work."""

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention

from sft.models import grouped_attention as attention
from sft.models.grouped_attention import group_sequences, group_tokens, grouped_attention

SELF = SimpleNamespace(is_cross_attention=False, is_causal=True)
CROSS = SimpleNamespace(is_cross_attention=True, is_causal=True)
VISION = SimpleNamespace(is_causal=False)
HEADS, HEAD_SIZE, LATENTS = 2, 4, 3


def noise(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def output_and_gradients(attend, num_tokens, num_states):
    """What comes out, and the gradients of query, key and value, for fixed noise in and back."""
    inputs = [noise(1, HEADS, n, HEAD_SIZE).requires_grad_() for n in (num_tokens, num_states, num_states)]
    output = attend(*inputs)
    output.backward(noise(*output.shape))
    return [output, *(x.grad for x in inputs)]


def dense(may_see_TS):
    """Plain attention under a 4-D mask; tokens that may see nothing give zero."""

    def attend(query, key, value):
        sees_T = may_see_TS.any(dim=1)
        mask = torch.where(sees_T[:, None], may_see_TS, True)[None, None]  # a row without any True would be NaN
        return scaled_dot_product_attention(query, key, value, mask).transpose(1, 2) * sees_T[None, :, None, None]

    return attend


def grouped(module, group_ids_T, **options):
    return lambda q, k, v: grouped_attention(module, q, k, v, None, groups=group_tokens(group_ids_T), **options)[0]


def assert_equal(attend, expected, num_tokens, num_states):
    pairs = zip(*(output_and_gradients(f, num_tokens, num_states) for f in (attend, expected)), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_tokens_attend_their_own_segment_causally(lengths):
    segment_ids_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    tokens = torch.arange(len(segment_ids_T))
    may_see_TT = (segment_ids_T[:, None] == segment_ids_T) & (tokens[:, None] >= tokens)
    assert_equal(grouped(SELF, segment_ids_T), dense(may_see_TT), len(tokens), len(tokens))


@given(st.lists(st.integers(-1, 2), min_size=1, max_size=20).filter(lambda ids: max(ids) >= 0))
def test_tokens_attend_the_latents_of_their_image(image_ids):
    """Image 0 may be looked at from both ends of the row (two samples that share it), image 2 by nobody."""
    image_ids_T = torch.tensor(image_ids)
    may_see_TS = image_ids_T[:, None] == torch.arange(3).repeat_interleave(LATENTS)
    assert_equal(grouped(CROSS, image_ids_T, num_images=3), dense(may_see_TS), len(image_ids), 3 * LATENTS)


def test_sequences_that_share_a_beginning_attend_as_if_each_had_its_own():
    """Tokens 0 1 2 are the beginning of 0 1 2 3 4 and of 0 1 2 5."""
    query, key, value = (noise(1, HEADS, 6, HEAD_SIZE) for _ in range(3))
    sequences = [torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0, 1, 2, 5])]
    groups = group_sequences(sequences, 6, torch.device("cpu"))
    shared = grouped_attention(SELF, query, key, value, None, groups=groups)[0][0]
    for tokens in sequences:
        alone = (x[:, :, tokens] for x in (query, key, value))
        expected = scaled_dot_product_attention(*alone, is_causal=True)[0].transpose(0, 1)
        torch.testing.assert_close(shared[tokens], expected)


def test_a_token_that_looks_at_nothing_gets_zero():
    for image_ids in ([-1, 0, 0], [-1, -1, -1]):
        inputs = [noise(1, HEADS, n, HEAD_SIZE) for n in (3, LATENTS, LATENTS)]
        output = grouped(CROSS, torch.tensor(image_ids), num_images=1)(*inputs)
        assert [bool(output[0, t].any()) for t in range(3)] == [image >= 0 for image in image_ids]


@pytest.mark.parametrize("rows", [2, 512])
@pytest.mark.parametrize("module", [SELF, CROSS], ids=["self", "cross"])
def test_bfloat16_is_as_exact_as_it_can_be(module, rows, monkeypatch):
    """On CPU short groups go another way in bfloat16, some rows of queries at a time."""
    monkeypatch.setattr(attention, "_ROWS", rows)
    group_ids_T = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2])
    attend = grouped(module, group_ids_T, num_images=4)

    def in_bfloat16(*inputs):
        return attend(*(x.bfloat16() for x in inputs)).double()

    for found, wanted in zip(*(output_and_gradients(f, 8, 8) for f in (in_bfloat16, attend)), strict=True):
        assert (found - wanted).norm() < 0.01 * wanted.norm()  # 8 bits of mantissa


def test_groups_of_similar_length_share_a_call():
    lengths = torch.tensor([8, 2, 7, 1, 2])
    groups = group_tokens(torch.repeat_interleave(torch.arange(5), lengths))
    assert [bucket.ids_G.tolist() for bucket in groups.buckets] == [[0, 2], [1, 4], [3]]
    assert [bucket.length for bucket in groups.buckets] == [8, 2, 1]
    assert groups.padding.tolist() == [15], "the shorter of the first two ends a place early"


def test_without_groups_it_is_masked_attention():
    may_see_TT = torch.ones(3, 3, dtype=torch.bool).tril()

    def attend(query, key, value):
        return grouped_attention(SELF, query, key, value, may_see_TT[None, None])[0]

    assert_equal(attend, dense(may_see_TT), 3, 3)


@pytest.mark.parametrize("module", [SELF, CROSS], ids=["self", "cross"])
def test_neither_groups_nor_mask_is_refused(module):
    with pytest.raises(ValueError, match="neither groups nor a mask"):
        grouped_attention(module, *(noise(1, HEADS, 3, HEAD_SIZE) for _ in range(3)), None)


def test_the_vision_tower_sees_everything():
    everything = torch.ones(3, 3, dtype=torch.bool)
    assert_equal(lambda q, k, v: grouped_attention(VISION, q, k, v, None)[0], dense(everything), 3, 3)


@given(st.lists(st.integers(-1, 2), min_size=1, max_size=20).filter(lambda ids: max(ids) >= 0))
def test_one_call_of_flash_attention_is_given_the_same_groups(image_ids):
    """The call that a GPU gets, into a reference that takes the sequences between the borders one by one."""

    def varlen_attn(query, key, value, borders, state_borders, longest, most_states, *, scale, window_size):
        assert longest == borders.diff().max()
        assert most_states == state_borders.diff().max()
        pairs = (zip(x.tolist(), x[1:].tolist(), strict=False) for x in (borders, state_borders))
        rows = []
        for (start, end), (first, last) in zip(*pairs, strict=True):
            alone = (x.transpose(0, 1) for x in (query[start:end], key[first:last], value[first:last]))
            rows.append(scaled_dot_product_attention(*alone, is_causal=window_size == (-1, 0), scale=scale))
        return torch.cat(rows, dim=1).transpose(0, 1)

    image_ids_T = torch.tensor(image_ids)
    with (
        patch.object(attention, "_MAX_PADDING", 1.0),
        patch.object(attention, "has_flash_attention", lambda value: True),
        patch.object(varlen, "varlen_attn", varlen_attn),
    ):
        flash_self, flash_cross = (grouped(module, image_ids_T, num_images=3) for module in (SELF, CROSS))
        tokens = torch.arange(len(image_ids))
        same_TT = (image_ids_T[:, None] == image_ids_T) & (image_ids_T >= 0)
        assert_equal(flash_self, dense(same_TT & (tokens[:, None] >= tokens)), len(tokens), len(tokens))
        looks_TS = image_ids_T[:, None] == torch.arange(3).repeat_interleave(LATENTS)
        assert_equal(flash_cross, dense(looks_TS), len(tokens), 3 * LATENTS)


@pytest.mark.parametrize(
    ("head_size", "dtype", "is_taken"),
    [(128, torch.bfloat16, True), (36, torch.bfloat16, False), (64, torch.float32, False)],
)
def test_flash_attention_is_asked_for_what_it_takes(head_size, dtype, is_taken):
    value = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(1, 4, head_size), device=None)
    with patch.object(torch.cuda, "get_device_capability", lambda device: (9, 0)):
        assert attention.has_flash_attention(value) == is_taken


@pytest.mark.parametrize("older", [lambda query, is_causal=False: None, None], ids=["torch 2.10", "torch 2.9"])
def test_a_torch_without_windows_attends_by_buckets(older):
    has_varlen = attention._has_varlen.__wrapped__
    assert has_varlen()
    with patch.object(varlen, "varlen_attn", older), patch.object(attention, "find_spec", lambda name: older):
        assert not has_varlen()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_patches_of_a_tile_attend_to_all_of_it(sizes):
    """Each size is a call of its own. Groups come in the place of the mask, which is all that some modules hand on."""
    tile_ids_P = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    groups = group_tokens(tile_ids_P, is_causal=False)

    def attend(query, key, value):
        return grouped_attention(VISION, query, key, value, groups)[0]

    assert_equal(attend, dense(tile_ids_P[:, None] == tile_ids_P), len(tile_ids_P), len(tile_ids_P))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 9))
def test_a_window_is_the_last_tokens_of_a_segment(lengths, window):
    segment_ids_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    tokens = torch.arange(len(segment_ids_T))
    back_TT = tokens[:, None] - tokens
    may_see_TT = (segment_ids_T[:, None] == segment_ids_T) & (back_TT >= 0) & (back_TT < window)
    attend = grouped(SELF, segment_ids_T, sliding_window=window)
    assert_equal(attend, dense(may_see_TT), len(tokens), len(tokens))
