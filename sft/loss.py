"""The training objective: next-token cross entropy at trained positions, summed.

The sum is divided by the number of trained tokens of the whole optimizer step, not of the micro-batch, so that the
gradient does not depend on how a step is cut into micro-batches or dealt to ranks.
"""

import torch.nn.functional as F
from torch import Tensor

from sft.sample import IGNORE_INDEX


def trained_positions(labels_T: Tensor) -> Tensor:
    """Index of every position whose *next* token is trained: the only ones whose logits are needed."""
    return (labels_T[1:] != IGNORE_INDEX).nonzero()[:, 0]


def token_losses(logits_PV: Tensor, targets_P: Tensor) -> Tensor:
    """Cross entropy of each of P positions over the whole vocabulary V (base and extra rows), in float32."""
    return F.cross_entropy(logits_PV.float(), targets_P, reduction="none")
