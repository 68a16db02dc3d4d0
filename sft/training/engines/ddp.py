"""DDP: every process has the whole model, its gradients and the optimizer's states; gradients are averaged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim.optimizer import Optimizer

from sft.core.distributed import Rank
from sft.training.engines import Engine, get_engine
from sft.training.engines.resume_state import Progress, load_state, save_state

if TYPE_CHECKING:
    from sft.training.trainer import Trainer


class Ddp(Engine):
    """Trains in every precision; any number of processes reads a state."""

    def arguments(self, *, clip: float, precision: str, convert: bool) -> dict[str, Any]:
        """Return DDP's settings. Every parameter gets a gradient on every rank, by the dummies of
        sft.batches.collate."""
        own = super().arguments(clip=clip, precision=precision, convert=convert)
        return own | {"ddp_find_unused_parameters": False}

    def save(self, trainer: Trainer, folder: Path) -> None:
        """Write everything in the main process."""
        if trainer.rank.is_main:
            save_state(folder, trainer.unwrapped, trainer.bare_optimizer)

    def load(self, trainer: Trainer, folder: Path, progress: Progress) -> None:
        """Read everything in each process, whichever engine has written it."""
        writer = get_engine(progress["engine"])
        writer.load_whole(folder, trainer.unwrapped, trainer.bare_optimizer, trainer.rank)

    def load_whole(self, folder: Path, model: nn.Module, optimizer: Optimizer, rank: Rank) -> None:
        """Set a whole model to what the main process has written."""
        load_state(folder, model, optimizer)


ENGINE = Ddp()
