"""Engines: how several processes keep a model that they train together.

ddp       each process has the whole model
zero3     DeepSpeed shards it, and converts its states for another number of processes
fsdp2     torch's `fully_shard` shards it; sharded_state: its states
resume_state  the state of a checkpoint: the files of a whole model, and the progress that every engine writes

An engine is a module of this package, under the name that it has in `sft.recipe.ENGINES`, whose ENGINE is an `Engine`.
Sharding is the work of torch and DeepSpeed; here is how each is set up, and how its shards are written and read.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.core.distributed import TIMEOUT, Rank
from sft.core.errors import UserError
from sft.recipe import ENGINES, AskedEngine, EngineName, OptimizerName
from sft.recipe.engines import check_can_shard, resolve_engine

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim.optimizer import Optimizer

    from sft.training.engines.resume_state import Progress
    from sft.training.trainer import Trainer


class Engine:
    """An engine as the trainer uses it. All processes make each of these calls. One that keeps the whole model in every
    process overrides the last three only."""

    KEEPS_GRADIENTS = True
    """Whether gradients stand in `.grad` until the optimizer's step."""

    def check_installed(self) -> None:
        """Raise UserError where a package is missing; torch is there."""

    def check_precision(self, precision: str) -> None:
        """Raise UserError where the engine does not train in this precision here."""

    def check_state(self, checkpoint: Path, *, written_by: int, read_by: int) -> None:
        """Raise UserError where a state of so many processes cannot be read by so many."""

    def arguments(self, *, clip: float, precision: str, convert: bool) -> dict[str, Any]:
        """Return the engine's part of transformers' TrainingArguments. `convert`: training resumes from a state of
        another number of processes."""
        import torch

        return {"ddp_timeout": int(TIMEOUT.total_seconds()), "use_cpu": not torch.cuda.is_available()}

    def shard(self, model: nn.Module, precision: str) -> None:
        """Leave this process its shard of the weights, if that is done before the trainer is made."""

    def check_prepared(self, model: nn.Module) -> None:
        """Raise RunError where libraries have made something else of the model than this engine's."""

    def own_shard(self, tensor: Tensor) -> Tensor:
        """Return the part of a parameter or gradient that this process has."""
        return tensor

    def gradient_norm(self, trainer: Trainer, norm: Any) -> Any:
        """Return the norm of the whole gradient, by what its clipping returned; not finite where the step is left
        out."""
        return norm

    def gather_weights(self, trainer: Trainer) -> dict[str, Tensor] | None:
        """Return the whole weights in the main process; None where it has them anyway."""
        return None

    def save(self, trainer: Trainer, folder: Path) -> None:
        """Write the trained weights and the optimizer's tensors into a folder, each process its shard."""
        raise NotImplementedError

    def load(self, trainer: Trainer, folder: Path, progress: Progress) -> None:
        """Read what `save` of this engine has written, by any number of processes (`progress` says how many). An engine
        that does not shard reads what any engine has written."""
        self.load_whole(folder, trainer.unwrapped, trainer.bare_optimizer, trainer.rank)

    def load_whole(self, folder: Path, model: nn.Module, optimizer: Optimizer, rank: Rank) -> None:
        """Set a whole model and its optimizer to what `save` of this engine has written."""
        raise NotImplementedError


def get_engine(name: EngineName) -> Engine:
    """Return the engine called `name`, which is not `auto`."""
    engine: Engine = import_module(f"{__name__}.{name}").ENGINE
    return engine


def choose_engine(asked: AskedEngine, mode: str, rank: Rank, optimizer: OptimizerName = "adamw") -> EngineName:
    """Return the engine that a recipe means for these processes; raise UserError for one that is not installed, or
    cannot do what is asked of it."""
    engine = resolve_engine(asked, mode, rank.of)
    check_can_shard(engine, mode, optimizer)
    get_engine(engine).check_installed()
    return engine


def check_readable(checkpoint: Path, progress: Progress, engine: EngineName, rank: Rank) -> None:
    """Raise UserError where these processes cannot resume from a checkpoint with this progress: another engine has
    written it, or it has to be converted, and DeepSpeed is not installed."""
    writer = progress["engine"]
    if ENGINES[engine].shards and writer != engine:
        advice = f"set distributed.engine={writer}"
        raise UserError(f"{checkpoint}: was written under {writer}, which {engine} cannot read; {advice}")
    get_engine(writer).check_state(checkpoint, written_by=progress["processes"], read_by=rank.of)


def is_sharded(model: nn.Module) -> bool:
    """Tell whether this process has only a shard of the weights, and waits for the others in every layer."""
    return any(hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_tensor") for parameter in model.parameters())
