"""A model ready to be asked: weights, tokenizer, template and precision."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from sft.core.errors import UserError
from sft.core.precision import choose_precision, device
from sft.core.shipped import is_local, resolve, shipped_root
from sft.models import family_at, get_family
from sft.models.base_model import base_name, base_of_adapters, find_prepared_base, prepare_in_cache, recipe_of_adapters
from sft.models.chat_template import ChatTemplate, load_chat_template
from sft.models.family import Family, Images
from sft.models.lora import is_adapter_folder, load_adapters, remove_adapters
from sft.models.packed_model import PackedModel


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model in evaluation mode on its device."""

    model: PackedModel
    family: Family
    path: Path | str
    """Where the weights came from; the base of adapters."""
    max_positions: int
    """Longest sequence that the model has positions for."""
    autocast: bool
    """Whether to compute in bfloat16."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of the model."""
        return self.family.text.load_tokenizer(self.path)

    @cached_property
    def images(self) -> Images:
        """How images are cut for the model."""
        return self.family.images(self.model.config)

    @cached_property
    def template(self) -> ChatTemplate:
        """The family's chat template.

        Raises:
            UserError: the tokenizer lacks what it prints: a base as it was released, which takes no conversation.
        """
        return load_template(self.family, self.path)


Load = Callable[[str | Path], Loaded]
"""Loads the model at a path."""


def load_template(family: Family, model_path: str | Path) -> ChatTemplate:
    """Return the family's chat template bound to a model's tokenizer and images; adapters have those of their base."""
    base = find_base(Path(model_path)) if is_adapter_folder(model_path) else model_path
    images, tokenizer = family.images(family.weights.load_config(base)), family.text.load_tokenizer(base)
    source = load_chat_template(shipped_root() / "chat_templates" / family.text.chat_template(tokenizer))
    try:
        return ChatTemplate(source, tokenizer, images)
    except ValueError as error:
        raise UserError(
            f"{model_path}: {error}; a base gets it by `idefics-sft prepare RECIPE`; "
            "then name it as RUN@base, or its folder in `bases` of data.store"
        ) from error


def find_family(model_path: str | Path) -> Family:
    """Return the family of a model folder, a folder of adapters or a hub id.

    Raises:
        UserError: it is of none, or its base is missing.
    """
    return family_at(find_base(Path(model_path)) if is_adapter_folder(model_path) else model_path)


def load_for_inference(path: str | Path, *, precision: str = "auto", load_in_4bit: bool = False) -> Loaded:
    """Load a model folder, a folder of adapters with the base they belong to, or a hub id.

    `load_in_4bit` stores the weights as QLoRA training does. Where a GPU has no bfloat16, it is computed in float32.

    Raises:
        UserError: it is not a model of a known family, or its base is missing.
    """
    adapters = Path(path) if is_adapter_folder(path) else None
    autocast = choose_precision(precision, device()) == "bfloat16"
    base = find_base(adapters) if adapters else path
    family = family_at(base)
    # What autocast would round in every forward is rounded once, in half the memory.
    dtype = torch.bfloat16 if autocast else torch.float32
    model = family.weights.load_model(base, trained=(), frozen_dtype=dtype, quantised=load_in_4bit, device=device())
    if adapters:
        load_adapters(model, adapters)
    return Loaded(
        model=(model if load_in_4bit else model.to(device())).eval(),
        family=family,
        path=base,
        max_positions=family.text.max_positions(model.config),
        autocast=autocast,
    )


@contextmanager
def loaded_in_turn() -> Iterator[Load]:
    """Models for inference one after another, each in the place of the one before it, which may not be used any more.

    Adapters of one base are swapped on it, so that the base is loaded once for all checkpoints of a run: 18 GB for
    idefics-9b, beside some hundred megabytes of adapters.
    """
    turn = _Turn()
    try:
        yield turn.load
    finally:
        turn.let_go()


class _Turn:
    """The base that is in memory, and what the adapters on it took the place of."""

    def __init__(self) -> None:
        self._base: Path | None = None
        self._loaded: Loaded | None = None
        self._replaced: dict[str, torch.Tensor] | None = None

    def load(self, path: str | Path) -> Loaded:
        """
        Raises:
            UserError: see `load_for_inference`.
        """
        if not is_adapter_folder(path):
            self.let_go()
            return load_for_inference(path)
        base = find_base(Path(path)).resolve()
        if self._loaded is None or base != self._base:
            self.let_go()
            self._base, self._loaded = base, load_for_inference(base)
        if self._replaced is not None:
            remove_adapters(self._loaded.model, self._replaced)
            self._replaced = None
        self._replaced = load_adapters(self._loaded.model, Path(path))
        return self._loaded

    def let_go(self) -> None:
        """Free the memory, also of what refers to itself."""
        self._base = self._loaded = self._replaced = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def find_base(adapters: Path) -> Path:
    """Return the base model of a folder of adapters: the folder that they name if it takes conversations as it is, else
    its prepared copy. Nothing is written but in the user's cache.

    Raises:
        UserError: it is not here, and cannot be made.
    """
    name, recipe = base_of_adapters(adapters), recipe_of_adapters(adapters)
    folder = resolve(name) if is_local(name) else name
    try:
        family = get_family(recipe.model.family) if recipe else family_at(folder)
        with suppress(UserError):
            if isinstance(folder, Path) and load_template(family, folder):
                return folder
        if recipe and name in (recipe.model.path, base_name(recipe)):
            return find_prepared_base(recipe)
        return prepare_in_cache(name, family, recipe.model.image_settings if recipe else {})
    except UserError as error:
        raise UserError(f"{adapters}: its base model {name}: {error}") from error
