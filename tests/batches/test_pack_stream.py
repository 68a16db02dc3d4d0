"""The stream of packs: shares at window ends, restored exactly, nothing lost and nothing twice."""

import hashlib
import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from helpers.planning import Toy, data_config, mixtures
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sft.batches.declared_sizes import declared_sources
from sft.batches.pack_stream import MIN_WINDOW_PACKS, Planner
from sft.core.errors import UserError
from sft.core.sample import PackItem
from sft.core.shipped import recipe_path
from sft.data.orders import Cursor
from sft.recipe import load_recipe


def planner_of(sizes, *, packs_per_step=4, seed=0, **options):
    return Planner(sizes, data_config(**options), packs_per_step=packs_per_step, seed=seed)


def windows(planner, number):
    return list(islice(planner.windows(), number))


@given(sizes=mixtures(), images=st.integers(2, 6), sharing=st.integers(1, 4), even=st.booleans())
def test_windows_keep_every_promise(sizes, images, sharing, even):
    """Caps hold in each pack, no pack is empty, and what was drawn is packed or carried."""
    planner = planner_of(sizes, max_images_per_pack=images, max_samples_per_image_per_pack=sharing, even_packs=even)
    packed = Counter()
    for window in windows(planner, 2):
        assert len(window) == MIN_WINDOW_PACKS
        for pack in window:
            assert pack.items
            assert sum(sizes[s].lengths[i] for s, i in pack.items) <= 64
            shown_images = Counter(image for s, i in pack.items for image in set(sizes[s].shown[i]))
            assert len(shown_images) <= images
            assert max(shown_images.values(), default=0) <= sharing
            packed.update(item.source for item in pack.items)
    carried = Counter(item.source for bundle in planner.carry for item in bundle.items)
    assert [stream.counters.dropped for stream in planner.mixture.streams] == [0] * len(sizes)
    assert [packed[s] + carried[s] for s in range(len(sizes))] == [stream.passed for stream in planner.mixture.streams]


def rich_source(share, rng, longest):
    """100 samples of up to `longest` tokens, most of them about one or two of 150 images."""
    lengths = rng.integers(4, longest + 1, 100).tolist()
    images = [tuple(rng.integers(0, 150, rng.integers(0, 3)).tolist()) for _ in lengths]
    return Toy(share, lengths, images)


@hypothesis_settings(max_examples=15)
@given(
    shares=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    longest=st.sampled_from([16, 40, 64]),
    seed=st.integers(0, 99),
)
def test_shares_at_window_ends_are_within_three_packs(shares, longest, seed):
    rng = np.random.default_rng(seed)
    sizes = [rich_source(share / sum(shares), rng, longest) for share in shares]
    tokens = np.zeros(len(sizes))
    for window in windows(planner_of(sizes, seed=seed, max_images_per_pack=8), 3):
        for item in (item for pack in window for item in pack.items):
            tokens[item.source] += sizes[item.source].lengths[item.sample]
        error = np.abs(tokens - np.array([size.share for size in sizes]) * tokens.sum())
        assert error.max() <= 3 * 64


def test_a_thousand_sources_are_exact_and_restored():
    """Shares from 1 to 7 in 3,997, in windows of 512 packs: the smallest source gives half a sample a window."""
    lengths = [[4 + (n * i) % 30 for i in range(50)] for n in range(1000)]
    sizes = [Toy((1 + n % 7) / 3997, own, name=f"source {n}") for n, own in enumerate(lengths)]
    planner = planner_of(sizes, packs_per_step=512)
    tokens = np.zeros(1000)
    for window in windows(planner, 2):
        for item in (item for pack in window for item in pack.items):
            tokens[item.source] += sizes[item.source].lengths[item.sample]
        error = np.abs(tokens - np.array([size.share for size in sizes]) * tokens.sum())
        assert error.max() <= 64, "half a sample, and what is carried"
    state = json.dumps(planner.state())
    again = planner_of(sizes, packs_per_step=512)
    again.restore(json.loads(state))
    assert windows(again, 1) == windows(planner, 1)
    for stream in planner.mixture.streams:  # where step 22,000 of the card is: 4.5 billion tokens
        stream.target += 4.5e9 * stream.sizes.share
        stream.counters.tokens, stream.counters.trained_tokens = round(stream.target) + 7, round(stream.target / 2)
        stream.passed += 200_000
        stream._cursor, stream._lookahead = Cursor(stream.passed), None
    assert len(json.dumps(planner.mixture.state())) < 48_000


