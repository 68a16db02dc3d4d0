"""Engines: how several processes keep a model that they train together.

An engine is a module of this package that offers what `EngineModule` lists, found by its name. Sharing out is the work
of torch and DeepSpeed; what is here is how each is set up, and how what it keeps apart is written and read.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from sft.core.distributed import Rank
from sft.core.errors import UserError
from sft.recipe import Engine

if TYPE_CHECKING:
    from torch import Tensor, nn


class Writers(NamedTuple):
    """Who has written a state."""

    engine: Engine
    processes: int

    @classmethod
    def of(cls, progress: dict[str, Any]) -> Writers:
        """By what the state says."""
        return cls(progress.get("engine", "ddp"), progress.get("processes", 1))


class EngineModule(Protocol):
    """What the trainer needs to know of an engine. All processes make each of these calls."""

    KEEPS_GRADIENTS: bool
    """Whether gradients stand in `.grad` until the optimizer's step."""
    READS: tuple[Engine, ...]
    """Engines whose states it reads."""

    def check(self, mode: str, optimizer: str) -> None:
        """Raise UserError where it is not installed, or cannot do what is asked of it."""

    def check_precision(self, precision: str) -> None:
        """Raise UserError where it does not train in it here."""

    def arguments(self, *, clip: float, precision: str, convert: bool) -> dict[str, Any]:
        """The engine's part of transformers' TrainingArguments. `convert`: it goes on from a state of another number of
        processes."""

    def share_out(self, model: nn.Module, precision: str) -> None:
        """Leave this process its share of the weights, if that is done before the trainer is made."""

    def check_prepared(self, model: nn.Module) -> None:
        """Raise RunError where libraries have made something else of the model than this engine's."""

    def own_part(self, tensor: Tensor) -> Tensor:
        """What this process has of a parameter or gradient."""

    def gradient_norm(self, trainer: Any, norm: Any) -> Any:
        """The norm of the whole gradient, by what its clipping returned; not finite where the step is left out."""

    def gathered(self, trainer: Any) -> dict[str, Tensor] | None:
        """The whole weights in the main process; None where it has them anyway."""

    def save(self, trainer: Any, folder: Path) -> None:
        """Write what is trained and the optimizer's tensors into a folder, each process its share."""

    def load(self, trainer: Any, folder: Path, written_by: Writers) -> None:
        """Set what is trained and the optimizer to what one of `READS` has saved."""


def get_engine(name: Engine) -> EngineModule:
    """The engine called `name`, which is not `auto`."""
    return import_module(f"{__name__}.{name}")


def choose_engine(asked: Engine, mode: str, rank: Rank, optimizer: str = "adamw") -> Engine:
    """What `auto` means: ZeRO-3 where everything is trained on several processes, as the card; else a copy on each.

    Raises:
        UserError: an engine that is not installed, or cannot do what is asked of it.
    """
    if asked == "auto":
        asked = "zero3" if mode == "full" else "ddp"
    if rank.of == 1:
        return "ddp"  # nothing to share
    get_engine(asked).check(mode, optimizer)
    return asked


def check_readable(checkpoint: Path, progress: dict[str, Any], engine: Engine, rank: Rank) -> None:
    """Whether these processes can go on from a checkpoint that says this of itself.

    Raises:
        UserError: another engine has written it; or it has to be converted, and DeepSpeed is not installed.
    """
    writers = Writers.of(progress)
    if writers.engine not in get_engine(engine).READS:
        raise UserError(
            f"{checkpoint}: was written under {writers.engine}, which {engine} cannot read; set "
            f"distributed.engine={writers.engine}"
        )
    if writers.engine == "zero3" and writers.processes != rank.of and find_spec("deepspeed") is None:
        raise UserError(
            f"{checkpoint}: was written under zero3 by another number of processes; DeepSpeed has to convert it, and "
            "is not installed: `DS_BUILD_OPS=0 pip install --no-build-isolation 'idefics-sft[deepspeed]'`"
        )


def is_shared_out(model: nn.Module) -> bool:
    """Whether this process has but a share of a model's weights, and waits for the others in every layer."""
    return any(hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_tensor") for parameter in model.parameters())


def check_shared_out(engine: Engine, mode: str, optimizer: str) -> None:
    """What no engine that shares weights out can do.

    Raises:
        UserError: weights in 4 bits, or optimizer states in 8.
    """
    if mode == "qlora":
        raise UserError(f"distributed.engine: {engine} cannot share out weights in 4 bits; set ddp, or model.mode lora")
    if optimizer != "adamw":
        raise UserError(
            f"training.optimizer: {engine} shares out the states of adamw, not of {optimizer}; set adamw, or "
            "distributed.engine ddp"
        )
