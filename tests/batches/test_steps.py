"""The plan of a run: the same steps for any number of ranks, from any step on."""

import json
from collections import Counter
from itertools import islice

import pytest
from helpers.planning import Toy, data_config, mixtures
from hypothesis import given
from hypothesis import strategies as st

from sft.batches.pack_stream import Planner
from sft.batches.steps import Plans
from sft.core.distributed import ALONE, Rank
from sft.data.reader import Location


class Located:
    """Sources of which nothing but places is asked."""

    @staticmethod
    def locate(item):
        return Location(item.source, 0, item.sample)


def plans_of(sizes, *, micro_batch_packs=1, rank=ALONE, packs_per_step=5, **options):
    planner = Planner(sizes, data_config(sequence_length=64, **options), packs_per_step=packs_per_step, seed=7)
    return Plans(Located, planner, micro_batch_packs=micro_batch_packs, image_cost=3.0, rank=rank)


def steps_of(plans, number):
    """The first steps: for each its number and its micro-batches."""
    of_step = plans.micro_batches_per_step
    taken = list(islice(plans, number * of_step))
    return [taken[first : first + of_step] for first in range(0, len(taken), of_step)]


@given(sizes=mixtures(), num_ranks=st.sampled_from([2, 3, 4, 64]), micro_batch_packs=st.integers(1, 3))
def test_ranks_share_out_the_steps_that_one_would_do(sizes, num_ranks, micro_batch_packs):
    alone = steps_of(plans_of(sizes), 3)
    ranks = [
        steps_of(plans_of(sizes, micro_batch_packs=micro_batch_packs, rank=Rank(number, num_ranks)), 3)
        for number in range(num_ranks)
    ]
    for step, plans in enumerate(alone):
        own = [plan for rank in ranks for plan in rank[step]]
        assert Counter(pack for plan in own for pack in plan.packs) == Counter(pack for p in plans for pack in p.packs)
        assert {plan.num_trained_tokens for plan in own} == {plan.num_trained_tokens for plan in plans}
        assert {plan.step for plan in own} == {step + 1}
        assert len({len(rank[step]) for rank in ranks}) == 1, "ranks walk through the micro-steps together"


@given(sizes=mixtures(), step=st.integers(0, 40), ahead=st.integers(0, 30), even=st.booleans())
def test_a_restored_plan_goes_on_with_the_next_step(sizes, step, ahead, even):
    """A window is 13 steps of 5 packs. Whoever makes batches may have taken plans of later steps already."""
    plans = plans_of(sizes, even_packs=even)
    taken = list(islice(plans, 5 * (step + ahead)))
    state = json.loads(json.dumps(plans.state(step)))
    again = plans_of(sizes, even_packs=even)
    again.restore(state)
    assert list(islice(again, 5 * ahead)) == taken[5 * step :]
    assert again.planner.window - state["window"]["window"] <= 1 + (5 * ahead + 64) // 65 + 1
    assert 0 <= state["steps"] <= 13, "one window at most is planned again"


def test_states_are_of_the_step_asked_for_even_twice(sources):
    plans = Plans(sources, Planner(sources.sources, sources.data, packs_per_step=4, seed=0), micro_batch_packs=4)
    taken = list(islice(plans, 40))
    for step in (3, 16, 17, 17, 35):
        again = Plans(sources, Planner(sources.sources, sources.data, packs_per_step=4, seed=0), micro_batch_packs=4)
        again.restore(plans.state(step))
        assert list(islice(again, 2)) == taken[step : step + 2]


def test_steps_count_from_one(sources):
    """A window is 16 steps of 4 packs."""
    plans = Plans(sources, Planner(sources.sources, sources.data, packs_per_step=4, seed=0), micro_batch_packs=2)
    steps = [plan.step for plan in islice(plans, 2 * 2 * 16 + 3)]
    assert steps == [step for step in range(1, 34) for _ in range(2)] + [34]


def test_a_hundred_packs_on_eight_ranks_leave_4_of_104_places_idle(sources):
    planner = Planner(sources.sources, sources.data, packs_per_step=100, seed=0)
    plans = Plans(sources, planner, micro_batch_packs=1, rank=Rank(0, 8))
    assert (plans.micro_batches_per_step, plans.idle_share) == (13, pytest.approx(4 / 104))


def epochs_of(number, state=None):
    """The plan of so many epochs of ten samples, each a pack, two packs a step."""
    plans = plans_of([Toy(1, [64] * 10, max_epochs=number)], packs_per_step=4, micro_batch_packs=2)
    if state:
        plans.restore(state)
    return plans


def test_a_last_step_with_fewer_packs_has_as_many_micro_batches_as_the_others():
    taken = list(epochs_of(1))
    assert [len(plan.packs) for plan in taken] == [2, 2, 2, 2, 2, 0]
    assert [plan.step for plan in taken] == [1, 1, 2, 2, 3, 3] and taken[-1].num_trained_tokens == 64


def test_more_epochs_after_the_last_go_on_with_the_next_one():
    short = epochs_of(3)
    first = list(short)
    state = json.loads(json.dumps(short.state(8)))
    more = list(epochs_of(5, state))
    assert (first[-1].step, more[0].step, more[-1].step) == (8, 9, 13)
    seen = Counter(place.row for plan in first + more for pack in plan.packs for place in pack)
    assert seen == dict.fromkeys(range(10), 5)
