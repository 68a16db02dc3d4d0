"""The shape of an IDEFICS model, read from its config.json: every linear layer, and how many parameters there are.

Shape letters: D hidden size of the language model, E size of the vision tower, H one attention head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

LayerGroup = Literal["language", "cross_attention", "resampler", "vision"]
LAYER_GROUPS: tuple[LayerGroup, ...] = ("language", "cross_attention", "resampler", "vision")
"""Groups of the recipe that have linear layers."""

Rows = Literal["tokens", "states", "patches", "latents", "context"]
"""The rows that a layer is applied to: text tokens; of each image its `states`, which cross-attention looks at, the
patches of the tower, the latents of the resampler, or patches and latents together (`context`)."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer, of which the model has `count`."""

    group: LayerGroup
    name: str
    inputs: int
    outputs: int
    rows: Rows
    count: int

    @property
    def weights(self) -> int:
        """Weights of one such layer, without the bias."""
        return self.inputs * self.outputs

    @property
    def layer(self) -> str:
        """Its name with that of its group."""
        return f"{self.group}.{self.name}"

    @property
    def target(self) -> str:
        """The entry of `model.lora.targets` that names it and its like."""
        in_mlp = self.name in ("gate_proj", "up_proj", "down_proj", "fc1", "fc2", "fc", "c_proj")
        return f"{self.group}.{'mlp' if in_mlp else 'attention'}"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    """Heads of keys and values of the language model, which may be fewer."""
    head_size: int
    vocabulary: int
    extra_rows: int = 0
    """Rows after the base vocabulary: the image tokens and `<end_of_utterance>`."""
    cross_layers: int = 0
    qk_norms: bool = False
    gate_size: int = 0
    """Numbers in each of the two gates of a cross-attention layer."""
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    image_size: int
    patch_size: int
    resampler_layers: int
    resampler_heads: int = 0
    resampler_head: int = 0
    resampler_latents: int = 0
    resampler_qk_norms: bool = False

    is_tied: bool = False
    """Whether the head is the embedding."""
    connector_inputs: int = 0
    """Numbers from which a linear layer makes an image state, where such a layer follows the tower."""
    perceiver_key_values: int = 0
    """Numbers of the keys of Idefics2's perceiver, and of its values."""

    @property
    def state_size(self) -> int:
        """Numbers of an image state."""
        return self.vision_hidden

    @property
    def patches(self) -> int:
        """Patches of an image, the class token among them."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def positions(self) -> int:
        """Positions that the tower knows."""
        return self.patches

    @property
    def states(self) -> int:
        """States of an image, which cross-attention looks at."""
        return self.resampler_latents if self.resampler_layers else self.patches

    @property
    def vocabulary_rows(self) -> int:
        """Rows of embedding and head: base and extra vocabulary."""
        return self.vocabulary + self.extra_rows

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear layer except the head."""
        return tuple(linear for linear in self._linears() if linear.count)

    def _linears(self) -> Iterator[Linear]:
        D, F, E, I = self.hidden, self.intermediate, self.vision_hidden, self.vision_intermediate  # noqa: E741
        heads, shared = self.heads * self.head_size, self.key_value_heads * self.head_size
        yield Linear("language", "q_proj", D, heads, "tokens", self.layers)
        yield Linear("cross_attention", "q_proj", D, D, "tokens", self.cross_layers)
        for name in ("k_proj", "v_proj"):
            yield Linear("language", name, D, shared, "tokens", self.layers)
            yield Linear("cross_attention", name, E, D, "states", self.cross_layers)
        yield Linear("language", "o_proj", heads, D, "tokens", self.layers)
        yield Linear("cross_attention", "o_proj", D, D, "tokens", self.cross_layers)
        text_side: tuple[tuple[LayerGroup, int], ...]
        text_side = ("language", self.layers), ("cross_attention", self.cross_layers)
        for group, count in text_side:
            yield Linear(group, "gate_proj", D, F, "tokens", count)
            yield Linear(group, "up_proj", D, F, "tokens", count)
            yield Linear(group, "down_proj", F, D, "tokens", count)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield Linear("vision", name, E, E, "patches", self.vision_layers)
        yield Linear("vision", "fc1", E, I, "patches", self.vision_layers)
        yield Linear("vision", "fc2", I, E, "patches", self.vision_layers)
        yield from self._connector()

    def _connector(self) -> Iterator[Linear]:
        """Yield what stands between the tower and the language model."""
        E, inner = self.vision_hidden, self.resampler_heads * self.resampler_head
        yield Linear("resampler", "q_proj", E, inner, "latents", self.resampler_layers)
        for name in ("k_proj", "v_proj"):
            yield Linear("resampler", name, E, inner, "context", self.resampler_layers)
        yield Linear("resampler", "output_proj", inner, E, "latents", self.resampler_layers)
        yield Linear("resampler", "fc", E, 4 * E, "latents", self.resampler_layers)
        yield Linear("resampler", "c_proj", 4 * E, E, "latents", self.resampler_layers)

    def layers_in(self, group: LayerGroup) -> int:
        """Return how many layers a group has."""
        layers = (self.layers, self.cross_layers, self.resampler_layers, self.vision_layers)
        return dict(zip(LAYER_GROUPS, layers, strict=True))[group]

    def of_group(self, group: LayerGroup) -> tuple[Linear, ...]:
        """Return the linear layers of a group."""
        return tuple(linear for linear in self.linears if linear.group == group)

    def linear_weights(self, group: LayerGroup) -> int:
        """Return the weights of all linear layers of a group."""
        return sum(linear.weights * linear.count for linear in self.of_group(group))

    def layer_weights(self, group: LayerGroup) -> int:
        """Return the weights of the linear layers of one layer of a group."""
        return sum(linear.weights for linear in self.of_group(group))

    def group_parameters(self, group: LayerGroup) -> int:
        """Return the parameters of a group; the gates count as a part of cross-attention."""
        return self.linear_weights(group) + self._other_parameters(group)

    def _other_parameters(self, group: LayerGroup) -> int:
        """Return the norms, biases, gates, embeddings and latents of a group."""
        D, E = self.hidden, self.vision_hidden
        if group == "language":
            return 2 * D * self.layers + D  # and the last norm
        if group == "cross_attention":
            return (2 * D + 2 * self.qk_norms * (D // self.heads)) * self.cross_layers + self.gates
        if group == "vision":
            biases = sum(linear.outputs * linear.count for linear in self.of_group("vision"))
            return biases + 4 * E * self.vision_layers + 4 * E + self.pixel_weights + E + self.positions * E
        norms = 6 * E + 4 * self.resampler_qk_norms * self.resampler_head
        return (norms * self.resampler_layers + self.resampler_latents * E + 2 * E) if self.resampler_layers else 0

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding; the head has as many."""
        return self.vocabulary_rows * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        return sum(map(self.group_parameters, LAYER_GROUPS)) + (2 - self.is_tied) * self.embedding_parameters

    @property
    def gates(self) -> int:
        """Parameters of all gates."""
        return 2 * self.gate_size * self.cross_layers

    @property
    def pixel_weights(self) -> int:
        """Weights of the convolution by which the tower begins."""
        return 3 * self.patch_size**2 * self.vision_hidden

    @property
    def never_trained(self) -> int:
        """Parameters of the tower's last norm, which never gets a gradient."""
        return 2 * self.vision_hidden


def shape_of(values: Mapping[str, Any]) -> Shape:
    """Return the shape of a model from the values of its config.json; those left out have transformers' defaults."""
    from transformers import IdeficsConfig

    config = IdeficsConfig.from_dict(dict(values))
    vision, resampler = config.vision_config, config.perceiver_config
    return Shape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        key_value_heads=config.num_attention_heads,
        head_size=config.hidden_size // config.num_attention_heads,
        cross_layers=config.num_hidden_layers // config.cross_layer_interval,
        qk_norms=config.qk_layer_norms,
        gate_size=config.hidden_size if config.alpha_type == "vector" else 1,
        vocabulary=config.vocab_size,
        extra_rows=config.additional_vocab_size,
        vision_hidden=vision.embed_dim,
        vision_intermediate=vision.intermediate_size,
        vision_layers=vision.num_hidden_layers,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        resampler_layers=resampler.resampler_depth if config.use_resampler else 0,
        resampler_heads=resampler.resampler_n_heads,
        resampler_head=resampler.resampler_head_dim,
        resampler_latents=resampler.resampler_n_latents,
        resampler_qk_norms=resampler.qk_layer_norms_perceiver,
    )
