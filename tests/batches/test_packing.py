"""Packs hold what they may, and nothing is lost."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.batches.packing import Bundle, pack_window
from sft.core.sample import Caps, PackItem

CAPS = Caps(tokens=100, image_weight=3, samples_per_image=2)


def bundle(number, num_tokens, *images, items=1, weight=1):
    return Bundle(
        items=tuple(PackItem(number, sample) for sample in range(items)),
        num_tokens=num_tokens,
        images=dict.fromkeys(images, weight),
    )


def pack(*bundles, first=(), num_packs=1, caps=CAPS, seed=0, even=False):
    return pack_window(first, bundles, num_packs, caps, np.random.default_rng(seed), even=even)


def numbers(packs):
    """Which bundles each pack holds."""
    return sorted(sorted({item.source for item in one.items}) for one in packs)


@st.composite
def many(draw):
    """Up to 30 bundles that each fit a pack by themselves."""
    bundles = []
    for number in range(draw(st.integers(0, 30))):
        images = draw(st.frozensets(st.integers(0, 5), max_size=CAPS.image_weight))
        items = draw(st.integers(1, CAPS.samples_per_image)) if images else 1
        bundles.append(bundle(number, draw(st.integers(1, CAPS.tokens)), *images, items=items))
    return bundles


@given(bundles=many(), num_carried=st.integers(0, 10), num_packs=st.integers(1, 8), even=st.booleans())
def test_caps_hold_and_nothing_is_lost(bundles, num_carried, num_packs, even):
    packs, left = pack(*bundles[num_carried:], first=bundles[:num_carried], num_packs=num_packs, even=even)
    assert (packs, left) == pack(*bundles[num_carried:], first=bundles[:num_carried], num_packs=num_packs, even=even)
    assert len(packs) == num_packs
    placed = [item for one in packs for item in one.items]
    assert sorted(placed + [item for own in left for item in own.items]) == sorted(
        item for own in bundles for item in own.items
    )
    for one in packs:
        held = [bundles[number] for number in {item.source for item in one.items}]
        assert sum(own.num_tokens for own in held) <= CAPS.tokens
        samples_of = Counter(chain.from_iterable([image] * len(own.items) for own in held for image in own.images))
        assert len(samples_of) <= CAPS.image_weight
        assert all(number <= CAPS.samples_per_image for number in samples_of.values())


@given(bundles=many(), even=st.booleans())
def test_with_room_for_all_nothing_is_left_and_no_pack_is_empty(bundles, even):
    packs, left = pack(*bundles, num_packs=30, even=even)
    assert left == []
    assert sum(not one.items for one in packs) == max(30 - sum(len(own.items) for own in bundles), 0)


def test_what_was_carried_is_placed_first():
    packs, left = pack(bundle(1, 60), bundle(2, 60), first=[bundle(0, 50)])
    assert numbers(packs) == [[0]]
    assert [own.num_tokens for own in left] == [60, 60]


def test_what_needs_a_pack_of_its_own_comes_even_before_that():
    packs, left = pack(bundle(1, 90), bundle(2, 50), first=[bundle(0, 20)], num_packs=2)
    assert numbers(packs) == [[0, 2], [1]]
    assert left == []


def test_long_bundles_are_packed_by_best_fit():
    packs, left = pack(bundle(0, 60), bundle(1, 40), bundle(2, 70), bundle(3, 30), num_packs=2)
    assert numbers(packs) == [[0, 1], [2, 3]]
    assert left == []


def test_images_are_spread_over_all_packs():
    short = [bundle(number, 10, number) for number in range(6)]
    texts = [bundle(number, 70) for number in (6, 7)]
    packs, left = pack(*short, *texts, num_packs=2)
    assert left == []
    assert [len(one) for one in numbers(packs)] == [4, 4]


def test_no_pack_is_empty_while_there_is_a_bundle_for_each():
    packs, left = pack(*[bundle(number, 10, 7) for number in range(3)], num_packs=3)
    assert numbers(packs) == [[0], [1], [2]], "they would fit in two"
    assert left == []


@pytest.mark.parametrize(("samples_per_image", "num_left"), [(1, 2), (2, 1), (4, 0)])
def test_samples_about_one_image_share_a_pack_up_to_the_cap(samples_per_image, num_left):
    caps = Caps(tokens=100, image_weight=1, samples_per_image=samples_per_image)
    _, left = pack(bundle(0, 10, 7), bundle(1, 10, 7), bundle(2, 10, 7), caps=caps)
    assert len(left) == num_left


def test_the_order_of_packs_is_drawn_from_the_seed():
    ten = [bundle(number, 100) for number in range(10)]

    def order(seed):
        return [one.items[0].source for one in pack(*ten, num_packs=10, seed=seed)[0]]

    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(10))


def test_even_packs_hold_about_the_same_weight_of_images_and_are_as_full():
    """Eight images of 45 tokens, every fourth one of 17 tiles, in four packs."""
    caps = Caps(tokens=100, image_weight=100, samples_per_image=1)
    images = [bundle(number, 45, number, weight=1 if number % 4 else 17) for number in range(8)]
    held = {}
    for even in (False, True):
        packs, left = pack(*images, num_packs=4, caps=caps, even=even)
        assert left == []
        held[even] = sorted(sum(1 if item.source % 4 else 17 for item in one.items) for one in packs)
    assert held == {False: [2, 2, 2, 34], True: [2, 2, 18, 18]}


def test_what_is_left_over_is_exchanged_for_what_fills_better():
    """The carry comes first, 70 and 20 tokens; 30 fill the pack beside 70."""
    caps = Caps(tokens=100, image_weight=9, samples_per_image=1)
    carry, new = [bundle(0, 70, 0), bundle(1, 20, 1)], bundle(2, 30, 2)
    assert numbers(pack(new, first=carry, caps=caps)[0]) == [[0, 1]]
    packs, left = pack(new, first=carry, caps=caps, even=True)
    assert numbers(packs) == [[0, 2]] and left == [carry[1]]
    heavy = bundle(2, 30, 2, weight=9)
    assert numbers(pack(heavy, first=carry, caps=caps, even=True)[0]) == [[0, 1]], "its image would be too much"


def test_the_even_plan_gives_way_where_the_other_is_fuller():
    """Two texts over half a pack go to two packs, and leave no room for the images of 60 tokens; best fit does not."""
    caps = Caps(tokens=100, image_weight=9, samples_per_image=1)
    bundles = [bundle(0, 55), bundle(1, 45), bundle(2, 60, 2), bundle(3, 40, 3)]
    assert pack(*bundles, num_packs=2, caps=caps, even=True)[1] == pack(*bundles, num_packs=2, caps=caps)[1]
