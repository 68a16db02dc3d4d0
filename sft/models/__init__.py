"""Model families. A family is a module of this package that offers what `ModelFamily` lists, found by its name."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Protocol

from sft.errors import UserError, nearest

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast


class ModelFamily(Protocol):
    """What the toolkit needs to know of a kind of model. A module is one."""

    CHAT_TEMPLATE: str
    """File name in chat_templates/."""

    def prepare_base(self, path: str | Path, output: Path) -> None:
        """Write a base that has every special token of the chat template, ready for any engine to load."""

    def load_tokenizer(self, path: str | Path) -> PreTrainedTokenizerFast:
        """Load and check the tokenizer."""

    def load_model(self, path: str | Path) -> nn.Module:
        """Load with float32 weights; its `forward(batch=Batch)` returns a `PackedOutput`, and with `read_P=positions`
        the logits (P, V) there."""

    def select_trainable(self, model: nn.Module) -> tuple[str, ...]:
        """Unfreeze everything that can be trained; return the names of parameters that never get a gradient."""

    def save_model(self, model: nn.Module, directory: Path, dtype: torch.dtype) -> None:
        """Write weights and config as a plain transformers folder."""

    def image_size(self, model: nn.Module) -> int:
        """Height and width in pixels that the vision tower takes."""

    def max_positions(self, model: nn.Module) -> int:
        """Longest sequence that the model has positions for."""

    def tokens_per_image(self, size: tuple[int, int]) -> int:
        """Text tokens that an image of this size costs."""

    def image_cost_in_tokens(self, config: PreTrainedConfig) -> float:
        """How much work an image is beside a text token; packs are dealt to ranks by it."""


def get_family(name: str) -> ModelFamily:
    """The family called `name`.

    Raises:
        UserError: there is no such family.
    """
    known = [module.name for module in iter_modules(__path__)]
    if name not in known:
        raise UserError(f"model.family: unknown family {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    return import_module(f"{__name__}.{name}")
