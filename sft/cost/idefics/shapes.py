"""The shape of an IDEFICS model, read from its config.json: every linear layer, and how many parameters there are.

Shape letters: D hidden size of the language model, E size of the vision tower, H one attention head.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

Part = Literal["language", "cross_attention", "resampler", "vision"]
Rows = Literal["tokens", "states", "patches", "latents", "context"]
"""What a layer is applied to: text tokens; of each image what cross-attention looks at (`states`), the patches of the
tower, the latents of the resampler, patches and latents together (`context`)."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer that is there `count` times."""

    part: Part
    name: str
    inputs: int
    outputs: int
    rows: Rows
    count: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Of one, without the bias."""
        return self.inputs * self.outputs

    @property
    def target(self) -> str:
        """What `model.lora.targets` calls it."""
        in_mlp = self.name in ("gate_proj", "up_proj", "down_proj", "fc1", "fc2", "fc", "c_proj")
        return f"{self.part}.{'mlp' if in_mlp else 'attention'}"


@dataclass(frozen=True)
class Shape:
    """What the cost of a model depends on."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    cross_layers: int
    qk_norms: bool
    gate_size: int
    """Numbers of one of a cross-attention layer's two gates."""
    vocabulary: int
    extra_rows: int
    """Added after the base vocabulary: the image tokens and `<end_of_utterance>`."""
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    vision_heads: int
    image_size: int
    patch_size: int
    resampler_layers: int
    resampler_heads: int
    resampler_head: int
    resampler_latents: int
    resampler_qk_norms: bool

    @property
    def patches(self) -> int:
        """Of an image, the class token among them."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def states(self) -> int:
        """Of an image, what cross-attention looks at."""
        return self.resampler_latents if self.resampler_layers else self.patches

    @property
    def feature_bytes(self) -> int:
        """Of an image in the feature cache: its states in float16."""
        return 2 * self.states * self.vision_hidden

    @property
    def vocabulary_rows(self) -> int:
        """Base and extra."""
        return self.vocabulary + self.extra_rows

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear layer but the head."""
        return tuple(self._linears())

    def _linears(self) -> Iterator[Linear]:
        D, F, E, I = self.hidden, self.intermediate, self.vision_hidden, self.vision_intermediate  # noqa: E741
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield Linear("language", name, D, D, "tokens", self.layers)
            looks_at_image = name in ("k_proj", "v_proj")
            inputs, rows = (E, "states") if looks_at_image else (D, "tokens")
            yield Linear("cross_attention", name, inputs, D, rows, self.cross_layers)  # type: ignore[arg-type]
        for part, count in (("language", self.layers), ("cross_attention", self.cross_layers)):
            yield Linear(part, "gate_proj", D, F, "tokens", count)  # type: ignore[arg-type]
            yield Linear(part, "up_proj", D, F, "tokens", count)  # type: ignore[arg-type]
            yield Linear(part, "down_proj", F, D, "tokens", count)  # type: ignore[arg-type]
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield Linear("vision", name, E, E, "patches", self.vision_layers, bias=True)
        yield Linear("vision", "fc1", E, I, "patches", self.vision_layers, bias=True)
        yield Linear("vision", "fc2", I, E, "patches", self.vision_layers, bias=True)
        inner = self.resampler_heads * self.resampler_head
        yield Linear("resampler", "q_proj", E, inner, "latents", self.resampler_layers)
        yield Linear("resampler", "k_proj", E, inner, "context", self.resampler_layers)
        yield Linear("resampler", "v_proj", E, inner, "context", self.resampler_layers)
        yield Linear("resampler", "output_proj", inner, E, "latents", self.resampler_layers)
        yield Linear("resampler", "fc", E, 4 * E, "latents", self.resampler_layers)
        yield Linear("resampler", "c_proj", 4 * E, E, "latents", self.resampler_layers)

    def layers_in(self, part: Part) -> int:
        """How many layers a part has."""
        return {
            "language": self.layers,
            "cross_attention": self.cross_layers,
            "resampler": self.resampler_layers,
            "vision": self.vision_layers,
        }[part]

    def layers_of(self, targets: Collection[str]) -> tuple[str, ...]:
        """Names, with their parts, of the linear layers that `model.lora.targets` names."""
        asked = (linear for linear in self.linears if {linear.part, linear.target} & set(targets))
        return tuple(f"{linear.part}.{linear.name}" for linear in asked)

    def of_part(self, part: Part) -> tuple[Linear, ...]:
        """The linear layers of a part."""
        return tuple(linear for linear in self.linears if linear.part == part)

    def _other(self, part: Part) -> int:
        """Parameters of a part outside its linear layers' weights: norms, biases, gates, embeddings, latents."""
        D, E = self.hidden, self.vision_hidden
        if part == "language":
            return 2 * D * self.layers + D  # and the last norm
        if part == "cross_attention":
            return (2 * D + 2 * self.gate_size + 2 * self.qk_norms * (D // self.heads)) * self.cross_layers
        if part == "vision":
            biases = sum(linear.outputs * linear.count for linear in self.of_part("vision"))
            return biases + 4 * E * self.vision_layers + 4 * E + self.pixel_weights + E + self.patches * E
        norms = 6 * E + 4 * self.resampler_qk_norms * self.resampler_head
        return (norms * self.resampler_layers + self.resampler_latents * E + 2 * E) if self.resampler_layers else 0

    def part_parameters(self, part: Part) -> int:
        """Parameters of a part."""
        return sum(linear.weights * linear.count for linear in self.of_part(part)) + self._other(part)

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding, and as many of the head."""
        return self.vocabulary_rows * self.hidden

    @property
    def parameters(self) -> int:
        """Of everything."""
        parts: tuple[Part, ...] = ("language", "cross_attention", "resampler", "vision")
        return sum(map(self.part_parameters, parts)) + 2 * self.embedding_parameters

    @property
    def gates(self) -> int:
        """Parameters of all gates, which count as a part of cross-attention."""
        return 2 * self.gate_size * self.cross_layers

    @property
    def pixel_weights(self) -> int:
        """Of the convolution by which the tower begins."""
        return 3 * self.patch_size**2 * self.vision_hidden

    @property
    def never_trained(self) -> int:
        """The tower's last norm never gets a gradient."""
        return 2 * self.vision_hidden


def shape_of(values: Mapping[str, Any]) -> Shape:
    """Read the values of a config.json; what it leaves out has transformers' defaults."""
    from transformers import IdeficsConfig

    config = IdeficsConfig.from_dict(dict(values))
    vision, resampler = config.vision_config, config.perceiver_config
    return Shape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        cross_layers=config.num_hidden_layers // config.cross_layer_interval,
        qk_norms=config.qk_layer_norms,
        gate_size=config.hidden_size if config.alpha_type == "vector" else 1,
        vocabulary=config.vocab_size,
        extra_rows=config.additional_vocab_size,
        vision_hidden=vision.embed_dim,
        vision_intermediate=vision.intermediate_size,
        vision_layers=vision.num_hidden_layers,
        vision_heads=vision.num_attention_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        resampler_layers=resampler.resampler_depth if config.use_resampler else 0,
        resampler_heads=resampler.resampler_n_heads,
        resampler_head=resampler.resampler_head_dim,
        resampler_latents=resampler.resampler_n_latents,
        resampler_qk_norms=resampler.qk_layer_norms_perceiver,
    )
