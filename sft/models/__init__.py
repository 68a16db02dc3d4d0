"""Models: how a chat becomes token ids, an image tiles, and a packed batch a loss. One folder a family of models.

Sample ─chat_template─> token ids        image ─image_transform─> tiles        Batch ─packed_model─> logits ─loss─> loss

family                    the seam: what a family offers
packed_model              the forward over packed batches that families share
chat_template             messages -> token ids, and which of them are trained
image_transform           image bytes -> tiles of pixels
grouped_attention         attention inside groups of tokens; shared_beginnings: what samples begin with, computed once
fused_layers              layers in fewer passes over memory; loss: cross entropy in float32
lora                      adapters, through PEFT
activation_checkpointing  which layers are computed again in the backward pass
model_folder              the safetensors files of a model folder, into memory and into a prepared base
preprocessor              what preprocessor_config.json of a folder says of images
family_folder             what folders of all families share: loaded, saved, their parameters by name
inline_model              what families whose images are part of the text share: images and the forward;
inline_folder             their folders, and how these cut images
plain_folder              what a saved folder has besides weights, so that transformers or PEFT alone open it
base_model                the base of a recipe or of adapters; loaded_model: a model, loaded for evaluation and chat
idefics/                  IDEFICS-1 (9b, 80b and their instruct models)
idefics2/                 Idefics2
idefics3/                 Idefics3, SmolVLM and SmolVLM2
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from importlib import import_module
from inspect import isfunction
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from sft.core.errors import UserError, nearest
from sft.core.shipped import resolve
from sft.models.family import Family, FamilyNames, Images, Text, Weights
from sft.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from sft.models.packed_model import PackedModel

_known: dict[str, Family] = {}
"""Families that were asked for, by the `model_type` of their models."""


def adapters_of(recipe: Recipe) -> Path | None:
    """Return the folder of adapters that `model.path` names, to be trained further; None where it names a model."""
    folder = resolve(recipe.model.path)
    return folder if (folder / "adapter_config.json").is_file() else None


def adapter_settings(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json of adapters, read without PEFT and torch.

    Raises:
        UserError: it is damaged, not of LoRA, or of a kind of LoRA that is not trained here.
    """
    file = folder / "adapter_config.json"
    try:
        settings = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: damaged, not the config of an adapter ({error})") from error
    if (kind := settings.get("peft_type")) != "LORA":
        raise UserError(f"{folder}: an adapter of kind {kind}; only LoRA can be loaded")
    for name in ("use_dora", "use_rslora", "use_qalora", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if settings.get(name):
            raise UserError(f"{file}: has {name}, which is not trained here; load it with PEFT")
    return settings


def base_of(recipe: Recipe) -> str:
    """Return the model that a recipe stands on: `model.path`, or the base of the adapters there."""
    if adapters := adapters_of(recipe):
        from sft.models.base_model import base_of_adapters  # it takes this package

        return base_of_adapters(adapters)
    return recipe.model.path


def family_names() -> list[str]:
    """Return the names of the families of this tree."""
    return [module.name for module in iter_modules(__path__) if module.ispkg]


def get_family(name: str) -> Family:
    """Return a family: one of this tree, or the dotted name of a package outside it.

    Raises:
        UserError: there is no such family, or it lacks something.
    """
    family: Family | object = getattr(_module(name, "family"), "FAMILY", None)
    if not isinstance(family, Family):
        raise UserError(f"model.family: {name}.family has no FAMILY, which is a sft.models.family.Family")
    _check_methods(name, family.text, Text)
    _check_methods(name, family.weights, Weights)
    if isinstance(family.images, type):  # else a function makes them
        _check_methods(name, family.images, Images)
    _known[family.name] = family
    return family


def _check_methods(family: str, part: object, kind: type) -> None:
    methods = [method for method, value in vars(kind).items() if isfunction(value) and not method.startswith("_")]
    if lacking := [method for method in methods if not hasattr(part, method)]:
        raise UserError(
            f"model.family: {kind.__name__} of {family} has no {', '.join(lacking)}; see sft/models/family.py"
        )


def names_of_family(name: str) -> FamilyNames:
    """Return the names that a recipe may use of a family, without importing torch.

    Raises:
        UserError: there is no such family, or it lacks some.
    """
    names = _module(name, "names")
    expected = ("GROUPS", "LORA_TARGETS", "ENCODER_GROUPS")
    if lacking := [one for one in expected if not hasattr(names, one)]:
        raise UserError(f"model.family: {name}.names has no {', '.join(lacking)}; see sft/models/family.py")
    images = getattr(names, "IMAGE_SETTINGS", ())
    return FamilyNames(names.GROUPS, names.LORA_TARGETS, names.ENCODER_GROUPS, images)


def package_name(family: str) -> str:
    """Return the folder of this tree that has models of a family, which may be called by the `model_type` of any of
    them; the name of another family as it is."""
    for known in family_names():
        names = import_module(f"{__name__}.{known}.names")
        if family in (known, *getattr(names, "MODEL_TYPES", ())):
            return known
    return family


def _module(family: str, name: str) -> Any:
    own = package_name(family)
    package = f"{__name__}.{own}" if own in family_names() else family
    try:
        return import_module(f"{package}.{name}")
    except ModuleNotFoundError as error:
        if not f"{package}.{name}.".startswith(f"{error.name}."):
            raise  # the family is there, and imports what is not
        if error.name == f"{package}.{name}":
            raise UserError(f"model.family: {family} has no module {name!r}; see sft/models/family.py") from error
        known = family_names()
        raise UserError(
            f"model.family: unknown family {family!r}{nearest(family, known)} (known: {', '.join(known)}; or give the "
            "dotted name of a package of yours)"
        ) from error


def check_names(recipe: Recipe) -> None:
    """Check what a recipe says of groups of parameters and adapter targets against the names of its family.

    Raises:
        UserError: the family is unknown, names are none of the family's, or `data.feature_cache` would keep the states
        of images from parts of the model that are trained.
    """
    if problems := list(_wrong_names(recipe)):
        raise UserError(*problems)


def _wrong_names(recipe: Recipe) -> Iterator[str]:
    model, names = recipe.model, names_of_family(recipe.model.family)
    # Adapters always come with the rows of added tokens (`ModelConfig`), of which a family may have none.
    added = {"extra_rows"} - names.groups.keys() if model.lora else set()
    trainable = [group for group in model.trainable or () if group not in added]
    yield from _unknown("model.trainable", trainable, names.groups, model.family)
    yield from _unknown("training.groups", recipe.training.groups, names.groups, model.family)
    if model.lora:
        yield from _unknown("model.lora.targets", model.lora.targets, names.lora_targets, model.family)
    yield from _unknown("model.images", model.image_settings, dict.fromkeys(names.image_settings, ""), model.family)
    if recipe.data.augment == "crop" and "split" in names.image_settings and model.image_settings.get("split", True):
        yield "data.augment: crop changes the tokens of a split image; set none, or model.images: {split: false}"
    trained = names.groups if model.trained_groups is None else model.trained_groups
    changing = [group for group in names.encoder_groups if group in trained]
    if recipe.data.feature_cache and changing:
        yield (
            f"data.feature_cache keeps what does not change, and {changing[0]} is trained; leave it out of "
            "model.trainable and model.lora.targets, or the cache"
        )


def _unknown(key: str, names: Iterable[str], known: Mapping[str, str], family: str) -> Iterator[str]:
    for name in names:
        if name not in known:
            yield f"{key}: {family} has no {name!r}{nearest(name, known)} (known: {', '.join(known) or 'none'})"


def read_config(path: str | Path, model_types: Collection[str] = ()) -> dict[str, Any]:
    """Return config.json of a model folder or hub id.

    Raises:
        UserError: there is none, it is damaged, or its `model_type` is none of `model_types`, if any are given.
    """
    from transformers import PreTrainedConfig

    missing = f"{path}: no config.json found; expected a model folder or a hub id"
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        raise UserError(missing)  # transformers would return an empty config
    try:
        config = dict(PreTrainedConfig.get_config_dict(path)[0])
    except (OSError, ValueError, AttributeError, TypeError) as error:
        damaged = f"{path}: config.json is damaged, not a JSON object"
        raise UserError(damaged if (Path(path) / "config.json").exists() else missing) from error
    if model_types and (found := config.get("model_type")) not in model_types:
        raise UserError(f"{path}: model_type is {found!r}; model.family loads {' or '.join(map(repr, model_types))}")
    return config


def family_at(path: str | Path) -> Family:
    """Return the family of a model folder or hub id, by the `model_type` of its config.json. A checkpoint of a family
    outside the tree names it in its recipe.yaml.

    Raises:
        UserError: there is no config.json, or no such family.
    """
    kind = str(read_config(path).get("model_type"))
    if kind in _known or package_name(kind) in family_names():
        return _of_type(kind)
    recipe = Path(path) / "recipe.yaml"
    if recipe.is_file():
        return get_family(load_recipe(recipe).model.family)
    raise UserError(f"{path}: model_type is {kind!r}, which is no known family ({', '.join(family_names())})")


def family_of(model: PackedModel) -> Family:
    """Return the family of a model that is loaded."""
    return _of_type(str(model.config.model_type))


def _of_type(model_type: str) -> Family:
    return _known.get(model_type) or get_family(model_type)
