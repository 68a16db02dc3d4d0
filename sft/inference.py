"""A model ready to be asked: weights, template and precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sft.chat_template import ChatTemplate, load_chat_template
from sft.errors import UserError
from sft.models import ModelFamily, get_family
from sft.precision import choose_precision, device
from sft.shipped import shipped_root


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model in evaluation mode on its device."""

    model: nn.Module
    template: ChatTemplate
    image_size: int
    autocast: bool
    """Whether to compute in bfloat16."""


def load_template(family: ModelFamily, model_path: str | Path) -> ChatTemplate:
    """The family's chat template bound to a model's tokenizer."""
    source = load_chat_template(shipped_root() / "chat_templates" / family.CHAT_TEMPLATE)
    tokenizer = family.load_tokenizer(model_path)
    try:
        return ChatTemplate(source, tokenizer)
    except ValueError as error:
        raise UserError(f"{model_path}: {error}; a base gets it by `idefics-sft prepare`") from error


def load_for_inference(path: str | Path, *, family: str = "idefics", precision: str = "auto") -> Loaded:
    """Load a model folder or hub id.

    Raises:
        UserError: it is not a model of the family, or its tokenizer lacks what the chat template prints.
    """
    kind = get_family(family)
    model = kind.load_model(path).to(device()).eval()
    return Loaded(
        model=model,
        template=load_template(kind, path),
        image_size=kind.image_size(model.config),
        autocast=choose_precision(precision, device()) == "bfloat16",
    )
