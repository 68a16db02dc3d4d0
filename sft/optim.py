"""Parameter groups and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer

NO_DECAY = ("bias", "alpha", "layernorm", "ln", "layer_norm", "perceiver_resampler")
"""Parameters whose name holds one of these are not decayed (m4's config.py): gates and the whole resampler among them.
The final `model.norm` and the tower's misspelt `pre_layrnorm` do not match and are decayed, as in 2023."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups, decayed and not."""
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    spared = [parameter for name, parameter in trainable if any(part in name for part in NO_DECAY)]
    decayed = [parameter for name, parameter in trainable if not any(part in name for part in NO_DECAY)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def linear_schedule(warmup_steps: int, max_steps: int, final_factor: float) -> Callable[[int], float]:
    """Factor on the peak learning rate at a step: up from 0 over `warmup_steps`, then a line to `final_factor`."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min((step - warmup_steps) / max(max_steps - warmup_steps, 1), 1.0)
        return 1 + progress * (final_factor - 1)

    return factor


def schedule(optimizer: Optimizer, warmup_steps: int, max_steps: int, final_factor: float) -> LambdaLR:
    """`linear_schedule` bound to an optimizer."""
    return LambdaLR(optimizer, linear_schedule(warmup_steps, max_steps, final_factor))
