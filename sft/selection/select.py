"""Asking the checkpoints of a run what they were not asked yet, and choosing among them; once, or as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from sft.core.distributed import all_or_none, from_main, is_main_process
from sft.core.errors import RunError, UserError, reason_of
from sft.core.file_lock import locked
from sft.data.sources import Sources
from sft.evaluation import task
from sft.evaluation.held_out_loss import recorded_losses
from sft.evaluation.task import Questionnaire, scored_by
from sft.models.chat_template import ChatTemplate
from sft.models.open_model import Load, loaded_in_turn
from sft.recipe import Recipe
from sft.runs.checkpoint import checkpoints, incomplete_checkpoints, is_complete, problem_of_weights, step_of
from sft.runs.names import run_checkpoints
from sft.runs.status import RunStatus
from sft.selection import plot
from sft.selection.outcomes import read_outcomes
from sft.selection.pruning import prune_weights
from sft.selection.rules import ChosenOn, Selection, choose, choose_by_recorded_loss, without_weights, write_selection

POLL_SECONDS = 20.0
"""How often `watch` looks for a new checkpoint."""

ENDED = ("finished", "failed")
"""After these no checkpoint is written. A run that is `stopped` can be resumed."""

Progress = Callable[[str], AbstractContextManager[Callable[[int, str], None]]]
"""Opens a bar of some name; it is told how much is done, and of what."""


class Session:
    """One questionnaire, asked of the checkpoints of a run as often as there are new ones. Holds RUN/evaluations.

    Several processes share in asking: each calls the same methods. The first one reads, chooses and writes.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        held_out: Callable[[], tuple[Sources | None, ChatTemplate]],
        say: Callable[[str], None],
        progress: Progress,
        chosen_on: ChosenOn = "all",
    ) -> None:
        """`held_out` opens what `data.validation` holds out, and the template it is encoded by; asked only where the
        loss chooses."""
        self.recipe = recipe
        self.run_dir = Path(recipe.output_dir)
        self.failed: dict[str, str] = {}
        """Checkpoints that could not be evaluated, and why."""
        self._first_error: Exception | None = None
        self._held_out = held_out
        self._say = say
        self._progress = progress
        self._chosen_on: ChosenOn = chosen_on
        self._known_sound: set[str] = set()
        self._asked: dict[str, set[str]] = {}
        self._questionnaire: Questionnaire | None = None

    def select(self) -> Selection:
        """Ask every checkpoint, choose, and write selection.json and the plot.

        A checkpoint that is damaged or whose evaluation fails is told of, left out and named among the warnings of the
        selection; `check_all_asked` tells afterwards.

        Raises:
            UserError: there is nothing to choose from or by.
            Exception: none could be evaluated; this is why the first could not.
        """
        present = from_main(lambda: run_checkpoints(self.run_dir))
        with self._held():
            paths = self._sound(present)
            if losses := from_main(lambda: self._recorded_losses(paths)):
                return from_main(lambda: self._choose_by_recorded(losses, paths))
            if not self._ask_these(paths):
                raise self._first_error or UserError(f"{self.run_dir}: the checkpoints were removed meanwhile")
            return from_main(self._choose)

    def prepare(self) -> None:
        """Read what is to be asked, so that what is wrong with it is told before training begins.

        Raises:
            UserError: there is nothing to choose by, or it cannot be read.
        """
        with all_or_none():
            self._questionnaire = self._questionnaire or self._make_questionnaire()

    def ask_new(self, every_steps: int) -> Selection | None:
        """While training waits: ask the checkpoints of every so many steps that were not asked, and choose.

        Called by all its processes; only the first one gets the choice. None where nothing new was asked, since an
        evaluation failed (`failed`).

        Raises:
            UserError: another run of the command evaluates this run.
        """
        with self._held():
            present = from_main(lambda: run_checkpoints(self.run_dir))
            paths = self._sound([path for path in present if step_of(path) % every_steps == 0])
            if losses := from_main(lambda: self._recorded_losses(paths)):
                every = {step: loss for step, loss in losses.items() if step % every_steps == 0}
                selection = from_main(lambda: self._choose_by_recorded(every, paths))
            elif self._ask_these(paths):
                selection = from_main(self._choose)
            else:
                return None
        return selection if is_main_process() else None

    @contextmanager
    def _held(self) -> Iterator[None]:
        """RUN/evaluations, by the first process for all."""
        with ExitStack() as held:
            with all_or_none():
                if is_main_process():
                    held.enter_context(locked(self.run_dir / "evaluations"))
            yield

    def watch(self) -> Iterator[Selection]:
        """Choose anew whenever training has written a checkpoint, until it has ended and all are evaluated.

        An evaluation that fails is told of, and its checkpoint left out.

        Raises:
            UserError: there is nothing to choose by.
            RunError: at the end, when an evaluation failed.
        """
        said = ""
        with self._held():
            while True:
                status, present = from_main(self._status_and_checkpoints)
                num_failed = len(self.failed)
                is_new = self._ask_these(self._sound(present))
                can_choose = any(path.name in self._asked for path in present)
                if is_new or (can_choose and len(self.failed) > num_failed):
                    yield from_main(self._choose)
                if status and status.status in ENDED:
                    why = f": {status.why}" if status.why else ""
                    self._say(f"{self.run_dir}: {status.status} at step {status.step}{why}")
                    break
                state = status.status if status else "not begun"
                if state != said:
                    self._say(f"{self.run_dir}: {state}; waiting for checkpoints (Ctrl-C ends)")
                    said = state
                time.sleep(POLL_SECONDS)
        self.check_all_asked()

    def check_all_asked(self) -> None:
        """
        Raises:
            RunError: a checkpoint could not be evaluated.
        """
        if self.failed:
            named = "; ".join(f"{name} ({reason})" for name, reason in self.failed.items())
            raise RunError(f"{self.run_dir}: could not be evaluated: {named}")

    def _status_and_checkpoints(self) -> tuple[RunStatus | None, list[Path]]:
        """In this order: the last checkpoint is written before the run is said to have ended."""
        return RunStatus.read(self.run_dir), checkpoints(self.run_dir / "checkpoints")

    def _sound(self, present: list[Path]) -> list[Path]:
        """Those whose weights are as they were written. Of others, and of incomplete ones, it is told once; they are
        left out."""

        def problems() -> dict[Path, str]:
            paths = [*incomplete_checkpoints(self.run_dir / "checkpoints"), *present]
            new = [path for path in paths if path.name not in self._known_sound | self.failed.keys()]
            return {path: problem for path in new if (problem := problem_of_weights(path))}

        for path, problem in from_main(problems).items():
            self._first_error = self._first_error or RunError(f"{path}: {problem}")
            self.failed[path.name] = problem
            self._say(f"{path.name}: it is left out: {problem}")
        sound = [path for path in present if path.name not in self.failed]
        self._known_sound |= {path.name for path in sound}
        return sound

    def _ask_these(self, present: list[Path]) -> bool:
        """Ask those that were not asked; whether there is something new to choose from.

        An evaluation that fails is told of, and its checkpoint left out: the next one may do better.

        Raises:
            UserError: there is nothing to choose by, or it cannot be read.
        """
        new = [path for path in present if path.name not in self._asked and path.name not in self.failed]
        if new:
            self.prepare()
        with loaded_in_turn() as load:
            for path in new:
                try:
                    self._ask(path, load)
                except Exception as error:  # whatever it is
                    if not from_main(partial(is_complete, path)):
                        self._say(f"{path.name}: was removed before it was evaluated; it is left out")
                        continue
                    self._first_error = self._first_error or error
                    self.failed[path.name] = reason_of(error)
                    self._say(f"{path.name}: the evaluation failed, it is left out: {self.failed[path.name]}")
        return any(path.name in self._asked for path in new)

    def _ask(self, path: Path, load: Load) -> None:
        assert self._questionnaire is not None
        with self._progress(f"asking {path.name}") as update:
            unit = self._questionnaire.unit
            self._asked[path.name] = self._questionnaire.ask(
                path, load, lambda done, total: update(done, f"of {total} {unit}")
            )

    def _make_questionnaire(self) -> Questionnaire:
        by = scored_by(self.recipe.evaluation)
        if by == "mmbench":
            return task.multiple_choice(self.recipe)
        if by == "exact_match":
            return task.short_answers(self.recipe)
        if self.recipe.data.validation is None:
            raise UserError(
                f"{self.run_dir}: nothing to choose by: the recipe has no evaluation.benchmark and no data.validation; "
                "give --benchmark FILE"
            )
        self._say("choosing by the loss on what data.validation holds out, computed for every checkpoint")
        held_out, template = self._held_out()
        assert held_out is not None
        return task.held_out_loss(self.recipe, held_out, template)

    def _recorded_losses(self, paths: list[Path]) -> dict[int, float]:
        """What training wrote down, where that is enough: for the rule `best`, and every checkpoint has it."""
        settings = self.recipe.evaluation
        if not paths or scored_by(settings) != "loss" or settings.rule != "best":
            return {}
        losses, steps = recorded_losses(self.run_dir), [step_of(path) for path in paths]
        if not all(step in losses for step in steps):
            return {}
        left_out = {step_of(Path(name)) for name in self.failed}
        return {step: loss for step, loss in losses.items() if step <= max(steps) and step not in left_out}

    def _choose_by_recorded(self, losses: dict[int, float], paths: list[Path]) -> Selection:
        return self._write_and_prune(choose_by_recorded_loss(losses, {path.name for path in paths}))

    def _choose(self) -> Selection:
        assert self._questionnaire is not None
        settings = self.recipe.evaluation
        present = {path.name: step_of(path) for path in run_checkpoints(self.run_dir)}

        def counts(checkpoint: str) -> bool:
            """Whether it was asked now, or its weights were pruned after it was: then it is older than the newest.
            What an interrupted run has left beyond that is of weights that are no more."""
            if checkpoint in present:
                return checkpoint in self._asked
            return checkpoint not in self.failed and step_of(Path(checkpoint)) < max(present.values())

        outcomes = read_outcomes(
            self.run_dir,
            self._questionnaire.benchmark,
            seed=settings.seed,
            protocol_hashes=set().union(*self._asked.values()),
            counts=counts,
        )
        return self._write_and_prune(
            choose(
                outcomes,
                by=self._questionnaire.by,
                rule=settings.rule,
                seed=settings.seed,
                chosen_on=self._chosen_on,
                with_weights=present,
            )
        )

    def _write_and_prune(self, selection: Selection) -> Selection:
        left_out = (f"left out: {name}: {why}" for name, why in self.failed.items())
        selection = replace(selection, warnings=(*selection.warnings, *left_out))
        self._write(selection)
        if self.recipe.checkpoints.keep_weights == "best+last" and (gone := prune_weights(self.run_dir, selection)):
            self._say(f"checkpoints.keep_weights: removed the weights of {', '.join(gone)}")
            return self._write(without_weights(selection, gone))
        return selection

    def _write(self, selection: Selection) -> Selection:
        write_selection(selection, self.run_dir)
        plot.plot(selection, self.run_dir / plot.FILE)
        return selection
