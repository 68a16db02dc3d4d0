"""IDEFICS' layers as the packed forward runs them (`sft.models.fused_layers`), and its embedding: the lookup of extra
rows waits for no `nonzero` of the GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.idefics import modeling_idefics as plain
from transformers.models.idefics import perceiver, vision

from sft.models.fused_layers import Attention, DecoderLayer, Fused, Mlp, RmsNorm, TowerLayer


class Embedding(Fused):
    """Base and extra rows, both looked up for every token."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look up all tokens, as transformers does, without asking how many of them are extra."""
        if not self.num_additional_embeddings:
            return F.embedding(input_ids, self.weight)
        is_extra = input_ids >= self.num_embeddings
        extra = self.additional_embedding((input_ids - self.num_embeddings).clamp(min=0))
        base = F.embedding(input_ids.masked_fill(is_extra, 0), self.weight)
        return torch.where(is_extra[..., None], extra.to(base.dtype), base)


class PerceiverAttention(Fused):
    """Attention of the resampler."""

    before_linear = ("context_layer_norm", "latents_layer_norm")


class PerceiverMlp(Fused):
    """MLP of the resampler."""

    before_linear = ("ln",)


FUSED = {
    plain.IdeficsRMSNorm: RmsNorm,
    plain.IdeficsMLP: Mlp,
    plain.IdeficsAttention: Attention,
    plain.IdeficsDecoderLayer: DecoderLayer,
    plain.IdeficsDecoupledEmbedding: Embedding,
    vision.IdeficsVisionEncoderLayer: TowerLayer,
    perceiver.IdeficsPerceiverAttention: PerceiverAttention,
    perceiver.IdeficsMLP: PerceiverMlp,
}
