"""The seam between `plan` and a family of models: what a training step costs, as a function of how it is trained.

The costs of a family are a module `cost`: that of the folder of `sft/cost/` with the family's name, or that of the
package outside the tree whose dotted name `model.family` gives. The module has one function, a `ReadModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from sft import cost
from sft.core.errors import UserError
from sft.core.shipped import resolve
from sft.models import base_of, package_name
from sft.models.base_model import base_path
from sft.recipe import ENGINES, EngineName, EvaluationConfig, OptimizerName, Recipe
from sft.recipe.model import INLINE_FAMILIES, INLINE_LENGTH
from sft.runs.names import find_model, find_recipe, recipe_of_model

COMMON_SIZE = (640, 480)
"""Width and height of most of COCO's images, which stands for all while the sources are not prepared."""

Precision = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One way to train: what is trained, how, on how many GPUs, and the fullest micro-batch."""

    tokens: int
    """Tokens of a micro-batch: all its packs, full."""
    images: int
    """Distinct images of a micro-batch."""
    image_weight: int | None = None
    """Weight of these images together (`sft.models.family.Images.weight`), such as their tiles. None: 1 each."""
    trained_tokens: int
    """Positions of a micro-batch that reach the head."""
    mode: Literal["full", "lora", "qlora"] = "full"
    trainable: tuple[str, ...] | None = None
    """Groups of the recipe whose weights are trained. None: all of them in full training, the extra rows in LoRA."""
    lora_rank: int = 16
    lora_layers: tuple[str, ...] = ()
    """Linear layers that get an adapter, by names of the family (`ModelCost.lora_layers`); in LoRA only."""
    lora_dropout: float = 0.0
    optimizer: OptimizerName = "adamw"
    engine: EngineName = "ddp"
    gpus: int = 1
    checkpointing: float = 0.0
    """Share of the layers that recompute their activations in the backward pass."""
    encoded: bool = False
    """Whether the states of images come from the feature cache (`data.feature_cache`)."""
    accumulates: bool = True
    """Whether a step has several micro-batches, so that gradients are there while the next one runs."""
    precision: Precision = "bfloat16"
    """The type that matrix products are computed in."""

    def trains(self, group: str) -> bool:
        """Return whether the weights of a group are trained."""
        if self.trainable is not None:
            return group in self.trainable
        return self.mode == "full" or group == "extra_rows"

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number of the type that is computed in."""
        return 4 if self.precision == "float32" else 2

    @property
    def is_autocast(self) -> bool:
        """Whether autocast computes in half precision. Engines that shard hold half-precision weights instead."""
        return not ENGINES[self.engine].shards and self.compute_bytes == 2


class Cost(NamedTuple):
    """What a training step takes of each GPU."""

    bytes: dict[str, int]
    """Bytes by kind, at the moment when their sum is largest."""
    flop: int
    """Floating-point operations of a micro-batch, forward and backward, recomputation included."""

    @property
    def peak_bytes(self) -> int:
        """The most that is there at once."""
        return sum(self.bytes.values())


class ModelCost(Protocol):
    """What one model costs. It is computed from the model's config.json, without weights and without torch."""

    @property
    def parameters(self) -> int:
        """All parameters of the model."""

    def cost(self, setting: Setting) -> Cost:
        """Return memory and operations of a training step on each GPU."""

    def trained_parameters(self, setting: Setting) -> int:
        """Return how many parameters get a gradient, those of adapters included."""

    def lora_layers(self, targets: Collection[str]) -> tuple[str, ...]:
        """Return the linear layers that `model.lora.targets` names, for `Setting.lora_layers`."""

    def fullest_images(self, tokens: int, image_weight: int) -> tuple[int, int]:
        """Return the number and the weight of the distinct images of the costliest pack, for a pack of some tokens and
        a cap on the weight."""

    def image_tokens(self, width: int, height: int) -> int:
        """Return how many tokens an image of a size in pixels takes at least; 0 where it stands beside the text."""

    def feature_bytes(self, width: int, height: int) -> int:
        """Return the bytes that an image of a size in pixels takes in the feature cache."""


ReadModel: TypeAlias = Callable[..., ModelCost]
"""`read_model(path)` of a module `cost`: reads the config.json of a model folder or hub id. Raises UserError where
there is none or it is of another family. Where a family has settings of images, these are its second argument."""


def read_model(family: str, path: str, images: Mapping[str, Any] | None = None) -> ModelCost:
    """Return what the model at a path costs, with `images` as `model.images` of a recipe says.

    Raises:
        UserError: no costs are known of the family, or the config of the model cannot be read.
    """
    known = [module.name for module in iter_modules(cost.__path__) if module.ispkg]
    own = package_name(family)
    package = f"{cost.__name__}.{own}" if own in known else family
    try:
        read: ReadModel = import_module(f"{package}.cost").read_model
    except ModuleNotFoundError as error:
        if not f"{package}.cost.".startswith(f"{error.name}."):
            raise  # the module is there, and imports what is not
        raise UserError(
            f"model.family: plan knows no costs of {family!r} (known: {', '.join(known)}; a package of your own needs "
            "a module `cost`, see docs/planning.md)"
        ) from error
    return read(path, images) if images else read(path)


def model_and_settings(name: str, overrides: Sequence[str] = ()) -> tuple[ModelCost, Path, EvaluationConfig]:
    """Return the costs of the model of a RECIPE or MODEL, the folder of its tokenizer, and how it is evaluated.

    Raises:
        UserError: there is none of that name, or no costs are known of it.
    """
    if recipe := find_recipe(name, overrides) if overrides else recipe_of_model(name):
        model = read_model(recipe.model.family, base_of(recipe), recipe.model.image_settings)
        return model, base_path(recipe), recipe.evaluation
    path, families = str(find_model(name)), [module.name for module in iter_modules(cost.__path__) if module.ispkg]
    for family in families[:-1]:
        with suppress(UserError):
            return read_model(family, path), resolve(path), EvaluationConfig()
    return read_model(families[-1], path), resolve(path), EvaluationConfig()


def check_images_fit(recipe: Recipe) -> None:
    """Check that an image of a common size fits a pack, as far as the config of the model is at hand.

    Raises:
        UserError: hardly any image does.
    """
    length, model = recipe.data.sequence_length, recipe.model
    if length >= INLINE_LENGTH or model.family not in INLINE_FAMILIES:
        return
    tokens = 0
    with suppress(UserError):  # what is wrong with the model `prepare` says
        tokens = read_model(model.family, model.path, model.image_settings).image_tokens(*COMMON_SIZE)
    if tokens > length:
        raise UserError(
            f"data.sequence_length: {length} holds hardly an image, since one of 640 x 480 takes {tokens:,} tokens; "
            f"set {2 ** tokens.bit_length()} at least ({INLINE_LENGTH} if it is left out)"
        )
