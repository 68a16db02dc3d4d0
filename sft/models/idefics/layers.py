"""IDEFICS' layers as the packed forward runs them: the same weights and results in fewer passes over memory.

Each class takes the place of transformers' own of the same name in a model (`replace_layers`), holds nothing more, and
does what that does for whoever calls it as transformers would. What they save, by profile (docs/performance.md):

    norms        transformers' norm is ten kernels with the backward pass, and its float32 result, as that of a layer
                 norm, is rounded anew for each linear layer under autocast; here it is one function that rounds once
    gated MLP    SiLU(gate) is not kept but computed again: an MLP's width a token less
    rotation     cosines and sines are computed once a micro-batch, and the turned halves are not put together twice
    embedding    the lookup of extra rows waits for no `nonzero` of the GPU
    last layer   what comes after attention is computed only at the positions that reach the head

Shape letters: T tokens, P positions that reach the head, A attention heads, H size of a head, D hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation
from transformers.models.idefics import modeling_idefics as plain
from transformers.models.idefics import perceiver, vision

from sft.models.grouped_attention import Groups, grouped_attention


class _RmsNorm(torch.autograd.Function):
    """x / root mean square of x * weight, computed in float32, as a number of another type if asked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        x32 = x.float()
        scale = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normed: Tensor = (x32 * scale).mul_(weight)
        return normed.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        given, weight, scale = ctx.saved_tensors
        size = given.shape[-1]
        # A GPU's kernel takes numbers of one type only, a CPU's also weights that are float32 beside half precision.
        x = given if _mixes_types(given) else given.float()
        gradient, weight32 = gradient.to(x.dtype), weight.float()
        # torch's own backward of a layer norm whose mean is 0 takes the mean of gradient * weight off; it comes back.
        taken = torch.matmul(gradient.float(), weight32)[..., None].mul_(scale).div_(size)
        of_x, of_weight, _ = torch.ops.aten.native_layer_norm_backward(
            gradient, x, (size,), torch.zeros_like(scale), scale, weight32, None, [True, ctx.needs_input_grad[1], False]
        )
        of_x = of_x.add_(taken).to(given.dtype)
        return of_x, None if of_weight is None else of_weight.to(weight.dtype), None, None


def _mixes_types(x: Tensor) -> bool:
    return x.device.type == "cpu"


class RmsNorm(plain.IdeficsRMSNorm):  # type: ignore[misc]  # transformers is not typed
    """Its result is of the type that the linear layers behind it compute in."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Compute transformers' norm, rounded once under autocast."""
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        else:
            half = self.weight.dtype in (torch.float16, torch.bfloat16)
            dtype = self.weight.dtype if half else torch.promote_types(hidden_states.dtype, self.weight.dtype)
        if hidden_states.dtype == torch.float64:
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        return torch.as_tensor(_RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon, dtype))  # type: ignore[no-untyped-call]


class LayerNorm(nn.LayerNorm):
    """One in front of linear layers: they would round its float32 result once each under autocast."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute torch's norm, rounded once under autocast."""
        device = input.device.type
        normed = super().forward(input)
        return normed.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else normed


class _Gated(torch.autograd.Function):
    """SiLU(gate) * up, of which SiLU(gate) is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return of_gate, F.silu(gate).mul_(gradient)


class Mlp(plain.IdeficsMLP):  # type: ignore[misc]
    """A gated MLP that keeps one tensor less of a token's largest."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute transformers' MLP."""
        if not isinstance(self.act_fn, SiLUActivation):
            return super().forward(x)  # type: ignore[no-any-return]
        return torch.as_tensor(self.down_proj(_Gated.apply(self.gate_proj(x), self.up_proj(x))))  # type: ignore[no-untyped-call]


class Rotary(NamedTuple):
    """Cosines and sines of the angle by which each token's pairs of numbers turn; those of the first half negated."""

    cos_T1H: Tensor
    sin_T1H: Tensor


def rotary_of(module: nn.Module, position_ids_T: Tensor, dtype: torch.dtype) -> Rotary:
    """Return the rotation of all tokens of a micro-batch, for every layer. `module` is any layer's `rotary_emb`."""
    cos_1TH, sin_1TH = module(torch.empty(0, dtype=dtype, device=position_ids_T.device), position_ids_T[None])
    first, second = sin_1TH[0, :, None].chunk(2, dim=-1)
    return Rotary(cos_1TH[0, :, None], torch.cat((-first, second), dim=-1))


