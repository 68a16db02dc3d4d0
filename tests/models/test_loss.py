"""The training loss in chunks is the plain one, and so is its gradient."""

import pytest
import torch

from sft.models import loss


def plain(logits_PV, targets_P, weights_P, z_loss):
    losses_P = loss.token_losses(logits_PV, targets_P)
    return ((losses_P + z_loss * loss.z_losses(logits_PV)) * weights_P).sum(), losses_P


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_summed_loss_is_cross_entropy_and_z_loss_row_by_row(monkeypatch, dtype, z_loss):
    """Seven rows, three at a time; the fourth belongs to no source."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 3 * 11)
    generator = torch.Generator().manual_seed(0)
    given = (3 * torch.randn(7, 11, generator=generator)).to(dtype)
    targets_P = torch.randint(11, (7,), generator=generator)
    weights_P = torch.tensor([1, 1, 1, 0, 1, 1, 1])
    found = []
    for compute in (loss.summed_loss, plain):
        logits_PV = given.clone().requires_grad_()
        total, losses_P = compute(logits_PV * 1, targets_P, weights_P, z_loss)
        (total / 5).backward()
        found.append((total, losses_P, logits_PV.grad))
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=tolerance, atol=tolerance)
    assert not found[0][2][3].any(), "a row without weight has no gradient"
