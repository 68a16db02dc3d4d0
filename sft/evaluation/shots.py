"""Answered items that are shown before the one that is asked.

They are drawn by a hash of seed, benchmark and item alone, so that they are the same for every model, in any order, and
on any number of processes; or they are those whose images are most alike (`sft.evaluation.alike`). Draws are nested:
the 4 shots of an item are the last 4 of its 32.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice

from sft.core.errors import UserError
from sft.evaluation.prompts import TaskItem

Order = Callable[[TaskItem], Iterable[int]]
"""Gives the numbers of support items for an item, the one that stands next to the question first."""


class Shots:
    """The shots of each item of a task."""

    alike_by: str | None = None
    """The model that says which images are alike; empty before `prefer`, None where none is asked."""
    features: str | None = None
    """The CLIP that is to say so, where one is named."""
    num_at_random = 0
    """Items that nothing is like, since they have no image: their shots are drawn."""

    def __init__(
        self, support: Sequence[TaskItem], number: int, order: Order, group: Callable[[TaskItem], str] | None = None
    ) -> None:
        """`group` names the items that have the same shots."""
        self.support, self.number, self.group, self._order = support, number, group, order

    def prefer(self, nearest: Mapping[int | str, Sequence[int]], alike_by: str) -> None:
        """Show, before what is drawn, the numbers of support items that are listed for an item, the most alike last."""
        drawn = self._order
        self._order = lambda item: chain(
            nearest[item.id], (number for number in drawn(item) if number not in nearest[item.id])
        )
        self.alike_by, self.num_at_random = alike_by, sum(not own for own in nearest.values())

    def of(self, item: TaskItem) -> list[TaskItem]:
        """Return the shots of an item in reading order, none about its own image."""
        assert self.alike_by != "", "sft.evaluation.alike.find_alike comes first"
        others = (shot for n in self._order(item) if (shot := self.support[n]).cluster != item.cluster)
        return list(islice(others, self.number))[::-1]


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
    """Return the group of an item, the same for all about an image; without groups, its own name."""
    return str(random.Random(f"group {key} {item.cluster}").randrange(num_groups)) if num_groups else str(item.id)
