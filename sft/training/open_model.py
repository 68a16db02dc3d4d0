"""The model as a recipe trains it: loaded, checked, and with the groups chosen that are trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sft.checks.before_training import before_training
from sft.core.errors import UserError
from sft.core.precision import choose_precision, device, torch_dtype
from sft.models import adapters_of, get_family
from sft.models.base_model import base_name
from sft.models.chat_template import ChatTemplate
from sft.models.family import Family
from sft.models.loaded_model import load_template
from sft.models.lora import add_adapters, continue_adapters
from sft.models.packed_model import PackedModel
from sft.recipe import Recipe
from sft.training.metrics import Log
from sft.training.optimizer import trained_parts, trained_table
from sft.training.out_of_memory import explain_out_of_memory


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model that is about to be trained."""

    family: Family
    model: PackedModel
    template: ChatTemplate


def precision_of(recipe: Recipe) -> str:
    """Return the precision that a recipe is trained in on this machine."""
    return choose_precision(recipe.training.precision, device())


def open_model(recipe: Recipe, base: Path, log: Log) -> OpenedModel:
    """Load the prepared base, seed all random generators, and check the model by one small forward. Raise UserError
    where the pack is too long for the model, or a check finds the user's input wrong; RunError where a check finds this
    machine wrong, or there is not enough memory."""
    from transformers import set_seed

    family = get_family(recipe.model.family)
    set_seed(recipe.seed)
    with explain_out_of_memory(recipe, lambda: recipe.model.path):
        model = load_for_training(recipe, family, base)
    _check_positions(recipe, family.text.max_positions(model.config))
    template = load_template(family, base)
    for warning in before_training(recipe, family, model, template, Path(recipe.output_dir)):
        log(f"warning: {warning}")
    return OpenedModel(family=family, model=model, template=template)


def choose_trained(recipe: Recipe, opened: OpenedModel, log: Log) -> None:
    """Freeze everything but the groups that the recipe trains, and log the table of what is trained.

    Raises:
        UserError: the recipe has settings of a group that this model has nothing of.
    """
    frozen = opened.family.weights.select_trainable(opened.model, recipe.model.trainable)
    parts = trained_parts(opened.model, recipe.training, opened.family.weights)
    known = [part.group for part in parts]
    if lacking := sorted(recipe.training.groups.keys() - known):
        raise UserError(f"training.groups: {lacking[0]} has no weights of its own here ({', '.join(known)} have)")
    log(trained_table(parts))
    if frozen:
        log("frozen, since no gradient ever reaches them:\n" + "\n".join(f"  {name}" for name in frozen))


def load_for_training(recipe: Recipe, family: Family, base: Path) -> PackedModel:
    """Load the base as the recipe's mode trains it: trained groups in float32, frozen ones in the precision that is
    computed in or in 4 bits, with adapters where the mode has them, fresh ones or those that `model.path` names. Raise
    UserError where this machine lacks training.precision, the model lacks the layers that adapters are for, or the
    recipe does not fit the adapters that training goes on from."""
    settings, precision = recipe.model, precision_of(recipe)
    if settings.lora is None and precision == "float16":
        precision = "float32"  # frozen weights are a part of the snapshot, and would be rounded twice
    model = family.weights.load_model(
        base,
        trained=settings.trainable,
        frozen_dtype=torch_dtype(precision),
        quantised=settings.mode == "qlora",
        device=device(),
    )
    if settings.lora:
        add_adapters(model, family.weights.lora_pattern(settings.lora.targets), settings.lora, base_name(recipe))
        if adapters := adapters_of(recipe):
            family.weights.select_trainable(model, settings.trainable)
            continue_adapters(model, adapters, family.weights.group_of)
    return model


def _check_positions(recipe: Recipe, max_positions: int) -> None:
    """Raise UserError where samples of a pack see each other, and the pack does not fit the model's positions."""
    length = recipe.data.sequence_length
    if not recipe.data.pack_isolation and length > max_positions:
        pack = f"without pack_isolation a pack has {length} tokens"
        raise UserError(f"data.sequence_length: {pack}, the model has {max_positions} positions")
