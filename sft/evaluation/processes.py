"""Work shared out to the processes of accelerate; alone, a process does it all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

Item = TypeVar("Item")
Found = TypeVar("Found")


def deal(items: Sequence[Item]) -> list[tuple[Item, Sequence[Item]]]:
    """The items of this process, each with all that the processes do in that round.

    Every process has equally many: one that the last round leaves short repeats another's. Engines that shard a model
    wait for every process in every layer.
    """
    state = _state()
    rounds = [items[first : first + state.num_processes] for first in range(0, len(items), state.num_processes)]
    return [(one[min(state.process_index, len(one) - 1)], one) for one in rounds]


def gathered(found: dict[Item, Found]) -> dict[Item, Found]:
    """What all processes found."""
    _state()
    return dict(gather_object(list(found.items())))


def first_message(own: str) -> str:
    """What the first process has to say that has something to say, an error for instance; every process gets it."""
    found = gathered({_state().process_index: own})
    return next((found[process] for process in sorted(found) if found[process]), "")


def is_main_process() -> bool:
    """Whether this one prints and writes."""
    return bool(_state().is_main_process)


def wait_for_everyone() -> None:
    """Until every process is here."""
    _state().wait_for_everyone()


def is_alone() -> bool:
    """Whether there is no other process."""
    return bool(_state().num_processes == 1)


def leave() -> None:
    """End what connects the processes; alone, nothing."""
    _state().destroy_process_group()


def _state() -> PartialState:
    """Without `cpu`, processes on machines without a GPU are not told of each other."""
    return PartialState(cpu=not torch.cuda.is_available())
