"""The linear layers of Idefics3 and SmolVLM, and how many parameters there are. An image of `Shape` is a tile here,
as in every family whose images are part of the text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sft.cost.idefics.shapes import LayerGroup, Linear, Shape


@dataclass(frozen=True, kw_only=True)
class InlineShape(Shape):
    """The sizes of a model whose images are part of the text: a SigLIP tower, a connector, which is counted as a
    resampler, and a language model whose heads share keys and values."""

    @property
    def state_size(self) -> int:
        """Numbers of an image state."""
        return self.hidden

    @property
    def positions(self) -> int:
        """Positions that the tower knows, which has no class token."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patches(self) -> int:
        """Patches of a tile."""
        return self.positions

    @property
    def never_trained(self) -> int:
        """Every parameter gets a gradient."""
        return 0

    def _other_parameters(self, group: LayerGroup) -> int:
        """Return the norms, biases and embeddings of a group. The tower has no class token and one norm at its end."""
        if group == "vision":
            return super()._other_parameters(group) - 2 * self.vision_hidden
        return super()._other_parameters(group) if group == "language" else 0


@dataclass(frozen=True, kw_only=True)
class TiledShape(InlineShape):
    """The sizes of a model of Idefics3 or SmolVLM."""

    shuffled: int
    """How many patches, in each direction, become one state."""

    @property
    def states(self) -> int:
        """States of a tile."""
        return self.patches // self.shuffled**2

    def _connector(self) -> Iterator[Linear]:
        yield Linear("resampler", "proj", self.connector_inputs, self.hidden, "states", 1)


def shape_of(values: Mapping[str, Any]) -> TiledShape:
    """Return the shape of a model from the values of its config.json; those left out have transformers' defaults."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(**values)
    return TiledShape(
        **common_sizes(config),
        shuffled=config.scale_factor,
        connector_inputs=config.vision_config.hidden_size * config.scale_factor**2,
        resampler_layers=1,  # the connector
    )


def common_sizes(config: Any) -> dict[str, Any]:
    """Return the sizes of tower and language model by their names in `Shape`."""
    text, vision = config.text_config, config.vision_config
    return dict(
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        key_value_heads=text.num_key_value_heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocabulary=text.vocab_size,
        vision_hidden=vision.hidden_size,
        vision_intermediate=vision.intermediate_size,
        vision_layers=vision.num_hidden_layers,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        is_tied=config.tie_word_embeddings,
    )
