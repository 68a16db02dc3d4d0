"""A task of lmms-eval, asked of a model of this toolkit: `evaluate MODEL --with lmms-eval --tasks a,b`.

Needs the package, `pip install lmms-eval`, and the data of its tasks, which it takes from the hub and which have
licences of their own. `--data FOLDER` names a folder of YAML with tasks of your own, in place of those of the package.

The task is named in place of a path: lmms_eval=mme. Its first metric is the score. Question, metric and split are
lmms-eval's; `--max-questions` takes the first ones. In `compare` and `select` it is a task like others.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.core.distributed import current_rank
from sft.core.errors import UserError
from sft.core.metric import Metric
from sft.evaluation.results import Outcome
from sft.evaluation.task import MeasuredTask, OnProgress
from sft.evaluation.task_source import TaskSource

if TYPE_CHECKING:
    from sft.models.chat_template import ChatTemplate
    from sft.models.loaded_model import Loaded


@cache
def _manager(folder: str | None) -> Any:
    """Return the index of the tasks of a folder, or of those of the package, which takes 20 s."""
    from lmms_eval.tasks import TaskManager

    return TaskManager("ERROR", include_path=folder, include_defaults=folder is None)


class LmmsTask(MeasuredTask):
    """The score of a task of lmms-eval, by item."""

    name = "lmms_eval"
    metric = Metric(name="the task's own", is_share=False)
    how = "generate"
    unit = "requests"

    def __init__(self, source: TaskSource) -> None:
        """Load the task. Raise UserError where lmms-eval is not installed, has no such task, or no data of it."""
        if find_spec("lmms_eval") is None or current_rank().of > 1:
            raise UserError("lmms-eval: expected the package (pip install lmms-eval), and one process")
        self._task, self._limit = str(source.data), source.settings.max_questions
        with redirect_stdout(sys.stderr):  # it logs there
            from lmms_eval.tasks import get_task_dict

            self._manager = _manager(source.settings.benchmark)
            if self._task not in self._manager.all_subtasks:
                raise UserError(f"{self._task}: no task of lmms-eval; name one as lmms_eval=mme")
            try:
                found = get_task_dict([self._task], self._manager)[self._task]
            except Exception as error:  # of the hub, of files
                raise UserError(f"lmms-eval's {self._task}: its data cannot be loaded: {error}") from error
        self._config = found.dump_config()
        first = self._config["metric_list"][0]
        is_share = any(word in first["metric"] for word in ("acc", "match", "anls"))
        lower = not first.get("higher_is_better", True)
        self.metric = Metric(name=first["metric"], is_share=is_share, lower_is_better=lower)  # type: ignore[misc]
        self.benchmark = f"lmms_{self._task}"

    def protocol(self, template: ChatTemplate) -> dict[str, Any]:
        """Return the task with its version, prompt and settings as lmms-eval has them, functions by their names."""
        own = {"lmms-eval": version("lmms-eval"), "first": self._limit, "template": template.fingerprint}
        return own | {key: getattr(value, "__qualname__", str(value)) for key, value in self._config.items()}

    def measure(self, path: Path, loaded: Loaded, on_progress: OnProgress) -> Sequence[Outcome]:
        """Return the score of each item. Raise UserError where the task has none of single items, or shows videos."""
        with redirect_stdout(sys.stderr):
            from lmms_eval.evaluator import simple_evaluate

            from sft.evaluation.bridges.lmms_eval import IdeficsSFT

            model, tasks = IdeficsSFT(loaded=loaded), [self._task]
            found = simple_evaluate(
                model, tasks=tasks, task_manager=self._manager, limit=self._limit, bootstrap_iters=0
            )
        return [self._outcome(line, model.images.get(line["doc_id"], "")) for line in found["samples"][self._task]]

    def _outcome(self, line: dict[str, Any], image: str) -> Outcome:
        score = line.get(self.metric.name)
        score = score.get("score") if isinstance(score, dict) else score
        if not isinstance(score, int | float):
            raise UserError(f"lmms-eval's {self._task}: {self.metric.name} is no score of single items; not read here")
        return Outcome(
            item=line["doc_id"],
            cluster=f"image {image}" if image else f"item {line['doc_id']}",
            image_sha256=image,
            category="",
            score=float(score),
            details={"answers": [str(line["target"])], "prediction": str(line["filtered_resps"][0])},
        )


TASK = LmmsTask
