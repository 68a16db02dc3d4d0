"""The training objective: next-token cross entropy at trained positions, summed, and the z-loss beside it.

The sum is divided by the number of trained tokens of the whole optimizer step, not of the micro-batch, so that the
gradient does not depend on how a step is cut into micro-batches or dealt to ranks.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sft.core.sample import IGNORE_INDEX


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


CHUNK_LOGITS = 2**22
"""Float32 numbers that the loss works on at a time, 16 MB: few enough to stay in a cache, many enough for a kernel."""


class _SummedLoss(torch.autograd.Function):
    """The loss goes forward and backward over a few rows at a time; each row of logits gives way to its gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits_PV: Tensor, targets_P: Tensor, weights_P: Tensor, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        losses_P = torch.empty(len(logits_PV), dtype=torch.float32, device=logits_PV.device)
        total = torch.zeros((), dtype=torch.float32, device=logits_PV.device)
        rows = max(CHUNK_LOGITS // logits_PV.shape[1], 1)
        for logits_CV, targets_C, weights_C, losses_C in zip(
            *(torch.split(x, rows) for x in (logits_PV, targets_P, weights_P, losses_P)),
            strict=True,
        ):
            targets_C1 = targets_C[:, None]
            log_probs_CV = logits_CV.log_softmax(-1, dtype=torch.float32)
            log_z_C = (logits_CV.gather(1, targets_C1) - log_probs_CV.gather(1, targets_C1))[:, 0]
            losses_C.copy_(log_probs_CV.gather(1, targets_C1)[:, 0].neg_())
            total += ((losses_C + z_loss * log_z_C**2) * weights_C).sum()
            scale_C = weights_C * (1 + 2 * z_loss * log_z_C) if z_loss else weights_C
            gradient_CV = log_probs_CV.exp_().mul_(scale_C[:, None])
            gradient_CV.scatter_add_(1, targets_C1, -weights_C[:, None])
            logits_CV.copy_(gradient_CV)
        ctx.gradient_PV = logits_PV
        ctx.mark_non_differentiable(losses_P)
        return total, losses_P

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor, of_losses: Tensor) -> tuple[Tensor, None, None, None]:
        gradient_PV, ctx.gradient_PV = ctx.gradient_PV, None
        return gradient_PV.mul_(of_total), None, None, None


def summed_loss(logits_PV: Tensor, targets_P: Tensor, weights_P: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """(Sum of `weights_P * (token_losses + z_loss * z_losses)`, token_losses), differentiable once by the sum.

    The same as those two to rounding, without a float32 tensor of all logits, of their logarithms or of their
    gradient: `logits_PV` is overwritten, and must be of no use to anybody else.
    """
    total, losses_P = _SummedLoss.apply(logits_PV, targets_P, weights_P.float(), z_loss)  # type: ignore[no-untyped-call]
    return total, losses_P
