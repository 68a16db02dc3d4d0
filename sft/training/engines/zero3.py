"""ZeRO stage 3, by DeepSpeed: every process has a share of the weights, gradients and optimizer states, and gathers a
layer's weights when it comes to the layer. What the idefics-9b-instruct card trained with."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sft.core.distributed import TIMEOUT
from sft.core.errors import UserError
from sft.training.engines import Writers, check_shared_out
from sft.training.engines.universal import ADAM_STEPS, TAG, converted

KEEPS_GRADIENTS = False
READS = ("zero3",)


def check(mode: str, optimizer: str) -> None:
    """
    Raises:
        UserError: weights or optimizer states that it cannot share out, or DeepSpeed is not installed.
    """
    check_shared_out("zero3", mode, optimizer)
    if find_spec("deepspeed") is None:
        raise UserError(
            "distributed.engine: zero3 needs DeepSpeed, which is not installed: `DS_BUILD_OPS=0 pip install "
            "--no-build-isolation 'idefics-sft[deepspeed]'`; or set distributed.engine=fsdp2, or ddp, where memory "
            "allows"
        )


def check_precision(precision: str) -> None:
    """
    Raises:
        UserError: it does not train in it here.
    """
    if precision == "float16":
        raise UserError("training.precision: zero3 trains in bfloat16 or float32, not in float16; set float32, or ddp")
    if precision == "bfloat16" and not torch.cuda.is_available():  # transformers refuses it
        raise UserError("training.precision: zero3 without a GPU trains in float32; set float32")


def arguments(*, clip: float, precision: str, convert: bool) -> dict[str, Any]:
    """Settings of DeepSpeed. Its own optimizers, which would have to be compiled, are not used."""
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": clip,
        "bf16": {"enabled": precision == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "checkpoint": {"load_universal": convert},
    }
    return {"ddp_timeout": int(TIMEOUT.total_seconds()), "deepspeed": settings}


def share_out(model: nn.Module, precision: str) -> None:
    """DeepSpeed does it when training begins."""


def check_prepared(model: nn.Module) -> None:
    """DeepSpeed's engine stands beside the model."""


def own_part(tensor: Tensor) -> Tensor:
    """This process's slice of the flattened parameter."""
    return getattr(tensor, "ds_tensor", tensor)


def gradient_norm(trainer: Any, norm: Any) -> Any:
    """DeepSpeed has made the step by now. It leaves one out whose norm is not finite, and goes on to tell the last norm
    that was."""
    return math.nan if trainer.model_wrapped.optimizer.overflow else norm


def gathered(trainer: Any) -> dict[str, Tensor] | None:
    """As DeepSpeed keeps them for computing: bfloat16, or float32."""
    weights: dict[str, Tensor] | None = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return weights


def save(trainer: Any, folder: Path) -> None:
    """DeepSpeed's own files, two of each process; frozen weights are the base's."""
    trainer.model_wrapped.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True, save_latest=False)
    if trainer.rank.is_main:
        states = _adamw(trainer).state.values()
        (folder / ADAM_STEPS).write_text(json.dumps(int(next(iter(states))["step"])))


def load(trainer: Any, folder: Path, written_by: Writers) -> None:
    """Each process reads its share; of another number of processes through DeepSpeed's universal conversion."""
    if written_by.processes == trainer.rank.of:
        _load(trainer, folder, TAG)
        return
    groups = [{**group} for group in _adamw(trainer).param_groups]
    with converted(folder / TAG, trainer.rank) as output:
        _load(trainer, output.parent, output.name)
    # DeepSpeed 0.19.8 gives all groups the settings of the first, weight decay among them, and all states one tensor of
    # the number of steps, to which AdamW then adds as often as there are groups.
    for group, own in zip(_adamw(trainer).param_groups, groups, strict=True):
        group.update({key: value for key, value in own.items() if key != "params"})
    for state in _adamw(trainer).state.values():
        state["step"] = state["step"].clone()


def _adamw(trainer: Any) -> Any:
    """The optimizer, inside of DeepSpeed's."""
    return trainer.model_wrapped.optimizer.optimizer


def _load(trainer: Any, folder: Path, tag: str) -> None:
    trainer.model_wrapped.load_checkpoint(
        str(folder), tag=tag, load_module_strict=False, load_lr_scheduler_states=False
    )
