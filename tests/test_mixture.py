"""Shares hold at every draw, every epoch has every sample, and the order is a function of the seed."""

import json
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.mixture import Mixture, SourceSizes

UNITS = ("tokens", "trained_tokens", "samples")


def source(share, num_tokens, images=None, name="toy"):
    """A source of samples of these lengths; half of each is trained."""
    return SourceSizes(
        name=name,
        share=share,
        num_tokens=np.array(num_tokens),
        num_trained=np.array(num_tokens) // 2,
        images=tuple(images or [()] * len(num_tokens)),
    )


def draws(mixture, number):
    return [mixture.draw() for _ in range(number)]


@st.composite
def toys(draw):
    """One to four sources of one to six samples of 2 to 50 tokens."""
    shares = draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    lengths = st.lists(st.integers(2, 50), min_size=1, max_size=6)
    return [source(share / sum(shares), draw(lengths)) for share in shares]


def sizes_in(unit, sources):
    """What a sample of each source counts, in `unit`."""
    of = {"tokens": lambda s: s.num_tokens, "trained_tokens": lambda s: s.num_trained}
    return [of.get(unit, lambda s: np.ones_like(s.num_tokens))(source) for source in sources]


def test_two_to_one():
    mixture = Mixture([source(2 / 3, [10] * 5), source(1 / 3, [10] * 5)], unit="tokens", seed=0)
    assert [item.source for item in draws(mixture, 6)].count(0) == 4


def test_long_samples_are_drawn_less_often():
    mixture = Mixture([source(0.5, [30]), source(0.5, [10])], unit="tokens", seed=0)
    assert [item.source for item in draws(mixture, 8)].count(0) == 2
    by_samples = Mixture([source(0.5, [30]), source(0.5, [10])], unit="samples", seed=0)
    assert [item.source for item in draws(by_samples, 8)].count(0) == 4


@pytest.mark.parametrize("unit", UNITS)
@given(sources=toys())
def test_no_source_is_ever_ahead_by_more_than_a_sample(unit, sources):
    mixture = Mixture(sources, unit=unit, seed=0)
    counts = sizes_in(unit, sources)
    consumed = [0] * len(sources)
    for item in draws(mixture, 60):
        consumed[item.source] += int(counts[item.source][item.sample])
        ahead = [own - s.share * sum(consumed) for s, own in zip(sources, consumed, strict=True)]
        assert all(a <= count.max() + 1e-9 for a, count in zip(ahead, counts, strict=True))
        if len(sources) == 2:
            assert max(map(abs, ahead)) <= max(count.max() for count in counts), "nor behind by more than the other's"


@given(sources=toys(), seed=st.integers(0, 9))
def test_an_epoch_has_every_sample_once(sources, seed):
    mixture = Mixture(sources, unit="samples", seed=seed)
    taken = [[] for _ in sources]
    for item in draws(mixture, 60):
        taken[item.source].append(item.sample)
    for own, size in zip(taken, sources, strict=True):
        number = len(size.num_tokens)
        for start in range(0, len(own) - number + 1, number):
            assert sorted(own[start : start + number]) == list(range(number))
    for index, size in enumerate(sources):
        assert mixture.epochs(index) == len(taken[index]) / len(size.num_tokens)


def test_the_order_is_a_function_of_the_seed():
    def order(seed):
        return [item.sample for item in draws(Mixture([source(1, [5] * 20)], unit="tokens", seed=seed), 40)]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1)[:20] != order(1)[20:], "each epoch has its own"


def test_samples_about_one_image_stand_together():
    images = [(7,), (8,), (), (7,), (8,), (), (7, 8), (8,)]
    mixture = Mixture([source(1, [5] * 8, images)], unit="tokens", seed=0)
    for _ in range(5):
        epoch = [images[item.sample] for item in draws(mixture, 8)]
        blocks = [own for own, before in zip(epoch, [None, *epoch], strict=False) if own != before or own == ()]
        assert len(blocks) == 5, "the 7s, the 8s, the pair, and each text by itself"


@given(sources=toys(), unit=st.sampled_from(UNITS), number=st.integers(0, 40))
def test_a_restored_mixture_goes_on_where_it_was(sources, unit, number):
    mixture = Mixture(sources, unit=unit, seed=3)
    draws(mixture, number)
    state = json.loads(json.dumps(mixture.state()))
    expected = draws(mixture, 20)
    again = Mixture(sources, unit=unit, seed=3)
    again.restore(state)
    assert draws(again, 20) == expected


def test_what_is_given_back_does_not_count():
    """A sample that no pack can hold must not use up the share of its source."""
    mixture = Mixture([source(0.5, [90, 10, 10, 10]), source(0.5, [10])], unit="tokens", seed=0)
    drawn = {0: 0, 1: 0}
    for item in islice(iter(mixture.draw, None), 400):
        if item.source == 0 and item.sample == 0:
            mixture.give_back(item)
        else:
            drawn[item.source] += 10
    assert abs(drawn[0] - drawn[1]) <= 10
