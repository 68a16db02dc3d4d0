"""The engines that `distributed.engine` can name: what each keeps of a model, and what it refuses.

How an engine trains is a module of `sft.training.engines` with the same name. `plan` reads the facts below, without
torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sft.core.errors import UserError
from sft.recipe.optimizers import OPTIMIZERS, OptimizerName


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What processes do with a model that they train."""

    meaning: str  # what it is, for the reference of recipe keys
    shards: bool = True  # whether each process keeps only a share of the weights, gradients and optimizer states
    is_half: bool = False  # whether weights and gradients are half precision beside float32 masters, if computing so
    live_parameters: int | None = None  # so many are gathered, and updated, at a time; None: a layer and the next one


ENGINES = {
    "ddp": Engine(meaning="each process has the whole model", shards=False),
    "zero3": Engine(
        meaning="each keeps a share of the weights, gradients and optimizer states, by DeepSpeed, as the "
        "idefics-9b-instruct card says",
        is_half=True,
        live_parameters=1_000_000_000,  # DeepSpeed's `stage3_max_live_parameters` and `sub_group_size`
    ),
    "fsdp2": Engine(meaning="the same by torch's `fully_shard`"),
}

if TYPE_CHECKING:
    EngineName = str
    AskedEngine = str
else:
    EngineName = Literal[tuple(ENGINES)]
    AskedEngine = Literal[("auto", *ENGINES)]

AUTO = "zero3 where `model.mode` is full and there are several processes, else ddp"


def resolve_engine(asked: AskedEngine, mode: str, processes: int) -> EngineName:
    """Return the engine that a recipe means: ddp for one process, which has nothing to shard, and AUTO for `auto`."""
    if processes == 1:
        return "ddp"
    if asked == "auto":
        return "zero3" if mode == "full" else "ddp"
    return asked


def check_can_shard(engine: EngineName, mode: str, optimizer: OptimizerName) -> None:
    """Raise UserError for what an engine that shards the model cannot: weights in 4 bits, states of an optimizer."""
    if not ENGINES[engine].shards:
        return
    if mode == "qlora":
        raise UserError(f"distributed.engine: {engine} cannot shard weights in 4 bits; set ddp, or model.mode lora")
    if not OPTIMIZERS[optimizer].is_shardable:
        able = " or ".join(name for name, other in OPTIMIZERS.items() if other.is_shardable)
        found = f"{engine} shards the states of {able}, not of {optimizer}"
        raise UserError(f"training.optimizer: {found}; set {able}, or distributed.engine ddp")


def check_engine_precision(engine: EngineName, precision: str) -> None:
    """Raise UserError for float16 under an engine that shards the model, which had to scale sharded gradients."""
    if ENGINES[engine].shards and precision == "float16":
        cure = "set float32, or distributed.engine ddp"
        raise UserError(f"training.precision: {engine} does not train in float16; {cure}")
