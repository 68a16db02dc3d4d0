"""The packs of a step dealt to ranks."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.batches.steps import assign_packs

step_costs = st.lists(st.integers(1, 3000), min_size=1, max_size=150)
ranks = st.sampled_from([1, 2, 3, 4, 8, 64])
sizes = st.integers(1, 4)


def loads_of(costs, packs_by_rank):
    return [sum(costs[pack] for pack in packs) for packs in packs_by_rank]


def test_the_dearest_packs_go_together_and_the_step_is_even():
    """10 + 1 on one rank, 9 + 2 on the other."""
    assert assign_packs([1, 10, 2, 9], num_ranks=2, micro_batch_packs=1) == [[[1], [0]], [[3], [2]]]


def test_ranks_left_short_have_an_empty_micro_batch_at_the_end():
    assert assign_packs([5, 5, 5, 3, 3], num_ranks=3, micro_batch_packs=1) == [[[0], [3]], [[1], [4]], [[2], []]]


def test_a_hundred_packs_on_eight_ranks_are_thirteen_micro_steps():
    """104 slots, as the design says."""
    dealt = assign_packs([1.0] * 100, num_ranks=8, micro_batch_packs=1)
    assert [len(own) for own in dealt] == [13] * 8
    assert sum(not packs for own in dealt for packs in own) == 4


def test_one_rank_does_everything():
    assert assign_packs([1, 3, 2], num_ranks=1, micro_batch_packs=2) == [[[1, 2], [0]]]


@given(costs=step_costs, num_ranks=ranks, size=sizes)
def test_every_pack_is_dealt_once_whatever_the_number_of_ranks(costs, num_ranks, size):
    dealt = assign_packs(costs, num_ranks, size)
    assert sorted(pack for own in dealt for packs in own for pack in packs) == [*range(len(costs))]
    assert len(dealt) == num_ranks
    assert {len(own) for own in dealt} == {-(-len(costs) // (num_ranks * size))}
    assert max(len(packs) for own in dealt for packs in own) <= size


@given(costs=step_costs, num_ranks=ranks, size=sizes)
def test_ranks_differ_by_one_pack_at_most(costs, num_ranks, size):
    dealt = assign_packs(costs, num_ranks, size)
    whole = loads_of(costs, [[pack for packs in own for pack in packs] for own in dealt])
    assert max(whole) - min(whole) <= max(costs)
    for micro_step in zip(*dealt, strict=True):
        loads = loads_of(costs, micro_step)
        assert max(loads) - min(loads) <= max(costs[pack] for packs in micro_step for pack in packs)


@given(costs=step_costs, num_ranks=ranks)
def test_no_pack_waits_for_one_of_an_earlier_micro_step(costs, num_ranks):
    """Packs side by side are alike: micro-steps are in the order of their costs."""
    steps = [
        [costs[pack] for packs in step for pack in packs]
        for step in zip(*assign_packs(costs, num_ranks, 1), strict=True)
    ]
    assert all(min(one) >= max(other) for one, other in pairwise(steps))


def test_nothing_is_dealt_to_nobody():
    with pytest.raises(ValueError, match="0 ranks"):
        assign_packs([1], num_ranks=0, micro_batch_packs=1)
