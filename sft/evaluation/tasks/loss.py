"""The loss on what a run's recipe holds out, sample by sample: what chooses where there is no benchmark.

Nothing is downloaded: `data.validation` in the recipe says what is held out of the data that the run is trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.core.errors import RunError, UserError
from sft.core.files import hash_file
from sft.core.metric import LOSS
from sft.evaluation.results import Outcome, Result
from sft.evaluation.task import MeasuredTask, OnProgress
from sft.evaluation.task_source import TaskSource

if TYPE_CHECKING:
    from sft.evaluation.held_out_loss import HeldOutPacks
    from sft.models.chat_template import ChatTemplate
    from sft.models.loaded_model import Loaded


class HeldOutLoss(MeasuredTask):
    """The mean loss over the trained tokens of the same packs of held-out samples."""

    name = "loss"
    metric = LOSS
    how = "loss"
    benchmark = "held_out_loss"
    unit = "samples"

    def __init__(self, packs: HeldOutPacks, template: ChatTemplate) -> None:
        self.packs = packs
        self._template = template

    @classmethod
    def open(cls, source: TaskSource) -> Sequence[HeldOutLoss]:
        """Pack what the recipe holds out.

        Raises:
            UserError: nothing is held out, or no held-out sample of a source fits a pack.
        """
        from sft.evaluation.held_out_loss import held_out_packs

        held_out, template = source.held_out() if source.held_out else (None, None)
        if held_out is None or template is None:
            raise UserError(
                "loss: nothing to choose by: data.validation in the recipe of a run holds nothing out; give it, or a "
                "benchmark (--benchmark FILE, evaluation.benchmark)"
            )
        return [cls(held_out_packs(held_out, seed=source.settings.seed), template)]

    def protocol(self, template: ChatTemplate) -> dict[str, Any]:
        """Return the packs, the prepared data they are of, and what is trained in them; encoded by the base's template,
        whichever model is measured."""
        sources = self.packs.sources
        return {
            "by": "loss",
            "template": self._template.fingerprint,
            "packs": self.packs.packs,
            "stores": [hash_file(part.store.path / "manifest.json") for own in sources.parts for part in own],
            "train_on": sources.data.train_on,
            "pack_isolation": sources.data.pack_isolation,
        }

    def measure(self, path: Path, loaded: Loaded, on_progress: OnProgress) -> Sequence[Outcome]:
        """Return the loss of every held-out sample.

        Raises:
            SkipSample: an image was changed since it was prepared.
            RunError: a loss is not finite.
        """
        from sft.evaluation.held_out_loss import shared_losses

        samples = shared_losses(
            loaded.model, self.packs, images=loaded.images, autocast=loaded.autocast, on_progress=on_progress
        )
        if broken := sum(not math.isfinite(sample.loss) for sample in samples):
            raise RunError(
                f"{path}: the loss of {broken} of {len(samples)} held-out samples is not finite: training diverged"
            )
        return [
            Outcome(
                item=sample.key,
                cluster=sample.cluster,
                image_sha256="",
                category=sample.source,
                score=sample.loss,
                weight=sample.trained_tokens,
                details={"loss": sample.loss, "trained_tokens": sample.trained_tokens},
            )
            for sample in samples
        ]

    def summary(self, result: Result, *, blind_score: float | None = None) -> dict[str, Any]:
        """Return the score as `loss` too."""
        return super().summary(result, blind_score=blind_score) | {"by": "loss", "loss": result.score}


TASK = HeldOutLoss
