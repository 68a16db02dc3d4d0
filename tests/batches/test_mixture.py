"""Shares hold at every window, every epoch has every sample, and the order is a function of the seed."""

import json
from collections import Counter

import numpy as np
import pytest
from helpers.planning import Toy
from hypothesis import given
from hypothesis import strategies as st

from sft.batches.mixture import Mixture
from sft.core.errors import UserError
from sft.core.sample import Caps
from sft.data.orders import Cursor, ImageGroups, Order, permute

UNITS = ("tokens", "trained_tokens", "samples")
CAPS = Caps(tokens=100, image_weight=4, samples_per_image=2)


def mixture_of(*sources, unit="tokens", seed=0, caps=CAPS):
    return Mixture(sources, unit=unit, seed=seed, caps=caps)


def draw(mixture, num_tokens=500, num_images=10**6, most=10**6):
    return mixture.draw(num_tokens, num_images, most)


@st.composite
def toys(draw):
    """One to four sources of one to six samples of 2 to 50 tokens."""
    shares = draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    lengths = st.lists(st.integers(2, 50), min_size=1, max_size=6)
    return [Toy(share / sum(shares), draw(lengths)) for share in shares]


# ------------------------------------------------------------------------------------------------------- orders


@given(size=st.integers(1, 3000), key=st.integers(0, 2**40))
def test_a_permutation_has_every_number_once(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_a_place_of_a_permutation_is_computed_alone():
    size = 141_047_697
    places = np.array([0, 1, 77, size - 1])
    one_by_one = [int(permute(np.array([place]), size, 5)[0]) for place in places]
    assert permute(places, size, 5).tolist() == one_by_one
    assert len(set(one_by_one)) == 4 and min(one_by_one) >= 0 and max(one_by_one) < size


def test_permutations_are_as_random_as_they_should_be():
    """Every number comes about as often at every place, over 6,000 keys: chi-squared with 25 degrees of freedom."""
    found = Counter()
    for key in range(6000):
        for place, number in enumerate(permute(np.arange(6), 6, key).tolist()):
            found[place, number] += 1
    chi_squared = sum((found[place, number] - 1000) ** 2 / 1000 for place in range(6) for number in range(6))
    assert chi_squared < 60, "one in 10,000 would be over"


@given(lengths=st.lists(st.integers(1, 3), min_size=1, max_size=8), key=st.integers(0, 99), cuts=st.integers(1, 7))
def test_an_order_goes_on_from_any_place(lengths, key, cuts):
    """Three epochs in one go, and some samples at a time from the place reached: the same rows."""
    size = sum(lengths)
    order = Order(size, ImageGroups(np.arange(size), np.cumsum([0, *lengths])), key)
    whole, _, units, _ = order.take(Cursor(), 8 * size + 8)
    for epoch in range(3):
        assert sorted(whole[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))
    for start in range(0, 2 * size, cuts):
        place = Cursor(int(units[start]), int((units[:start] == units[start]).sum()))
        found = order.take(place, cuts).rows.tolist()
        assert found and found == whole[start : start + len(found)].tolist()


def test_samples_about_one_image_stand_together():
    images = [(7,), (8,), (), (7,), (8,), (), (7, 8), (8,)]
    toy = Toy(1, [5] * 8, images)
    rows = Order(8, toy.groups, 3).take(Cursor(), 40).rows[:40]
    for epoch in range(5):
        shown = [images[row] for row in rows[epoch * 8 : epoch * 8 + 8]]
        blocks = [own for own, before in zip(shown, [None, *shown], strict=False) if own != before or own == ()]
        assert len(blocks) == 5, "the 7s, the 8s, the pair, and each text by itself"
    assert len({tuple(rows[epoch * 8 : epoch * 8 + 8].tolist()) for epoch in range(5)}) == 5, "each epoch has its own"


# ------------------------------------------------------------------------------------------------------- shares


def test_two_to_one():
    draws = draw(mixture_of(Toy(2 / 3, [10] * 5), Toy(1 / 3, [10] * 5)), num_tokens=60)
    assert [len(own.rows) for own in draws] == [4, 2]


def test_long_samples_are_drawn_less_often():
    draws = draw(mixture_of(Toy(0.5, [30]), Toy(0.5, [10])), num_tokens=120)
    assert [len(own.rows) for own in draws] == [2, 6]
    draws = draw(mixture_of(Toy(0.5, [30]), Toy(0.5, [10]), unit="samples"), num_tokens=120)
    assert [len(own.rows) for own in draws] == [3, 3]


@pytest.mark.parametrize("unit", UNITS)
@given(sources=toys(), room=st.integers(60, 400))
def test_every_source_is_within_half_a_sample_of_its_target(unit, sources, room):
    mixture = mixture_of(*sources, unit=unit)
    for _ in range(4):
        draw(mixture, num_tokens=room)
        levels = [stream.target / stream.sizes.share for stream in mixture.streams]
        assert max(levels) - min(levels) <= 1e-6 * max(levels), "all targets are shares of one level"
        for stream in mixture.streams:
            largest = {"tokens": 50, "trained_tokens": 25, "samples": 1}[unit]
            assert abs(getattr(stream.counters, unit) - stream.target) <= largest / 2


@given(sources=toys(), room=st.integers(100, 600))
def test_a_draw_is_about_as_long_as_asked(sources, room):
    mixture = mixture_of(*sources)
    for _ in range(3):
        drawn = sum(int(own.num_tokens.sum()) for own in draw(mixture, num_tokens=room))
        assert room - 50 * len(sources) - 2 <= drawn <= room


@pytest.mark.parametrize("unit", UNITS)
def test_the_look_ahead_is_about_as_long_as_the_draw(unit):
    """A search that began at 100,000 units would look at 100,000 samples to draw some 3,000."""
    mixture = mixture_of(Toy(0.5, [20] * 50), Toy(0.5, [40] * 50), unit=unit)
    draws = draw(mixture, num_tokens=100_000)
    for stream, own in zip(mixture.streams, draws, strict=True):
        assert len(stream._lookahead.ordered.rows) <= 4 * len(own.rows)


@given(sources=toys(), seed=st.integers(0, 9))
def test_an_epoch_has_every_sample_once(sources, seed):
    mixture = mixture_of(*sources, unit="samples", seed=seed)
    taken = [[] for _ in sources]
    for _ in range(5):
        for rows, own in zip(taken, draw(mixture), strict=True):
            rows.extend(own.rows.tolist())
    for rows, toy, stream in zip(taken, sources, mixture.streams, strict=True):
        for start in range(0, len(rows) - len(toy) + 1, len(toy)):
            assert sorted(rows[start : start + len(toy)]) == list(range(len(toy)))
        assert stream.epochs == len(rows) / len(toy)


def test_the_order_is_a_function_of_the_seed():
    def order(seed):
        (drawn,) = draw(mixture_of(Toy(1, [5] * 20), seed=seed), num_tokens=200)
        return drawn.rows.tolist()

    assert order(1) == order(1) != order(2)
    assert order(1)[:20] != order(1)[20:], "each epoch has its own"


@given(sources=toys(), unit=st.sampled_from(UNITS), number=st.integers(0, 4))
def test_a_restored_mixture_goes_on_where_it_was(sources, unit, number):
    mixture = mixture_of(*sources, unit=unit, seed=3)
    for _ in range(number):
        draw(mixture, num_tokens=120)
    state = json.loads(json.dumps(mixture.state()))
    again = mixture_of(*sources, unit=unit, seed=3)
    again.restore(state)
    for _ in range(3):
        for one, other in zip(draw(mixture), draw(again), strict=True):
            assert [array.tolist() for array in one] == [array.tolist() for array in other]


def test_what_no_pack_can_hold_is_counted_and_takes_nobodys_place():
    long = Toy(0.5, [10, 101, 10, 10])
    album = Toy(0.5, [10, 10], [(1, 2), (1, 2, 3, 4, 5)])
    mixture = mixture_of(long, album)
    draws = draw(mixture, num_tokens=1000)
    assert 1 not in draws[0].rows and 1 not in draws[1].rows
    assert [int(own.num_tokens.sum()) for own in draws] == [500, 500]
    assert [stream.counters.dropped > 0 for stream in mixture.streams] == [True, True]
    with pytest.raises(UserError, match=r"source 'toy': no sample fits .*; its shortest has 101"):
        mixture_of(Toy(1, [101, 102]))
    with pytest.raises(UserError, match="none of its samples has trained tokens"):
        mixture_of(Toy(1, [1, 1]), unit="trained_tokens")
    for epochs in (0.1, 1, 9000):  # it would be gone through at once, and give nothing
        with pytest.raises(UserError, match="none of its samples has trained tokens"):
            mixture_of(Toy(1, [1, 1], max_epochs=epochs, when_exhausted="reweight"), unit="trained_tokens")
    mixture_of(Toy(1, [1, 2], max_epochs=1), unit="trained_tokens")


def test_fewer_are_drawn_than_images_would_fit():
    mixture = mixture_of(Toy(0.5, [10] * 6, [(n,) for n in range(6)]), Toy(0.5, [10]))
    draws = draw(mixture, num_tokens=1000, num_images=7)
    assert [len(own.rows) for own in draws] == [7, 7]
    often = mixture_of(Toy(0.5, [10], [(9,)]), Toy(0.5, [10]), caps=CAPS._replace(samples_per_image=1))
    assert [len(own.rows) for own in draw(often, num_tokens=1000, most=3)] == [3, 3]


# -------------------------------------------------------------------------------------------------- end of a source


def test_a_source_gives_no_more_than_its_epochs():
    mixture = mixture_of(Toy(0.5, [10] * 4, max_epochs=1.5, when_exhausted="reweight"), Toy(0.5, [10]))
    draws = draw(mixture, num_tokens=200)
    assert [len(own.rows) for own in draws] == [6, 14], "the other source takes its place"
    assert mixture.ended() is None
    assert [len(own.rows) for own in draw(mixture, num_tokens=200)] == [0, 20]


def test_a_source_may_stop_everything():
    mixture = mixture_of(Toy(0.5, [10] * 4, max_epochs=2, name="short"), Toy(0.5, [10]))
    draw(mixture, num_tokens=100)
    assert mixture.ended() is None
    draw(mixture, num_tokens=100)
    assert mixture.ended() == "short"


def test_when_all_sources_are_at_their_end_everything_stops():
    mixture = mixture_of(*(Toy(0.5, [10], max_epochs=2, when_exhausted="reweight", name=n) for n in "ab"))
    assert sum(len(own.rows) for own in draw(mixture)) == 4
    assert mixture.ended() == "b"
    assert sum(len(own.rows) for own in draw(mixture)) == 0
