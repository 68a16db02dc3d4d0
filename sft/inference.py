"""A model ready to be asked: weights, tokenizer, template and precision."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from sft.bases import prepare_base
from sft.chat_template import ChatTemplate, load_chat_template
from sft.errors import UserError
from sft.lora import is_adapter_folder, load_adapters, read_config
from sft.models import ModelFamily, get_family
from sft.precision import choose_precision, device
from sft.recipe import load_recipe
from sft.shipped import shipped_root


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model in evaluation mode on its device."""

    model: nn.Module
    family: ModelFamily
    path: Path | str
    """Where the weights came from; the base of adapters."""
    image_size: int
    autocast: bool
    """Whether to compute in bfloat16."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of the model."""
        return self.family.load_tokenizer(self.path)

    @cached_property
    def template(self) -> ChatTemplate:
        """The family's chat template.

        Raises:
            UserError: the tokenizer lacks what it prints: a base as it was released, which takes no conversation.
        """
        return load_template(self.family, self.path)


def load_template(family: ModelFamily, model_path: str | Path) -> ChatTemplate:
    """The family's chat template bound to a model's tokenizer; adapters have that of their base."""
    source = load_chat_template(shipped_root() / "chat_templates" / family.CHAT_TEMPLATE)
    adapters = Path(model_path) if is_adapter_folder(model_path) else None
    tokenizer = family.load_tokenizer(find_base(adapters) if adapters else model_path)
    try:
        return ChatTemplate(source, tokenizer)
    except ValueError as error:
        raise UserError(f"{model_path}: {error}; a base gets it by `idefics-sft prepare`") from error


def load_for_inference(
    path: str | Path, *, family: str = "idefics", precision: str = "auto", load_in_4bit: bool = False
) -> Loaded:
    """Load a model folder, a folder of adapters with the base they belong to, or a hub id.

    `load_in_4bit` stores the weights as QLoRA training does. Where a GPU has no bfloat16, it is computed in float32.

    Raises:
        UserError: it is not a model of the family, or its base is missing.
    """
    kind = get_family(family)
    adapters = Path(path) if is_adapter_folder(path) else None
    autocast = choose_precision(precision, device()) == "bfloat16"
    base = find_base(adapters) if adapters else path
    # What autocast would round in every forward is rounded once, in half the memory.
    dtype = torch.bfloat16 if autocast else torch.float32
    model = kind.load_model(base, trained=(), frozen_dtype=dtype, quantised=load_in_4bit, device=device())
    if adapters:
        load_adapters(model, adapters)
    return Loaded(
        model=(model if load_in_4bit else model.to(device())).eval(),
        family=kind,
        path=base,
        image_size=kind.image_size(model.config),
        autocast=autocast,
    )


def find_base(adapters: Path) -> Path:
    """The base model of a folder of adapters: where their config says, else that of the recipe beside them.

    Raises:
        UserError: it is in neither place.
    """
    named = read_config(adapters).base_model_name_or_path or ""
    if (Path(named) / "config.json").is_file():
        return Path(named)
    recipe = adapters / "recipe.yaml"
    if not recipe.is_file():
        raise UserError(f"{adapters}: its base model {named or '(not named)'} is not there, nor a recipe that makes it")
    try:
        return prepare_base(load_recipe(recipe))
    except UserError as error:
        raise UserError(f"{adapters}: its base model {named} is not there, and the recipe's: {error}") from error
