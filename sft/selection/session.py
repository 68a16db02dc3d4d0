"""Evaluating the checkpoints of a run that are not evaluated yet, and choosing among them; once, or as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from sft.core.contain import contained
from sft.core.distributed import all_or_none, from_main, is_main_process
from sft.core.errors import RunError, UserError
from sft.core.file_lock import locked
from sft.core.files import discard
from sft.evaluation.run_tasks import score_model
from sft.evaluation.task import Task
from sft.evaluation.task_source import HeldOut
from sft.inference.average import average_weights
from sft.models.base_model import find_prepared_base
from sft.models.loaded_model import Load, loaded_in_turn
from sft.recipe import Recipe
from sft.runs.checkpoint import checkpoints, incomplete_checkpoints, is_complete, problem_of_weights, step_of
from sft.runs.names import run_checkpoints
from sft.runs.status import RunStatus
from sft.selection.benchmarks import Benchmarks, Evaluated
from sft.selection.plot import write_plot
from sft.selection.pruning import prune_weights
from sft.selection.record import Selection, is_current, write_selection
from sft.selection.recorded_loss import choose_by_recorded_loss, enough_losses
from sft.selection.rules import average_name, choose

POLL_SECONDS = 20.0
"""How often `watch` looks for a new checkpoint."""

ENDED = ("finished", "failed")
"""After these no checkpoint is written. A run that is `stopped` can be resumed."""

Progress = Callable[[str], AbstractContextManager[Callable[[int, str], None]]]
"""Opens a bar of some name, which is called with how much is done, and of what."""


class Session:
    """The same tasks for the checkpoints of a run, as often as there are new ones. Holds RUN/evaluations.

    Several processes share in evaluating: each calls the same methods. The first one reads, chooses and writes.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        held_out: HeldOut,
        log: Callable[[str], None],
        progress: Progress,
        use: bool = False,
        average: bool = False,
    ) -> None:
        """`held_out` opens what `data.validation` holds out, and the template that encodes it; it is called only where
        the loss is among the tasks. For `use` see `write_selection`; with `average`, `select` tries the mean of the
        checkpoints that it cannot tell apart."""
        self._use, self._average = use, average
        self.recipe = recipe
        self.run_dir = Path(recipe.output_dir)
        self.failed: dict[str, str] = {}
        """Checkpoints that could not be evaluated, and why."""
        self._first_error: Exception | None = None
        self._held_out = held_out if recipe.data.validation else None
        self._log = log
        self._progress = progress
        self._known_sound: set[str] = set()
        self._evaluated: dict[str, set[str]] = {}
        """The hashes of the protocols under which a checkpoint was evaluated."""
        self._others: dict[str, Evaluated] = {}
        """What was evaluated beside the checkpoints: the base, and their mean."""
        self._benchmarks: Benchmarks | None = None

    def select(self) -> Selection:
        """Evaluate every checkpoint, choose, and write the selection and its plot. A checkpoint that is damaged, or
        whose evaluation fails, is logged, left out and named among the warnings; `check_all_evaluated` raises then.
        Raise UserError where there is nothing to choose from or by; where none could be evaluated, the first error."""
        present = from_main(lambda: run_checkpoints(self.run_dir))
        with self._held():
            if selection := self._selection_of(self._sound(present), every_steps=1):
                return self._with_average(selection) if self._average else selection
            raise self._first_error or UserError(f"{self.run_dir}: the checkpoints were removed meanwhile")

    def prepare(self) -> Benchmarks:
        """Read the benchmarks, so that what is wrong with them is reported before training begins: raise UserError
        where there is nothing to choose by, or it cannot be read."""
        with all_or_none():
            if self._benchmarks is None:
                settings, store = self.recipe.evaluation, Path(self.recipe.data.store)
                self._benchmarks = Benchmarks(settings, store, self._held_out)
                if len(names := self._benchmarks.names) > 1:
                    self._log(f"{', '.join(names)} choose together")
                elif self._benchmarks.choosers[0].name == "loss":
                    self._log("choosing by the loss on what data.validation holds out, computed for every checkpoint")
        return self._benchmarks

    def evaluate_new(self, every_steps: int) -> Selection | None:
        """Evaluate the checkpoints of every so many steps that were not evaluated, while training waits, and choose.

        Called by all its processes; only the first one gets the choice. None where nothing new was evaluated, since
        that failed (`failed`). Raise UserError where another run of the command evaluates this run.
        """
        with self._held():
            present = from_main(lambda: run_checkpoints(self.run_dir))
            paths = self._sound([path for path in present if step_of(path) % every_steps == 0])
            selection = self._selection_of(paths, every_steps)
        return selection if is_main_process() else None

    def _selection_of(self, paths: list[Path], every_steps: int) -> Selection | None:
        """Choose among checkpoints by the losses of every so many steps that training wrote down, else by evaluating
        those that were not evaluated; None where that adds nothing."""
        left_out = {step_of(Path(name)) for name in self.failed}
        if not self._average and (
            losses := from_main(lambda: enough_losses(self.recipe, paths, every_steps, left_out))
        ):
            present = {path.name for path in paths}
            return from_main(lambda: self._write_and_prune(choose_by_recorded_loss(losses, present)))
        return from_main(self._choose) if self._evaluate_these(paths) else None

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Hold RUN/evaluations, by the first process for all."""
        with ExitStack() as held:
            with all_or_none():
                if is_main_process():
                    held.enter_context(locked(self.run_dir / "evaluations"))
            yield

    def watch(self) -> Iterator[Selection]:
        """Choose anew whenever training has written a checkpoint, until it has ended and all are evaluated.

        An evaluation that fails is logged, and its checkpoint left out; RunError is raised for it at the end. Raise
        UserError where there is nothing to choose by.
        """
        logged = ""
        with self._held():
            while True:
                # Read in this order: the last checkpoint is written before the run is said to have ended.
                status = from_main(lambda: RunStatus.read(self.run_dir))
                present = from_main(lambda: checkpoints(self.run_dir / "checkpoints"))
                num_failed = len(self.failed)
                is_new = self._evaluate_these(self._sound(present))
                can_choose = any(path.name in self._evaluated for path in present)
                if is_new or (can_choose and len(self.failed) > num_failed):
                    yield from_main(self._choose)
                if status and status.status in ENDED:
                    why = f": {status.why}" if status.why else ""
                    self._log(f"{self.run_dir}: {status.status} at step {status.step}{why}")
                    break
                state = status.status if status else "not begun"
                if state != logged:
                    self._log(f"{self.run_dir}: {state}; waiting for checkpoints (Ctrl-C ends)")
                    logged = state
                time.sleep(POLL_SECONDS)
        self.check_all_evaluated()

    def check_all_evaluated(self) -> None:
        """Raise RunError where a checkpoint could not be evaluated."""
        if self.failed:
            named = "; ".join(f"{name} ({reason})" for name, reason in self.failed.items())
            raise RunError(f"{self.run_dir}: could not be evaluated: {named}")

    def _sound(self, present: list[Path]) -> list[Path]:
        """Return those whose weights are as they were written. Others, and incomplete ones, are logged once and left
        out."""

        def problems() -> dict[Path, str]:
            paths = [*incomplete_checkpoints(self.run_dir / "checkpoints"), *present]
            new = [path for path in paths if path.name not in self._known_sound | self.failed.keys()]
            return {path: problem for path in new if (problem := problem_of_weights(path))}

        for path, problem in from_main(problems).items():
            self._first_error = self._first_error or RunError(f"{path}: {problem}")
            self.failed[path.name] = problem
            self._log(f"{path.name}: it is left out: {problem}")
        sound = [path for path in present if path.name not in self.failed]
        self._known_sound |= {path.name for path in sound}
        return sound

    def _evaluate_these(self, present: list[Path]) -> bool:
        """Evaluate those that were not evaluated; return whether there is something new to choose from.

        An evaluation that fails is logged, and its checkpoint left out: the next one may do better. Raise UserError
        where there is nothing to choose by, or it cannot be read.
        """
        new = [path for path in present if path.name not in self._evaluated and path.name not in self.failed]
        if not new:
            return False
        benchmarks = self.prepare()
        with loaded_in_turn() as load:
            if benchmarks.gates and "base" not in self._others:
                base = from_main(lambda: find_prepared_base(self.recipe))
                self._others["base"] = self._evaluate(base, load, benchmarks.gates, "base")
            for path in new:
                with contained() as outcome:
                    evaluated = self._evaluate(path, load, benchmarks.tasks, path.name)
                    self._evaluated[path.name] = {result.protocol_hash for _, result in evaluated}
                if outcome and not from_main(partial(is_complete, path)):
                    self._log(f"{path.name}: was removed before it was evaluated; it is left out")
                elif outcome:
                    self._first_error = self._first_error or outcome.error
                    self.failed[path.name] = outcome.reason
                    self._log(f"{path.name}: the evaluation failed, it is left out: {outcome.reason}")
        return any(path.name in self._evaluated for path in new)

    def _evaluate(self, path: Path, load: Load, tasks: Sequence[Task], name: str) -> Evaluated:
        with self._progress(f"evaluating {name}") as update:
            results = score_model(
                path,
                tasks,
                run_dir=self.run_dir,
                name=name,
                load=load,
                on_progress=lambda done, total: update(done, f"of {total} {tasks[0].unit}"),
            )
        return list(zip(tasks, results, strict=True))

    def _with_average(self, selection: Selection) -> Selection:
        """Return the selection after the mean of the checkpoints that it cannot tell apart was evaluated as well. Its
        weights are kept if it is selected."""
        folder = self.run_dir / "checkpoints"
        free = {score.checkpoint for score in selection.scores if score.has_weights and not score.worse_than_base}
        of, self._average = [name for name in selection.tied if name in free], False
        if len(of) < 2:
            self._log("--average: fewer than two checkpoints cannot be told apart; there is nothing to average")
            return from_main(lambda: self._write_and_prune(selection))
        mean = folder / average_name(of)
        with all_or_none():
            if is_main_process():
                average_weights([folder / name for name in of], mean)
        with loaded_in_turn() as load:
            self._others[mean.name] = self._evaluate(mean, load, self.prepare().choosers, mean.name)
        selection = from_main(lambda: self._choose(of))
        if is_main_process() and selection.selected != mean.name:
            discard(mean)
        return selection

    def _choose(self, average_of: Sequence[str] = ()) -> Selection:
        assert self._benchmarks
        settings = self.recipe.evaluation
        present = {path.name: step_of(path) for path in run_checkpoints(self.run_dir)}

        def counts(checkpoint: str) -> bool:
            """Return whether it was evaluated now, or its weights were pruned after it was: then it is older than the
            newest. What an interrupted run has left beyond that is of weights that are no more."""
            if checkpoint in present:
                return checkpoint in self._evaluated
            return checkpoint not in self.failed and step_of(Path(checkpoint)) < max(present.values())

        selection = choose(
            *self._benchmarks.outcomes(self.run_dir, set().union(*self._evaluated.values()), counts, self._others),
            rule=settings.rule,
            seed=settings.seed,
            with_weights=present,
            average_of=average_of,
        )
        return self._write_and_prune(selection)

    def _write_and_prune(self, selection: Selection) -> Selection:
        left_out = (f"left out: {name}: {why}" for name, why in self.failed.items())
        selection = replace(selection, warnings=(*selection.warnings, *left_out))
        self._write(selection)
        is_wanted = self.recipe.checkpoints.keep_weights == "best+last" and is_current(selection, self.run_dir)
        if is_wanted and not self._average and (gone := prune_weights(self.run_dir, selection)):
            self._log(f"checkpoints.keep_weights: removed the weights of {', '.join(gone)}")
            scores = (replace(s, has_weights=False) if s.checkpoint in gone else s for s in selection.scores)
            return self._write(replace(selection, scores=tuple(scores)))
        return selection

    def _write(self, selection: Selection) -> Selection:
        write_plot(selection, self.run_dir / write_selection(selection, self.run_dir, use=self._use))
        return selection
