"""The forward over packed micro-batches: what all families share of it, and what each has to add.

Tokens attend inside their own sample, and only trained positions reach the language-model head. transformers' own
forwards cannot do this: they have no packing, or an unsafe one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import sdpa_mask

from sft.core.sample import NO_SOURCE, Batch, EncodedSample, Tiling
from sft.models.family import Tiles
from sft.models.fused_layers import is_autocast
from sft.models.grouped_attention import Groups, group_sequences, group_tokens, grouped_attention
from sft.models.loss import summed_loss, token_losses, trained_positions, z_losses


def _mask_always(*args: Any, **kwargs: Any) -> Tensor | None:
    """Make a mask even where transformers would leave it out and rely on a flag, which grouped attention cannot see."""
    mask: Tensor | None = sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})
    return mask


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", _mask_always)


class PackedOutput(NamedTuple):
    """What the forward over a packed micro-batch returns. P = trained positions, V = vocabulary."""

    loss: Tensor
    """(Summed cross entropy + z-loss) / trained tokens of the whole optimizer step."""
    token_losses_P: Tensor
    """Cross entropy of each trained position, float32, detached."""
    source_ids_P: Tensor
    """The mixture's source of each trained position."""
    logits_PV: Tensor | None
    """Logits of each trained position, float32; only in evaluation mode, since they are large."""


class PackedModel(nn.Module):
    """A model of a family: a subclass of this class and of transformers' own, with the same weights.

    `model(batch=batch)` returns a `PackedOutput`, `model(batch=batch, read_P=positions)` the logits (P, V) there, and
    anything else goes to transformers' forward. Its `forward` has transformers' signature, which `generate` reads.
    """

    shard_units: tuple[str, ...]
    """Class names of the layers that an engine which shards the model gathers one at a time."""

    if TYPE_CHECKING:  # transformers reads annotations of the class itself
        config: PreTrainedConfig
        dtype: torch.dtype
        model: Any  # transformers is not typed
        lm_head: Any
        generate: Any
        save_pretrained: Any
        activation_checkpointing_enable: Any
        peft_config: Any

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Return what `forward` does."""

    def encode_images(self, tiles: Sequence[Tensor], tilings: Sequence[Tiling]) -> Tensor:
        """Return the states (R, E) of images, of uint8 tiles (K, C, H, W), a tensor for each size, and of how the
        images are cut."""
        raise NotImplementedError  # each family has its own

    def hidden_states(self, batch: Batch, read_P: Tensor) -> Tensor:
        """Return the final hidden states (P, D) at some positions."""
        raise NotImplementedError

    def plain_logits(self, batch: Batch, segment: int) -> Tensor:
        """Return the logits (T, V) of one segment of a batch, by itself and by transformers' own forward and attention,
        which the packed forward must agree with."""
        raise NotImplementedError

    def generation_inputs(
        self,
        prompts: Sequence[EncodedSample],
        tiles: Sequence[Sequence[Tiles]],
        tilings: Sequence[Sequence[Tiling]],
    ) -> dict[str, Tensor]:
        """Return what `generate` takes besides token ids and their mask, for prompts that are padded on the left.
        `tiles` are those of each image of each prompt, `tilings` how it is cut."""
        raise NotImplementedError

    def use_grouped_attention(self) -> None:
        """Set attention by groups, for packs."""
        raise NotImplementedError

    def packed_forward(self, batch: Batch, read_P: Tensor | None, z_loss: float) -> PackedOutput | Tensor:
        """Return the summed next-token loss of a packed micro-batch, or its logits (P, V) at the positions `read_P`.

        `z_loss` is the weight of `sft.models.loss.z_losses`, which is added to the loss.
        """
        if read_P is not None:
            return self._logits(self.hidden_states(batch, read_P))
        positions_P = trained_positions(batch.labels_T)
        logits_PV = self._logits(self.hidden_states(batch, positions_P))
        targets_P, source_ids_P = batch.labels_T[positions_P + 1], batch.source_ids_T[positions_P + 1]
        weights_P = source_ids_P != NO_SOURCE
        if self.training and torch.is_grad_enabled():
            total, losses_P = summed_loss(logits_PV, targets_P, weights_P, z_loss)
            kept_PV = None
        else:
            losses_P, kept_PV = token_losses(logits_PV, targets_P), None if self.training else logits_PV
            total_P = losses_P + z_loss * z_losses(logits_PV) if z_loss else losses_P
            total = (total_P * weights_P).sum()
        return PackedOutput(total / batch.num_trained_tokens, losses_P.detach(), source_ids_P, kept_PV)

    def image_states(self, batch: Batch) -> Tensor | None:
        """Return the states (R, E) of the images of a batch, from the feature cache or by encoding them; None where it
        has no image."""
        if batch.features_RE is not None and len(batch.features_RE):
            assert not batch.to_encode, "sft.batches.feature_cache.Encoder completes a batch"
            return batch.features_RE.to(self.dtype)
        return self.encode_images(batch.tiles, batch.tilings) if batch.tiles else None

    def normed(self, norm: nn.Module, hidden_1PD: Tensor) -> Tensor:
        """Apply the last norm, in evaluation in float32, as the head."""
        with torch.autocast(hidden_1PD.device.type, enabled=self.training and is_autocast(hidden_1PD)):
            return torch.as_tensor(norm(hidden_1PD)[0])

    def _logits(self, hidden_PD: Tensor) -> Tensor:
        """Apply the head. In evaluation it computes in float32 whatever autocast says: bfloat16 logits of two options
        differ by steps of up to 1/16, and tie."""
        if self.training:
            return torch.as_tensor(self.lm_head(hidden_PD))
        with torch.autocast(hidden_PD.device.type, enabled=False):
            return torch.as_tensor(self.lm_head(hidden_PD.to(self.lm_head.weight.dtype))).float()


def sample_groups(batch: Batch) -> Groups:
    """Return the groups in which the tokens of a batch attend: its segments, or in evaluation its sequences."""
    if batch.sequences:
        return group_sequences(batch.sequences, len(batch.input_ids_T), batch.input_ids_T.device)
    return group_tokens(batch.segment_ids_T)
