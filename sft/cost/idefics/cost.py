"""The costs of IDEFICS-1: its parts, put together as `sft.cost.family.ModelCost`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from sft.cost.family import Cost, Setting
from sft.cost.idefics.activations import Activations
from sft.cost.idefics.flop import count_flop
from sft.cost.idefics.shapes import LAYER_GROUPS, Shape, shape_of
from sft.cost.idefics.trained_model import TrainedModel
from sft.cost.memory import Inventory, peak_memory
from sft.cost.model_config import load_model_config
from sft.models.idefics.names import MODEL_TYPES

RELEASED = {
    f"HuggingFaceM4/idefics-{size}{kind}": f"idefics-{size}.json"
    for size in ("9b", "80b")
    for kind in ("", "-instruct")
}
"""Hub ids whose config is shipped in model_configs/. An instruct model is its base with one row more."""

BASE_EXTRA_ROWS = 2
"""Extra vocabulary of the base models: the two image tokens. Training adds `<end_of_utterance>`."""


def read_model(path: str) -> IdeficsCost:
    """Return what the model at a path costs.

    Raises:
        UserError: there is no config.json, or it is not of IDEFICS-1.
    """
    return IdeficsCost(shape_of(trained_config(path)))


def trained_config(path: str) -> dict[str, Any]:
    """Return config.json of a model as it will be trained: with a row for `<end_of_utterance>`, which `prepare` adds.

    Raises:
        UserError: there is none, or it is not of IDEFICS-1.
    """
    config = load_model_config(path, MODEL_TYPES, RELEASED)
    if config.get("additional_vocab_size") == BASE_EXTRA_ROWS:
        config["additional_vocab_size"] += 1
    return config


@dataclass(frozen=True)
class CountedCost:
    """What a model costs, but for the size of its images. A connector is counted as a resampler."""

    shape: Shape

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        return self.shape.parameters

    def cost(self, setting: Setting) -> Cost:
        """Return memory and operations of a training step on each GPU."""
        return cost_of(self.shape, setting)

    def trained_parameters(self, setting: Setting) -> int:
        """Return how many parameters get a gradient, those of adapters included."""
        return sum(_trained_model(self.shape, setting).trained.values())

    def lora_layers(self, targets: Collection[str]) -> tuple[str, ...]:
        """Return the linear layers that `model.lora.targets` names, as `group.layer`."""
        asked = {*map(_counted_as, targets)}
        return tuple(linear.layer for linear in self.shape.linears if {linear.group, linear.target} & asked)

    def num_tiles(self, width: int, height: int) -> int:
        """Return how many tiles the tower takes an image as."""
        return 1

    def feature_bytes(self, width: int, height: int) -> int:
        """Return the bytes of an image in the feature cache: its states in float16."""
        return 2 * self.num_tiles(width, height) * self.shape.states * self.shape.state_size


class IdeficsCost(CountedCost):
    """What a model of IDEFICS-1 costs."""

    def fullest_images(self, tokens: int, image_weight: int) -> tuple[int, int]:
        """Return as many images as the cap allows: each has weight 1 and stands beside the text."""
        return image_weight, image_weight

    def image_tokens(self, width: int, height: int) -> int:
        """Return 0: an image stands beside the text."""
        return 0


def cost_of(shape: Shape, setting: Setting) -> Cost:
    """Return memory and operations of a training step on each GPU."""
    model = _trained_model(shape, setting)
    return Cost(peak_memory(_inventory(model), model.setting), count_flop(model))


def _trained_model(shape: Shape, setting: Setting) -> TrainedModel:
    trainable = setting.trainable and tuple(map(_counted_as, setting.trainable))
    return TrainedModel(shape, replace(setting, trainable=trainable))


def _counted_as(group: str) -> str:
    return group.replace("connector", "resampler")


def _inventory(model: TrainedModel) -> Inventory:
    shape, trained = model.shape, model.trained
    exact, half, four_bit = model.frozen
    return Inventory(
        parameters=shape.parameters,
        trained=sum(trained.values()),
        trained_embedding=trained["embedding"],
        trained_head=trained["head"],
        trained_lines=model.lines,
        frozen_exact=exact,
        frozen_half=half,
        frozen_four_bit=four_bit,
        vocabulary=shape.vocabulary_rows,
        head=shape.embedding_parameters,
        largest_layer=max(shape.layer_weights("language"), shape.layer_weights("cross_attention")),
        copies=sum(map(model.copies, LAYER_GROUPS)),
        inputs=model.setting.images * _input_bytes(model),
        stages=Activations(model).stages(),
    )


def _input_bytes(model: TrainedModel) -> int:
    """Return the bytes of an image of a micro-batch: its uint8 pixels, and what the tower's first layer keeps of them;
    or its features from the cache."""
    if model.setting.encoded:
        return 2 * model.shape.states * model.shape.state_size
    return 3 * model.shape.image_size**2 * (1 + model.setting.compute_bytes * model.setting.trains("vision"))