def test_the_stream_is_the_one_it_always_was():
    """Of four sources, two with images that three samples share: a change of the order would spoil every kept run."""
    shown = [(i // 3,) for i in range(30)]
    sizes = [
        Toy((1 + n) / 10, [4 + (7 * n + 5 * i) % 40 for i in range(30)], shown if n % 2 else [()] * 30)
        for n in range(4)
    ]
    found = repr(windows(planner_of(sizes), 3)).encode()
    assert hashlib.sha256(found).hexdigest()[:16] == "97b60614b435d800"


def test_the_card_is_packed_as_it_always_was():
    """12 windows of idefics-9b-instruct, by a hash of the version before even packs."""
    recipe = load_recipe(recipe_path("idefics-9b-instruct"))
    assert not recipe.data.even_packs
    planner = Planner(declared_sources(recipe.data), recipe.data, packs_per_step=recipe.packs_per_step, seed=0)
    found = repr(windows(planner, 12)).encode()
    assert hashlib.sha256(found).hexdigest()[:16] == "81a2198f818ea134"


def test_shares_hold_even_where_one_image_is_asked_for_everywhere():
    """A pack may hold four samples of it, so the packs stay half empty rather than leave its source behind."""
    sizes = [Toy(0.5, [4]), Toy(0.5, [4], [(0,)])]
    planner = planner_of(sizes)
    drawn = Counter(item.source for window in windows(planner, 5) for pack in window for item in pack.items)
    assert drawn[0] == drawn[1] >= 5 * 63 * 4
    assert planner.carry == []


@hypothesis_settings(max_examples=20)
@given(sizes=mixtures(), number=st.integers(0, 3), even=st.booleans())
def test_a_restored_planner_gives_the_same_windows(sizes, number, even):
    planner = planner_of(sizes, even_packs=even)
    windows(planner, number)
    state = planner.state()
    written = json.dumps(state)
    expected = windows(planner, 2)
    assert json.dumps(state) == written, "a state does not change when the planner goes on"
    again = planner_of(sizes, even_packs=even)
    again.restore(json.loads(written))
    assert windows(again, 2) == expected


def test_a_state_of_an_earlier_version_is_restored_or_refused_by_name():
    planner = planner_of([Toy(1, [8])])
    state = planner.state()
    del state["filled"]
    planner.restore(state)
    with pytest.raises(UserError, match="earlier version"):
        planner_of([Toy(1, [8])], even_packs=True).restore(state)


def test_where_sizes_leave_packs_unfilled_even_packs_carry_little():
    """No two samples of 40 tokens fit a pack of 64; drawing for full windows, the carry grows to a third of one."""
    carried = {}
    for even in (False, True):
        planner = planner_of([Toy(1, [40] * 30)], even_packs=even)
        assert all(len(pack.items) == 1 for window in windows(planner, 8) for pack in window)
        carried[even] = len(planner.carry)
    assert carried == {False: 38, True: 3}


def test_even_packs_are_never_empty_though_long_samples_follow_short_ones():
    """After a window of samples of half a pack, those for its fill are fewer than packs."""
    sizes = [Toy(1, [33] * 200 + [64] * 200)]
    for seed in range(8):
        planner = planner_of(sizes, even_packs=True, seed=seed)
        assert all(pack.items for window in windows(planner, 6) for pack in window)


def test_the_seed_is_the_only_dice():
    sizes = [Toy(1, list(range(4, 24)))]
    assert windows(planner_of(sizes, seed=1), 2) == windows(planner_of(sizes, seed=1), 2)
    assert windows(planner_of(sizes, seed=1), 2) != windows(planner_of(sizes, seed=2), 2)


@pytest.mark.parametrize(("packs_per_step", "expected"), [(1, 64), (4, 64), (50, 100), (64, 64), (100, 100)])
def test_a_window_is_a_whole_number_of_steps(packs_per_step, expected):
    assert planner_of([Toy(1, [8])], packs_per_step=packs_per_step).window_packs == expected


def test_a_sample_that_no_pack_can_hold_is_counted_and_takes_nobodys_place():
    sizes = [Toy(0.5, [10, 65, 10], name="long"), Toy(0.5, [10, 10], [(1, 2), (1, 2, 3)], name="images")]
    planner = planner_of(sizes, max_images_per_pack=2)
    drawn = Counter(item for window in windows(planner, 3) for pack in window for item in pack.items)
    assert PackItem(0, 1) not in drawn and PackItem(1, 1) not in drawn
    assert min(stream.counters.dropped for stream in planner.mixture.streams) > 0
    tokens = [10 * sum(number for item, number in drawn.items() if item.source == s) for s in (0, 1)]
    assert abs(tokens[0] - sum(tokens) / 2) <= 3 * 64


def test_a_source_that_fits_no_pack_is_refused():
    """Drawing from it would never end."""
    with pytest.raises(UserError, match=r"source 'long': .*sequence_length.* its shortest has 65"):
        planner_of([Toy(0.5, [10], name="short"), Toy(0.5, [65, 70], name="long")])
    with pytest.raises(UserError, match="source 'album'"):
        planner_of([Toy(1, [10], [(1, 2, 3)], name="album")], max_images_per_pack=2)


@pytest.mark.parametrize("number", [1, 10, 300])
def test_every_sample_of_an_epoch_is_packed_and_no_pack_is_empty(number):
    """A source of samples of a pack each, gone through once, four packs a step: the last step may have fewer."""
    planner = planner_of([Toy(1, [64] * number, max_epochs=1)])
    packs = [pack for window in planner.windows() for pack in window]
    assert sorted(pack.items for pack in packs) == [(PackItem(0, row),) for row in range(number)]
    assert planner.mixture.ended() == "toy"


@pytest.mark.parametrize("unit", ["tokens", "trained_tokens", "samples"])
def test_at_the_end_of_a_source_the_others_have_given_their_shares(unit):
    """Once they filled the last window alone: 36 samples of one's own would have been 3 packs of 64."""
    sizes = [Toy(0.75, [16] * 12, max_epochs=3, name="mine"), Toy(0.25, [16] * 50, name="replay")]
    planner = planner_of(sizes, share_unit=unit)
    given = Counter(item.source for window in planner.windows() for pack in window for item in pack.items)
    assert given == {0: 36, 1: 12} and planner.mixture.ended() == "mine"


@pytest.mark.parametrize("packs_per_step", [1, 4])
@pytest.mark.parametrize("number", [50, 3000])
def test_the_last_window_is_as_few_packs_as_hold_what_is_left(number, packs_per_step):
    """Once it was spread over a whole window, and packs were a fifth full."""
    sizes = [Toy(1, [4 + i % 20 for i in range(number)], [(i,) if i % 3 else () for i in range(number)], max_epochs=2)]
    planner = planner_of(sizes, packs_per_step=packs_per_step, max_images_per_pack=8)
    packs = [pack for window in planner.windows() for pack in window]
    assert Counter(item for pack in packs for item in pack.items) == {PackItem(0, i): 2 for i in range(number)}
    assert len(packs) % packs_per_step == 0 and planner.carry == []
    assert len(packs) < 1.05 * 2 * sum(sizes[0].lengths) / 64 + packs_per_step


def test_what_is_drawn_last_is_packed_even_where_it_takes_more_than_a_window():
    """Of 65 samples longer than half a pack no two fit into one, although their tokens fit into 64."""
    planner = planner_of([Toy(1, [33] * 65, max_epochs=1)], packs_per_step=1)
    assert [len(window) for window in planner.windows()] == [65]


def test_a_step_counts_the_openings_that_are_predicted_where_samples_see_each_other():
    """Three samples of a pack of 12 tokens have two openings between them; half of each sample is trained besides."""
    toys = [Toy(share=1, lengths=[4] * 30)]
    for isolated, more in ((True, 0), (False, 2)):
        data = data_config(sequence_length=12, train_on="all", pack_isolation=isolated)
        planner = Planner(toys, data, packs_per_step=1, seed=0)
        pack = next(pack for pack in next(planner.windows()) if len(pack.items) == 3)
        assert planner.num_trained([pack]) == 3 * 2 + more
