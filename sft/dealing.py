"""The packs of an optimizer step dealt to ranks, so that each has as much to do as the others.

Ranks walk through the micro-steps together, and the slowest sets the pace: the packs of a micro-step are alike in cost,
and what is left to even out is evened out over the step. What a pack costs is its text tokens and its distinct images,
each worth as many text tokens as its model family says (`image_cost_in_tokens`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil


def deal(costs: Sequence[float], num_ranks: int, micro_batch_packs: int) -> list[list[list[int]]]:
    """Rank -> micro-step -> numbers of its packs.

    Every rank gets the same number of micro-steps, the fewest that hold all packs; in the last ones some are short of
    packs or have none (a dummy then). Over the whole step, and inside each micro-step, the loads of two ranks differ by
    no more than the costliest pack there.
    """
    if num_ranks < 1 or micro_batch_packs < 1:
        raise ValueError(f"{num_ranks} ranks, {micro_batch_packs} packs at once: there must be one or more of each")
    dearest_first = sorted(range(len(costs)), key=lambda pack: (-costs[pack], pack))
    packs_per_micro_step = num_ranks * micro_batch_packs
    dealt: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for micro_step in range(ceil(len(costs) / packs_per_micro_step)):
        first = micro_step * packs_per_micro_step
        hands = _hands(dearest_first[first : first + packs_per_micro_step], costs, num_ranks)
        for rank, (cost, packs) in zip(_lightest_first(loads), hands, strict=True):
            loads[rank] += cost
            dealt[rank].append(packs)
    return dealt


def _hands(packs: Sequence[int], costs: Sequence[float], number: int) -> list[tuple[float, list[int]]]:
    """The packs of a micro-step as micro-batches of equal cost, the dearest first. `packs` come dearest first."""
    hands: list[list[int]] = [[] for _ in range(number)]
    loads = [0.0] * number
    for start in range(0, len(packs), number):  # a pack each: the dearest to the hand that has least
        for hand, pack in zip(_lightest_first(loads), packs[start : start + number], strict=False):
            hands[hand].append(pack)
            loads[hand] += costs[pack]
    return sorted(zip(loads, hands, strict=True), key=lambda hand: -hand[0])


def _lightest_first(loads: Sequence[float]) -> list[int]:
    return sorted(range(len(loads)), key=loads.__getitem__)
