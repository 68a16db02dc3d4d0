"""Floating-point operations of a micro-batch: two for each weight and row of a matrix product, in every pass over it.
Norms and activation functions are not counted."""

from __future__ import annotations

from collections.abc import Iterator

from sft.cost.idefics.shapes import LayerGroup
from sft.cost.idefics.trained_model import TrainedModel

_LAST = (("language", "down_proj"), ("vision", "fc2"))
"""The last product of a layer is not recomputed: nothing behind it in the layer needs its result, except an adapter."""

_TRAINED_POSITIONS_ONLY = ("o_proj", "gate_proj", "up_proj", "down_proj")
"""What the last language layer computes only for tokens whose next token is trained."""


def count_flop(model: TrainedModel) -> int:
    """Return the operations of the forward and backward pass over a micro-batch, recomputation included."""
    shape, setting = model.shape, model.setting
    total = sum(_linear_flop(model)) + sum(_attention_flop(model))
    head = 2 * setting.trained_tokens * shape.embedding_parameters * (3 if setting.trains("head") else 2)
    pixels = 2 * setting.images * (shape.patches - 1) * shape.pixel_weights * (not setting.encoded)
    return round(total + head + pixels * (2 if setting.trains("vision") else 1))


def _linear_flop(model: TrainedModel) -> Iterator[float]:
    """Yield the operations of the linear layers and of their adapters."""
    shape, setting = model.shape, model.setting
    rows = {
        "tokens": setting.tokens,
        "states": setting.images * shape.states,
        "patches": setting.images * shape.patches,
        "latents": setting.images * shape.resampler_latents,
        "context": setting.images * (shape.resampler_latents + shape.patches),
    }
    unread = (setting.tokens - setting.trained_tokens) / max(setting.tokens, 1)
    for group in _computed(model):
        again, adapted = _share_recomputed(model, group), model.adapted(group)
        for linear in shape.of_group(group):
            is_spared = group == "language" and linear.name in _TRAINED_POSITIONS_ONLY
            a_weight = 2.0 * rows[linear.rows] * (linear.count - is_spared * unread)
            is_last = (group, linear.name) in _LAST and linear not in adapted
            passes = again * (not is_last) + _passes(model, group, weight_trained=setting.trains(group))
            yield a_weight * linear.weights * passes
            if linear in adapted:
                weights = setting.lora_rank * (linear.inputs + linear.outputs)
                yield a_weight * weights * (again + _passes(model, group, weight_trained=True))


def _attention_flop(model: TrainedModel) -> Iterator[float]:
    """Yield the operations of the products of queries with keys, and of weights with values."""
    shape, tokens, images = model.shape, model.setting.tokens, model.setting.images
    inner = shape.resampler_heads * shape.resampler_head
    context = shape.patches + shape.resampler_latents
    forward: dict[LayerGroup, float] = {
        "language": 4 * tokens**2 * shape.hidden * shape.layers,
        "cross_attention": 4 * tokens * shape.states * shape.hidden * shape.cross_layers * bool(images),
        "vision": 4 * images * shape.patches**2 * shape.vision_hidden * shape.vision_layers,
        "resampler": 4 * images * shape.resampler_latents * context * inner * shape.resampler_layers,
    }
    for group in _computed(model):
        # A fused kernel recomputes the scores: five products backward for two forward.
        fused = 0.5 * (group != "resampler")
        passes = _share_recomputed(model, group) + _passes(model, group, weight_trained=True) + fused
        yield forward[group] * passes


def _computed(model: TrainedModel) -> tuple[LayerGroup, ...]:
    """Return the groups that compute anything: not those whose results the feature cache holds."""
    encoders: tuple[LayerGroup, ...] = () if model.setting.encoded else ("vision", "resampler")
    return ("language", "cross_attention", *encoders)


def _passes(model: TrainedModel, group: LayerGroup, *, weight_trained: bool) -> int:
    """Return how often a matrix product is computed: forward, and for the gradient of each of its factors."""
    return 1 + model.has_backward(group) * (1 + weight_trained)


def _share_recomputed(model: TrainedModel, group: LayerGroup) -> float:
    """Return the share of the layers of a group that recompute their activations."""
    return model.recomputed(group) / max(model.shape.layers_in(group), 1)
