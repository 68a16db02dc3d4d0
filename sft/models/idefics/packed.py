"""IDEFICS with a forward over packed micro-batches.

Tokens attend inside their own sample, look at the last image at or before them, and only trained positions reach the
language-model head. transformers' own forward cannot do this (it has no packing) and its loss crashes on every released
checkpoint, whose vocabulary has extra rows.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import IdeficsForVisionText2Text as PlainIdefics
from transformers.masking_utils import sdpa_mask

from sft.core.sample import NO_SOURCE, Batch
from sft.models.family import PackedOutput
from sft.models.grouped_attention import group_sequences, group_tokens, grouped_attention
from sft.models.idefics.layers import replace_layers, rotary_of
from sft.models.idefics.pixels import normalise
from sft.models.loss import summed_loss, token_losses, trained_positions, z_losses


def _mask_always(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers may leave a causal mask out and rely on a flag; grouped attention wants to see it."""
    mask: Tensor | None = sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})
    return mask


AttentionInterface.register("grouped", grouped_attention)

AttentionMaskInterface.register("grouped", _mask_always)


class PackedIdefics(PlainIdefics):  # type: ignore[misc]  # transformers is not typed
    """IDEFICS with a forward for packed micro-batches: `model(batch=batch)`. Anything else goes to transformers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        replace_layers(self)

    @functools.wraps(PlainIdefics.forward)  # generate() reads the signature
    def forward(
        self,
        *args: Any,
        batch: Batch | None = None,
        read_P: Tensor | None = None,
        z_loss: float = 0.0,
        **kwargs: Any,
    ) -> Any:
        """Summed next-token loss of a packed micro-batch; its logits (P, V) at the positions `read_P`, if those are
        given; transformers' forward when no `batch` is.

        `z_loss` is the weight of `sft.models.loss.z_losses` beside the loss.
        """
        if batch is None:
            return super().forward(*args, **kwargs)
        if read_P is not None:
            return self._logits(self._hidden_states(batch, read_P))
        positions_P = trained_positions(batch.labels_T)
        logits_PV = self._logits(self._hidden_states(batch, positions_P))
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

    def _logits(self, hidden_PD: Tensor) -> Tensor:
        """The head. In evaluation it computes in float32 whatever autocast says: bfloat16 logits of two options differ
        by steps of up to 1/16, and tie."""
        if self.training:
            return torch.as_tensor(self.lm_head(hidden_PD))
        with torch.autocast(hidden_PD.device.type, enabled=False):
            return torch.as_tensor(self.lm_head(hidden_PD.to(self.lm_head.weight.dtype))).float()

    def encode_images(self, pixel_values_NCHW: Tensor) -> Tensor:
        """uint8 or already normalised pixels -> (images, latents, size), what cross-attention looks at."""
        if pixel_values_NCHW.dtype == torch.uint8:
            pixel_values_NCHW = normalise(pixel_values_NCHW)
        features = self.model.vision_model(pixel_values=pixel_values_NCHW.to(self.dtype)).last_hidden_state
        if self.config.use_resampler:
            features = self.model.perceiver_resampler(features)
        return torch.as_tensor(features)

    def _image_states(self, batch: Batch) -> Tensor:
        if batch.features_NSE is not None and len(batch.features_NSE):
            assert not batch.to_encode, "sft.batches.feature_cache.Encoder completes a batch"
            return batch.features_NSE.to(self.dtype)
        if len(batch.pixel_values_NCHW):
            return self.encode_images(batch.pixel_values_NCHW)
        # Text only, on one device: nothing can look at these zeros.
        size = self.config.vision_config.embed_dim
        return torch.zeros(1, 1, size, dtype=self.dtype, device=batch.input_ids_T.device)

    def _hidden_states(self, batch: Batch, read_P: Tensor) -> Tensor:
        """Final hidden states (P, D) at some positions. The walk through the layers is that of
        `IdeficsModel.forward`."""
        decoder = self.model
        states_NLD = self._image_states(batch)
        samples = (
            group_sequences(batch.sequences, len(batch.input_ids_T), batch.input_ids_T.device)
            if batch.sequences
            else group_tokens(batch.segment_ids_T)
        )
        lookers = group_tokens(batch.image_ids_T)
        sees_image_1T = (batch.image_ids_T >= 0)[None]
        hidden_1TD = decoder.embed_tokens(batch.input_ids_T[None])
        rotary = rotary_of(decoder.layers[0].self_attn.rotary_emb, batch.position_ids_T, _computed_in(hidden_1TD))
        for index, layer in enumerate(decoder.layers):
            if index % decoder.cross_layer_interval == 0:
                hidden_1TD = decoder.gated_cross_attn_layers[index // decoder.cross_layer_interval](
                    hidden_1TD,
                    None,
                    states_NLD.flatten(0, 1)[None],
                    cross_attention_gate=sees_image_1T,
                    groups=lookers,
                    num_images=len(states_NLD),
                )
            is_last = index == len(decoder.layers) - 1
            hidden_1TD = layer(hidden_1TD, rotary=rotary, groups=samples, read_P=read_P if is_last else None)
        with torch.autocast(hidden_1TD.device.type, enabled=self.training and _is_autocast(hidden_1TD)):
            return torch.as_tensor(decoder.norm(hidden_1TD)[0])  # in evaluation float32, as the head


def _is_autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _computed_in(x: Tensor) -> torch.dtype:
    """The type that linear layers turn `x` into."""
    return torch.get_autocast_dtype(x.device.type) if _is_autocast(x) else x.dtype


def use_grouped_attention(model: PackedIdefics) -> None:
    """Set attention by groups. The vision tower has no groups and attends as ever, see `grouped_attention`."""
    model.config._attn_implementation = "grouped"
    model.config.vision_config._attn_implementation = "grouped"


def plain_logits(model: nn.Module, input_ids_T: Tensor, image_ids_T: Tensor, pixel_values_NCHW: Tensor) -> Tensor:
    """Logits (T, V) of one sample by transformers' own forward and attention: what the packed forward must agree with.

    A token looks at the image of its `image_ids_T`, at none where that is -1.
    """
    assert isinstance(model, PackedIdefics)
    looks_TN = image_ids_T[:, None] == torch.arange(len(pixel_values_NCHW), device=image_ids_T.device)
    model.config._attn_implementation = model.config.vision_config._attn_implementation = "sdpa"
    try:
        output = model(
            input_ids=input_ids_T[None],
            attention_mask=torch.ones_like(input_ids_T)[None],
            pixel_values=normalise(pixel_values_NCHW).to(model.dtype)[None],
            image_attention_mask=looks_TN.long()[None],
            use_cache=False,
        )
    finally:
        use_grouped_attention(model)
    return torch.as_tensor(output.logits[0])
