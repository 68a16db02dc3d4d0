"""Where a task gets its items from, and how it is to be asked: what a recipe or the command line says of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sft.core.errors import UserError
from sft.core.shipped import resolve
from sft.recipe import EvaluationConfig

if TYPE_CHECKING:
    from sft.data.sources import Sources
    from sft.models.chat_template import ChatTemplate

HeldOut = Callable[[], "tuple[Sources | None, ChatTemplate]"]
"""Opens what a run's recipe holds out, with the template that encodes it."""


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    """Where a task gets its items from, and how it is to be asked."""

    data: str | None
    """File or folder of the benchmark, as the user wrote it."""
    settings: EvaluationConfig
    store: Path
    """Folder of prepared datasets; benchmarks that are built here go there."""
    held_out: HeldOut | None = None
    """None for a model that belongs to no run."""
    needs_images: bool = True
    """Whether image files have to be there."""

    def named_data(self, task: str) -> str:
        """Return the file or folder as the user wrote it.

        Raises:
            UserError: none is named.
        """
        if self.data is None:
            raise UserError(f"{task} needs its data: give --benchmark PATH, or evaluation.benchmark in the recipe")
        return self.data

    def path(self, task: str) -> Path:
        """Return where the data are.

        Raises:
            UserError: no place is named, or nothing is there.
        """
        found = resolve(self.named_data(task))
        if not found.exists():
            raise UserError(
                f"{self.data}: not there; give --benchmark PATH of {task} (see idefics-sft tasks show {task})"
            )
        return found

    def split(self, splits: Sequence[str]) -> str:
        """Return the part that is to be asked, the first of a task's if none is named.

        Raises:
            UserError: the task has no such part.
        """
        found = self.settings.split or splits[0]
        if found not in splits:
            raise UserError(f"split {found}: expected {', '.join(splits[:-1])} or {splits[-1]}")
        return found
