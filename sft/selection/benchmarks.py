"""The benchmarks that choose, and those on which a checkpoint may not be worse than the base."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from pathlib import Path

from sft.core.errors import UserError
from sft.evaluation.results import Result
from sft.evaluation.task import Task
from sft.evaluation.task_source import HeldOut
from sft.evaluation.tasks import named_tasks, open_tasks
from sft.recipe import EvaluationConfig
from sft.selection.outcomes import Outcomes, read_outcomes

Evaluated = Sequence[tuple[Task, Result]]


class Benchmarks:
    """The tasks of a recipe, opened."""

    def __init__(self, settings: EvaluationConfig, store: Path, held_out: HeldOut | None) -> None:
        """Raise UserError where one cannot be read or has no answers, or the weights are not those of the tasks."""
        self._settings, choosers, gated = settings, named_tasks(settings), settings.not_worse_than_base
        gates = named_tasks(settings.model_copy(update={"by": gated})) if gated else []
        names, weights = sorted({task.name for task in choosers}), settings.weights
        if weights is not None and (sorted(weights) != names or not any(weights.values())):
            expected = f"a weight for each of {', '.join(names)}, one of them over 0"
            raise UserError(f"evaluation.weights: found {', '.join(weights) or 'none'}; expected {expected}")
        self.choosers = open_tasks(choosers, settings, store, held_out=held_out)
        others = [gate for gate in gates if gate not in choosers]
        self.tasks = [*self.choosers, *open_tasks(others, settings, store, held_out=held_out)]
        self.gates = [task for task in self.tasks if task.name in {gate.name for gate in gates}]
        """What the base is asked too."""
        for task in self.tasks:
            if not task.has_answers:
                where = settings.benchmark or task.name
                raise UserError(f"{where}: has no answers, so it cannot choose; give a split that has them")

    @property
    def names(self) -> list[str]:
        """The benchmarks that choose."""
        return list(dict.fromkeys(task.benchmark for task in self.choosers))

    def outcomes(
        self,
        run_dir: Path,
        protocol_hashes: Collection[str],
        counts: Callable[[str], bool],
        others: dict[str, Evaluated],
    ) -> list[Outcomes]:
        """Return what all models scored on each benchmark, `others` with the checkpoints; see `read_outcomes`."""
        found = []
        for benchmark, tasks in groupby(self.tasks, key=lambda task: task.benchmark):
            own = list(tasks)
            weight = (self._settings.weights or {}).get(own[0].name) if benchmark in self.names else 0.0
            outcomes = read_outcomes(run_dir, own[0], protocol_hashes=protocol_hashes, counts=counts, weight=weight)
            for name, evaluated in others.items():
                if answers := [one for one in evaluated if one[0] in own]:
                    outcomes = outcomes.with_model(name, answers)
            found.append(outcomes)
        return found
