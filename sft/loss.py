"""The training objective: next-token cross entropy at trained positions, summed, and the z-loss beside it.

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


def z_losses(logits_PV: Tensor) -> Tensor:
    """(log Z)² of each of P positions, Z the softmax's denominator over the whole vocabulary, in float32.

    m4's trainer adds `weight * sum((log Z)²) / tokens`, with the tokens that the cross entropy is divided by: weight
    1e-3 in the pre-training of idefics-9b, 0 in its instruction fine-tuning (PaLM, arXiv 2204.02311, section 5: 1e-4).
    """
    squares_P: Tensor = logits_PV.float().logsumexp(-1) ** 2
    return squares_P
