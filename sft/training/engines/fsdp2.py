"""FSDP2: torch's `fully_shard`. Every process has a shard of the weights, gradients and optimizer states, and gathers
a layer's weights when it comes to the layer.

The model is sharded here, before the trainer is made. accelerate would do it too, but on GPUs only: without one it
makes copies (DDP) instead and does not say so (accelerate 1.15, state.py), and no test on CPUs would see FSDP2 train.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from sft.core.distributed import Rank
from sft.core.errors import RunError
from sft.recipe.engines import check_engine_precision
from sft.training.engines import Engine, sharded_state

if TYPE_CHECKING:
    from sft.training.trainer import Trainer


class Fsdp2(Engine):
    """Any number of processes reads the shards of any other."""

    def check_precision(self, precision: str) -> None:
        """Refuse float16."""
        check_engine_precision("fsdp2", precision)

    def shard(self, model: nn.Module, precision: str) -> None:
        """Leave this process its shard of every layer. A layer is gathered as a whole, and so are the embedding and the
        head; everything else is gathered for the whole forward. Weights are kept as they are, and gathered and computed
        with in `precision`; gradients are summed in float32."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (torch.distributed.get_world_size(),))
        policy = MixedPrecisionPolicy()
        if precision == "bfloat16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        whole: Any = model  # of transformers, which is not typed
        layers = [module for module in model.modules() if type(module).__name__ in whole.shard_units]
        ends = [whole.get_input_embeddings(), whole.get_output_embeddings()]
        is_tied = ends[0].weight is ends[1].weight  # a weight of two modules is gathered for both together
        for module in (*layers, *([ends] if is_tied else ends), whole):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        # accelerate and transformers are told that nothing is left to do: no copies for DDP and no autocast; and that
        # all processes have to generate equally long.
        whole._is_accelerate_prepared = whole._is_fsdp_managed_module = True

    def check_prepared(self, model: nn.Module) -> None:
        """Raise RunError where a tensor is whole, or another version of accelerate has wrapped the model as copies
        (DDP)."""
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor

        whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
        if whole or not isinstance(model, FSDPModule):
            found = f"it is a {type(model).__name__}, {len(whole)} of whose tensors are whole"
            advice = "are transformers and accelerate those of constraints.txt?"
            raise RunError(f"distributed.engine: fsdp2 has not sharded the model: {found}; {advice}")

    def own_shard(self, tensor: Tensor) -> Tensor:
        """Return this process's rows."""
        own: Any = tensor
        return own.to_local() if hasattr(own, "to_local") else tensor

    def gradient_norm(self, trainer: Trainer, norm: Any) -> Any:
        """Return the norm over the shards of all processes."""
        return norm.full_tensor()

    def gather_weights(self, trainer: Trainer) -> dict[str, Tensor] | None:
        """Gather one tensor after another. Where only adapters are written, the frozen weights of the base are left
        out."""
        from sft.models.lora import has_adapters

        only_trained = has_adapters(trainer.unwrapped)
        whole = {}
        for name, parameter in trainer.unwrapped.named_parameters():
            if parameter.requires_grad or not only_trained:
                own: Any = parameter.detach()
                tensor = own.full_tensor()
                if trainer.rank.is_main:
                    whole[name] = tensor.cpu()
        return whole

    def save(self, trainer: Trainer, folder: Path) -> None:
        """Write the shard of each process."""
        sharded_state.save(folder, trainer.unwrapped, trainer.bare_optimizer)

    def load_whole(self, folder: Path, model: nn.Module, optimizer: Optimizer, rank: Rank) -> None:
        """Set a whole model, or the shard of each process, to what any number of processes have written."""
        sharded_state.load(folder, model, optimizer)


ENGINE = Fsdp2()
