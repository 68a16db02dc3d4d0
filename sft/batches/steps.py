"""The plan of a run on one of its ranks: windows of packs -> steps -> the micro-batches of this rank.

Every rank plans everything, since a plan is a pure function of the sources, the settings and the seed, and takes its
own part of it. Planning runs in a thread, a window ahead. Where training stands is known by steps, since whoever takes
plans may be ahead of it.

The packs of an optimizer step are assigned to ranks so that all have the same amount of work. Ranks walk through the
micro-steps together, and the slowest sets the pace: the packs of a micro-step cost about the same, and the rest is
balanced over the step. The cost of a pack is its text tokens and its distinct images, each worth as many text tokens as
its weight times the family's `cost_in_tokens`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from math import ceil
from typing import Any, NamedTuple

import numpy as np

from sft.batches.pack_stream import Planner, by_source, weigh_images
from sft.core.distributed import ALONE, Rank
from sft.core.parallel import prefetch
from sft.core.sample import Pack
from sft.data.reader import Location
from sft.data.sources import Sources


class Plan(NamedTuple):
    """What becomes a micro-batch."""

    step: int
    """The optimizer step, the first of which is 1."""
    packs: tuple[tuple[Location, ...], ...]
    """None where the rank is left without one: it computes a dummy then."""
    num_trained_tokens: int
    """Of the whole step, on all ranks."""


@dataclass(eq=False)
class Plans:
    """The micro-batches of a rank, from any step on."""

    sources: Sources
    planner: Planner
    _: KW_ONLY
    micro_batch_packs: int
    image_cost: float = 0.0
    """What an image of weight 1 costs in text tokens; packs are assigned to ranks by it."""
    rank: Rank = ALONE
    _first_step: int = field(default=1, init=False)
    """The first step of the next window."""
    _steps_to_skip: int = field(default=0, init=False)
    _starts: deque[tuple[int, dict[str, Any]]] = field(default_factory=deque, init=False)
    """The first step of each window that training may still be in, and the planner's state before it."""

    @property
    def micro_batches_per_step(self) -> int:
        """On each rank."""
        return -(-self.planner.packs_per_step // (self.micro_batch_packs * self.rank.of))

    @property
    def micro_batches_of_all(self) -> int:
        """Those of a step on all ranks that have packs."""
        whole, rest = divmod(self.planner.packs_per_step, self.micro_batch_packs * self.rank.of)
        return whole * self.rank.of + min(rest, self.rank.of)

    @property
    def idle_share(self) -> float:
        """Share of the places for packs that stays empty, since packs are not a multiple of them."""
        places = self.micro_batches_per_step * self.micro_batch_packs * self.rank.of
        return 1 - self.planner.packs_per_step / places

    def __iter__(self) -> Iterator[Plan]:
        self._starts.append((self._first_step, self.planner.state()))
        for steps, state_after in prefetch(self._windows()):
            first, skipped = self._first_step, self._steps_to_skip
            self._first_step, self._steps_to_skip = first + len(steps), 0
            self._starts.append((self._first_step, state_after))
            for step, packs in enumerate(steps[skipped:], first + skipped):
                yield from self._of_step(step, packs)

    def _windows(self) -> Iterator[tuple[list[list[Pack]], dict[str, Any]]]:
        """Yield the packs of each step of a window, and the planner's state after it."""
        size = self.planner.packs_per_step
        for packs in self.planner.windows():
            yield [packs[first : first + size] for first in range(0, len(packs), size)], self.planner.state()

    def _of_step(self, step: int, packs: Sequence[Pack]) -> Iterator[Plan]:
        num_trained_tokens = max(self.planner.num_trained(packs), 1)  # what sums are divided by
        assigned = assign_packs(self._costs(packs), self.rank.of, self.micro_batch_packs)[self.rank.number]
        assigned += [[]] * (self.micro_batches_per_step - len(assigned))  # the last step of all may be short
        for numbers in assigned:
            own = (tuple(self.sources.locate(item) for item in packs[number].items) for number in numbers)
            yield Plan(step, tuple(own), num_trained_tokens)

    def _costs(self, packs: Sequence[Pack]) -> list[float]:
        """Text tokens of each pack, and its distinct images at their worth."""
        costs = np.zeros(len(packs))
        shown = []  # of each image its pack, key and weight
        for index, rows, numbers in by_source(packs):
            source = self.planner.sizes[index]
            costs += np.bincount(numbers, source.num_tokens(rows), len(packs))
            images = source.images(rows)
            shown.append(np.stack([np.repeat(numbers, images.numbers), images.keys, images.weights]))
        return list(costs + self.image_cost * weigh_images(shown, len(packs))[1])

    def state(self, step: int) -> dict[str, Any]:
        """Return where the plan stands after a step, as JSON: the next one, its window, and how far into that it is."""
        while len(self._starts) > 1 and self._starts[1][0] <= step + 1:
            self._starts.popleft()
        if not self._starts:
            return {"window": self.planner.state(), "steps": self._steps_to_skip, "next": step + 1}
        first_step, window = self._starts[0]
        return {"window": window, "steps": step + 1 - first_step, "next": step + 1}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; at most one window is planned again."""
        self.planner.restore(state["window"])
        self._steps_to_skip = state["steps"]
        self._first_step = first_step_of(state, self.planner)


def first_step_of(state: dict[str, Any], planner: Planner) -> int:
    """Return the first step of the window in which a plan stands (`Plans.state`), to which the planner is restored."""
    if "next" in state:
        return int(state["next"] - state["steps"])
    return planner.window * (planner.window_packs // planner.packs_per_step) + 1  # of an earlier version


def assign_packs(costs: Sequence[float], num_ranks: int, micro_batch_packs: int) -> list[list[list[int]]]:
    """Assign the packs of a step: return, for each rank and each micro-step, the numbers of its packs.

    Every rank gets the same number of micro-steps, the fewest that hold all packs; in the last ones some are short of
    packs or have none (a dummy then). Over the whole step, and inside each micro-step, the loads of two ranks differ by
    no more than the costliest pack there.
    """
    if num_ranks < 1 or micro_batch_packs < 1:
        raise ValueError(f"{num_ranks} ranks, {micro_batch_packs} packs at once: there must be one or more of each")
    dearest_first = sorted(range(len(costs)), key=lambda pack: (-costs[pack], pack))
    packs_per_micro_step = num_ranks * micro_batch_packs
    assigned: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for micro_step in range(ceil(len(costs) / packs_per_micro_step)):
        first = micro_step * packs_per_micro_step
        micro_batches = _balanced(dearest_first[first : first + packs_per_micro_step], costs, num_ranks)
        for rank, (cost, packs) in zip(_lightest_first(loads), micro_batches, strict=True):
            loads[rank] += cost
            assigned[rank].append(packs)
    return assigned


def _balanced(packs: Sequence[int], costs: Sequence[float], number: int) -> list[tuple[float, list[int]]]:
    """Divide the packs of a micro-step into micro-batches of about equal cost; return cost and packs of each, the
    dearest first. `packs` come dearest first."""
    micro_batches: list[list[int]] = [[] for _ in range(number)]
    loads = [0.0] * number
    for start in range(0, len(packs), number):  # a pack each: the dearest to the micro-batch that has least
        for own, pack in zip(_lightest_first(loads), packs[start : start + number], strict=False):
            micro_batches[own].append(pack)
            loads[own] += costs[pack]
    return sorted(zip(loads, micro_batches, strict=True), key=lambda micro_batch: -micro_batch[0])


def _lightest_first(loads: Sequence[float]) -> list[int]:
    return sorted(range(len(loads)), key=loads.__getitem__)
