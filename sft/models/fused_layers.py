"""Layers as the packed forward runs them: transformers' weights and results in fewer passes over memory.

Each class is put before transformers' own class of a layer (`replace_layers`), holds nothing more, and does what that
does for whoever calls it as transformers would. What they save, by profile (docs/performance.md):

    norms        transformers' norm is ten kernels with the backward pass, and its float32 result, as that of a layer
                 norm, is rounded anew for each linear layer under autocast; here it is one function that rounds once
    gated MLP    SiLU(gate) is not kept but computed again: an MLP's width a token less
    rotation     cosines and sines are computed once a micro-batch, and the turned halves are not put together twice
    last layer   what comes after attention is computed only at the positions that reach the head

Shape letters: T tokens, P positions that reach the head, A attention heads, H size of a head, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

from sft.models.grouped_attention import Groups, grouped_attention

_WORKED_ON = (2**18, 2**23)
"""Numbers of the hidden states that a frozen tower works on at a time, on a CPU and on a GPU."""


def is_autocast(x: Tensor) -> bool:
    """Return whether autocast is on for the device of a tensor."""
    return torch.is_autocast_enabled(x.device.type)


def computed_in(x: Tensor) -> torch.dtype:
    """Return the type that linear layers turn `x` into."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) else x.dtype


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


class Fused(nn.Module):
    """What is put before a class of transformers."""

    before_linear: tuple[str, ...] = ()
    """The layer norms that stand in front of linear layers."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Return what transformers' class has."""


class RmsNorm(Fused):
    """Its result is of the type that the linear layers behind it compute in."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Compute transformers' norm, rounded once under autocast."""
        dtype = computed_in(hidden_states)
        if not is_autocast(hidden_states):
            half = self.weight.dtype in (torch.float16, torch.bfloat16)
            dtype = self.weight.dtype if half else torch.promote_types(dtype, self.weight.dtype)
        if hidden_states.dtype == torch.float64:
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        return torch.as_tensor(_RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon, dtype))  # type: ignore[no-untyped-call]


class LayerNorm(nn.LayerNorm):
    """One in front of linear layers: they would round its float32 result once each under autocast."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute torch's norm, rounded once under autocast."""
        normed = super().forward(input)
        return normed.to(computed_in(normed))


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


class Mlp(Fused):
    """A gated MLP that keeps one tensor less of a token's largest."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute transformers' MLP."""
        if not isinstance(self.act_fn, SiLUActivation):
            return super().forward(x)  # type: ignore[no-any-return]
        return torch.as_tensor(self.down_proj(_Gated.apply(self.gate_proj(x), self.up_proj(x))))  # type: ignore[no-untyped-call]


class TowerLayer(Fused):
    """A layer of a tower. Where nothing is kept for a backward pass it works on a few tiles at a time, which stay in a
    cache: 0.88 of the time on a CPU, and little memory."""

    before_linear = ("layer_norm1", "layer_norm2")

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        """Compute transformers' layer over tiles (K, P, E), which do not attend to one another."""
        is_trained = hidden_states.requires_grad or any(weight.requires_grad for weight in self.parameters())
        if attention_mask is not None or (is_trained and torch.is_grad_enabled()):
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[no-any-return]
        tiles = max(_WORKED_ON[hidden_states.is_cuda] // hidden_states[0].numel(), 1)
        return torch.cat([super(TowerLayer, self).forward(x, None, **kwargs) for x in hidden_states.split(tiles)])  # type: ignore[no-untyped-call]


class Rotary(NamedTuple):
    """Cosines and sines of the angle by which each token's pairs of numbers turn; those of the first half negated."""

    cos_T1H: Tensor
    sin_T1H: Tensor


def rotary_of(module: nn.Module, position_ids_T: Tensor, hidden: Tensor) -> Rotary:
    """Return the rotation of all tokens of a micro-batch, for every layer. `module` is transformers' `rotary_emb`."""
    cos_1TH, sin_1TH = module(hidden.new_empty(0, dtype=computed_in(hidden)), position_ids_T[None])
    first, second = sin_1TH[0, :, None].chunk(2, dim=-1)
    return Rotary(cos_1TH[0, :, None], torch.cat((-first, second), dim=-1))


def _rotated(x_TAH: Tensor, rotary: Rotary) -> Tensor:
    """(first, second) half of each head -> (first cos - second sin, second cos + first sin)."""
    # A CPU takes four times as long to write into each half of the result (bfloat16, 32 numbers a head).
    first, second = x_TAH.chunk(2, dim=-1)
    swapped_TAH = torch.cat((second, first), dim=-1)
    return torch.addcmul(x_TAH * rotary.cos_T1H, swapped_TAH, rotary.sin_T1H)


class Attention(Fused):
    """Attention by groups where it is given `groups`."""

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        groups: Groups | None = None,
        rotary: Rotary | None = None,
        read_P: Tensor | None = None,
        num_images: int = 0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend a row of tokens (1, T, D); return (1, T, D), or (1, P, D) at the positions `read_P` alone."""
        if groups is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        states = kwargs.get("key_value_states")
        states = hidden_states if states is None else states
        query_TAH, key_SAH, value_SAH = (
            layer(x)[0].unflatten(-1, (-1, self.head_dim))
            for layer, x in ((self.q_proj, hidden_states), (self.k_proj, states), (self.v_proj, states))
        )
        if rotary is not None:
            query_TAH, key_SAH = (_rotated(x, rotary) for x in (query_TAH, key_SAH))
        if getattr(self, "qk_layer_norms", False):
            query_TAH, key_SAH = self.q_layer_norm(query_TAH), self.k_layer_norm(key_SAH)
        output_1TAH, _ = grouped_attention(
            self,
            query_TAH.transpose(0, 1)[None],
            key_SAH.transpose(0, 1)[None],
            value_SAH.transpose(0, 1)[None],
            None,
            scaling=self.scaling,
            dropout=(getattr(self, "dropout", 0.0) or getattr(self, "attention_dropout", 0.0)) * self.training,
            groups=groups,
            num_images=num_images,
            sliding_window=getattr(self.config, "sliding_window", None),
        )
        output_1TD = output_1TAH.flatten(-2)
        return self.o_proj(output_1TD if read_P is None else output_1TD.index_select(1, read_P)), None


class DecoderLayer(Fused):
    """A layer that may be asked for some of its tokens alone."""

    def forward(self, hidden_states: Tensor, *args: Any, read_P: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(1, T, D) -> (1, T, D), or (1, P, D) at the positions `read_P` alone."""
        if read_P is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), read_P=read_P, **kwargs)
        hidden_states = hidden_states.index_select(1, read_P) + self._dropped(attended)
        return hidden_states + self._dropped(self.mlp(self.post_attention_layernorm(hidden_states)))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, p=getattr(self, "dropout", 0.0), training=self.training)


_MADE: dict[tuple[type, type], Any] = {}


def replace_layers(model: nn.Module, fused: Mapping[Any, type[Fused]]) -> None:
    """Let layers of a model, by their class, be of the class in `fused` as well; weights and all names stay."""
    for module in model.modules():
        if own := fused.get(type(module)):
            for name in own.before_linear:
                getattr(module, name).__class__ = LayerNorm
            both = (own, type(module))
            module.__class__ = _MADE.setdefault(both, type(type(module).__name__, both, {}))