class _Rotate(torch.autograd.Function):
    """(first, second) half of each head -> (first cos - second sin, second cos + first sin)."""

    @staticmethod
    def forward(ctx: Any, x_TAH: Tensor, rotary: Rotary) -> Tensor:
        ctx.rotary = rotary
        return _rotated(x_TAH, rotary, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TAH: Tensor) -> tuple[Tensor, None]:
        return _rotated(gradient_TAH, ctx.rotary, -1), None


def _rotated(x_TAH: Tensor, rotary: Rotary, sign: int) -> Tensor:
    # A CPU takes four times as long to write into each half of the result (bfloat16, 32 numbers a head).
    first, second = x_TAH.chunk(2, dim=-1)
    swapped_TAH = torch.cat((second, first), dim=-1)
    return (x_TAH * rotary.cos_T1H).addcmul_(swapped_TAH, rotary.sin_T1H, value=sign)


class Attention(plain.IdeficsAttention):  # type: ignore[misc]
    """Attention by groups where it is given `groups`."""

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        *args: Any,
        groups: Groups | None = None,
        rotary: Rotary | None = None,
        read_P: Tensor | None = None,
        num_images: int = 0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend a row of tokens (1, T, D); return (1, T, D), or (1, P, D) at the positions `read_P` alone."""
        if groups is None:
            return super().forward(hidden_states, key_value_states, *args, **kwargs)  # type: ignore[no-any-return]
        states = hidden_states if key_value_states is None else key_value_states
        query_TAH, key_SAH, value_SAH = (
            layer(x)[0].unflatten(-1, (self.num_heads, self.head_dim))
            for layer, x in ((self.q_proj, hidden_states), (self.k_proj, states), (self.v_proj, states))
        )
        if rotary is not None:
            query_TAH, key_SAH = (_Rotate.apply(x, rotary) for x in (query_TAH, key_SAH))  # type: ignore[no-untyped-call]
        if self.qk_layer_norms:
            query_TAH, key_SAH = self.q_layer_norm(query_TAH), self.k_layer_norm(key_SAH)
        output_1TAH, _ = grouped_attention(
            self,
            query_TAH.transpose(0, 1)[None],
            key_SAH.transpose(0, 1)[None],
            value_SAH.transpose(0, 1)[None],
            None,
            scaling=self.scaling,
            dropout=self.dropout if self.training else 0.0,
            groups=groups,
            num_images=num_images,
        )
        output_1TD = output_1TAH.flatten(-2)
        return self.o_proj(output_1TD if read_P is None else output_1TD.index_select(1, read_P)), None


class DecoderLayer(plain.IdeficsDecoderLayer):  # type: ignore[misc]
    """A layer that may be asked for some of its tokens alone."""

    def forward(self, hidden_states: Tensor, *args: Any, read_P: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(1, T, D) -> (1, T, D), or (1, P, D) at the positions `read_P` alone."""
        if read_P is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), read_P=read_P, **kwargs)
        hidden_states = hidden_states.index_select(1, read_P) + self._dropped(attended)
        return hidden_states + self._dropped(self.mlp(self.post_attention_layernorm(hidden_states)))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, p=self.dropout, training=self.training)


class Embedding(plain.IdeficsDecoupledEmbedding):  # type: ignore[misc]
    """Base and extra rows, both looked up for every token."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look up all tokens, as transformers does, without asking how many of them are extra."""
        if not self.num_additional_embeddings:
            return F.embedding(input_ids, self.weight)
        is_extra = input_ids >= self.num_embeddings
        extra = self.additional_embedding((input_ids - self.num_embeddings).clamp(min=0))
        base = F.embedding(input_ids.masked_fill(is_extra, 0), self.weight)
        return torch.where(is_extra[..., None], extra.to(base.dtype), base)


_BEFORE_LINEAR = {
    vision.IdeficsVisionEncoderLayer: ("layer_norm1", "layer_norm2"),
    perceiver.IdeficsPerceiverAttention: ("context_layer_norm", "latents_layer_norm"),
    perceiver.IdeficsMLP: ("ln",),
}

_IN_PLACE_OF = {
    plain.IdeficsRMSNorm: RmsNorm,
    plain.IdeficsMLP: Mlp,
    plain.IdeficsAttention: Attention,
    plain.IdeficsDecoderLayer: DecoderLayer,
    plain.IdeficsDecoupledEmbedding: Embedding,
}


def replace_layers(model: nn.Module) -> None:
    """Let transformers' layers of a model be ours. Weights and their names stay."""
    for module in model.modules():
        for name in _BEFORE_LINEAR.get(type(module), ()):
            getattr(module, name).__class__ = LayerNorm
        module.__class__ = _IN_PLACE_OF.get(type(module), type(module))  # type: ignore[assignment]
