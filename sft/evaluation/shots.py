"""Answered items that are shown before the one that is asked.

They are drawn by a hash of seed, benchmark and item alone, so that they are the same for every model, in any order, and
on any number of processes; or they are those whose images are most alike (`sft.evaluation.alike`). Draws are nested:
the 4 shots of an item are the last 4 of its 32.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from sft.core.errors import UserError
from sft.evaluation.prompts import TaskItem

Order = Callable[[TaskItem], Iterable[int]]
"""Gives the numbers of support items for an item, the one that stands next to the question first."""


class Shots:
    """The shots of each item of a task."""

    def __init__(
        self, support: Sequence[TaskItem], number: int, order: Order, group: Callable[[TaskItem], str] | None = None
    ) -> None:
        """`group` names the items that have the same shots, where that is so."""
        self.support, self.number, self.group, self._order = support, number, group, order

    def of(self, item: TaskItem) -> list[TaskItem]:
        """Return the shots of an item in reading order, none about its own image."""
        others = (shot for n in self._order(item) if (shot := self.support[n]).cluster != item.cluster)
        return list(islice(others, self.number))[::-1]


class AlikeShots(Shots):
    """Those whose images are most alike to the item's. `set_nearest` comes before `of`."""

    by = ""
    """The model that says which are alike."""

    def __init__(self, support: Sequence[TaskItem], number: int, at_random: Order, features: str | None) -> None:
        """`at_random` draws for items without an image; `features` is the folder or hub id of CLIP, if one is named."""
        super().__init__(support, number, self._alike)
        self.features, self._at_random = features, at_random
        self._nearest: dict[int | str, list[int]] = {}

    def set_nearest(self, items: Sequence[TaskItem], nearest_QK: NDArray[np.int32], by: str) -> None:
        """Take the numbers of support items for each item, the most alike first; -1 where there are no more."""
        rows = (row[row >= 0].tolist() for row in nearest_QK)
        self._nearest, self.by = {item.id: row for item, row in zip(items, rows, strict=True)}, by

    @property
    def num_at_random(self) -> int:
        """Items of which nothing is known that is alike, since they have no image; their shots are drawn."""
        return sum(not row for row in self._nearest.values())

    def _alike(self, item: TaskItem) -> Iterator[int]:
        nearest = self._nearest[item.id]
        return chain(nearest, (number for number in self._at_random(item) if number not in nearest))


def check_support(support: Sequence[TaskItem], number: int, benchmark: str) -> None:
    """
    Raises:
        UserError: there are fewer items to show than are asked for.
    """
    most_of_a_cluster = max(Counter(item.cluster for item in support).values(), default=0)
    if len(support) - most_of_a_cluster < number:
        raise UserError(f"{benchmark}: shots: {number} are asked for, of {len(support)} questions")


def random_order(num_support: int, key: str, num_groups: int | None = None) -> Order:
    """Return draws of support items for each item; with groups, all items of a group have the same ones.

    Groups make fixed shots cheap, since the prefix of a group is computed once, and the spread between them shows how
    much the choice of shots matters.
    """

    def order(item: TaskItem) -> Iterator[int]:
        rng = random.Random(f"shots {key} {group_of(item, key, num_groups)}")
        drawn: set[int] = set()
        while len(drawn) < num_support:
            number = rng.randrange(num_support)
            if number not in drawn:
                drawn.add(number)
                yield number

    return order


def group_of(item: TaskItem, key: str, num_groups: int | None) -> str:
    """Return the group of an item, the same for all items about an image; without groups, its own name."""
    return str(random.Random(f"group {key} {item.cluster}").randrange(num_groups)) if num_groups else str(item.id)
