"""FSDP2: torch's `fully_shard`. Every process has a share of the weights, gradients and optimizer states, and gathers a
layer's weights when it comes to the layer.

Shares are made here, before the trainer is. accelerate would do it too, but on GPUs only: without one it makes copies
(DDP) instead and says nothing (accelerate 1.15, state.py), so that no test on CPUs would have seen FSDP2 train.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sft.core.distributed import TIMEOUT
from sft.core.errors import RunError, UserError
from sft.training.engines import Writers, check_shared_out, sharded_state

KEEPS_GRADIENTS = True
READS = ("fsdp2",)


def check(mode: str, optimizer: str) -> None:
    """
    Raises:
        UserError: weights or optimizer states that it cannot share out.
    """
    check_shared_out("fsdp2", mode, optimizer)


def check_precision(precision: str) -> None:
    """
    Raises:
        UserError: float16, for which gradients would have to be scaled.
    """
    if precision == "float16":
        raise UserError("training.precision: fsdp2 trains in bfloat16 or float32, not in float16; set float32, or ddp")


def arguments(*, clip: float, precision: str, convert: bool) -> dict[str, Any]:
    """The model that the trainer gets is shared out already."""
    return {"ddp_timeout": int(TIMEOUT.total_seconds()), "use_cpu": not torch.cuda.is_available()}


def share_out(model: nn.Module, precision: str) -> None:
    """Leave this process its share of every layer, which is gathered as a whole, and so are the embedding and the head;
    what stands outside of them is gathered for the whole forward.

    Weights are kept as they are, and gathered and computed with in `precision`; gradients are summed in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if precision == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    whole: Any = model  # of transformers, which is not typed
    layers = [module for module in model.modules() if type(module).__name__ in whole._no_split_modules]
    for module in (*layers, whole.get_input_embeddings(), whole.get_output_embeddings(), whole):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # accelerate and transformers are told that nothing is left to do: no copies for DDP and no autocast; and that all
    # processes have to generate equally long.
    whole._is_accelerate_prepared = whole._is_fsdp_managed_module = True


def check_prepared(model: nn.Module) -> None:
    """
    Raises:
        RunError: what is trained is not shared out, or was wrapped as copies (DDP) by another version of accelerate.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if whole or not isinstance(model, FSDPModule):
        raise RunError(
            f"distributed.engine: fsdp2 has not shared the model out: it is a {type(model).__name__}, {len(whole)} of "
            "whose tensors are whole; are transformers and accelerate those of constraints.txt?"
        )


def own_part(tensor: Tensor) -> Tensor:
    """This process's rows."""
    own: Any = tensor
    return own.to_local() if hasattr(own, "to_local") else tensor


def gradient_norm(trainer: Any, norm: Any) -> Any:
    """Of the shares of all processes."""
    return norm.full_tensor()


def gathered(trainer: Any) -> dict[str, Tensor] | None:
    """One after another; without what stays as it was in the base, where only adapters are kept of it."""
    from sft.models.lora import has_adapters

    only_trained = has_adapters(trainer.unwrapped)
    whole = {}
    for name, parameter in trainer.unwrapped.named_parameters():
        if parameter.requires_grad or not only_trained:
            tensor = parameter.detach().full_tensor()
            if trainer.rank.is_main:
                whole[name] = tensor.cpu()
    return whole


def save(trainer: Any, folder: Path) -> None:
    """Each process writes its share."""
    sharded_state.save(folder, trainer.unwrapped, trainer.bare_optimizer)


def load(trainer: Any, folder: Path, written_by: Writers) -> None:
    """Each process reads its share of what any number of processes have written."""
    sharded_state.load(folder, trainer.unwrapped, trainer.bare_optimizer)
