"""What the toolkit needs to know of a kind of model, and what its forward over a packed batch returns."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from sft.recipe import GROUPS

if TYPE_CHECKING:
    import torch
    from numpy import uint8
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

    from sft.core.sample import EncodedSample, ImageRef


class ModelFamily(Protocol):
    """What the toolkit needs to know of a kind of model. A module is one."""

    CHAT_TEMPLATE: str
    """File name in chat_templates/."""
    ENDS: tuple[str, ...]
    """Tokens that end an answer, as far as a vocabulary has them."""
    NEVER_WRITTEN: tuple[str, ...]
    """Tokens that no answer may have."""

    def prepare_base(self, path: str | Path, output: Path) -> None:
        """Write a base that has every special token of the chat template, ready for any engine to load."""

    def load_tokenizer(self, path: str | Path) -> PreTrainedTokenizerFast:
        """Load and check the tokenizer."""

    def load_model(
        self,
        path: str | Path,
        *,
        trained: Collection[str] = GROUPS,
        frozen_dtype: torch.dtype = ...,
        quantised: bool = False,
        device: torch.device | str = "cpu",
    ) -> nn.Module:
        """Load with float32 weights, or frozen groups smaller; its `forward(batch=Batch)` returns a `PackedOutput`, and
        with `read_P=positions` the logits (P, V) there."""

    def group_of(self, name: str) -> str:
        """The group of `sft.recipe.GROUPS` that a parameter belongs to; of an adapter, that of its layer."""

    def lora_pattern(self, targets: Collection[str]) -> str:
        """A regular expression for the whole names of the linear layers that `model.lora.targets` names."""

    def select_trainable(self, model: nn.Module, groups: Collection[str] = GROUPS) -> tuple[str, ...]:
        """Make some groups and all adapters trainable; return the names of those that never get a gradient."""

    def save_model(
        self, model: nn.Module, directory: Path, dtype: torch.dtype, weights: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Write weights and config as a plain transformers folder. `weights`: those of a model that is spread."""

    def write_config(self, config: dict[str, Any], directory: Path, dtype: torch.dtype) -> None:
        """Write config.json for weights of `dtype`."""

    def weight_files(self, folder: Path) -> dict[str, str]:
        """The safetensors file of a model folder that holds each tensor."""

    def save_processor(self, tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig, directory: Path) -> None:
        """Write what transformers' `AutoProcessor` reads: the tokenizer, and how images become pixels."""

    def load_config(self, path: str | Path) -> PreTrainedConfig:
        """The config of a model, without its weights."""

    def num_rows(self, config: PreTrainedConfig) -> int:
        """Tokens of the vocabulary: base and extra rows."""

    def golden_ids(self, config: PreTrainedConfig) -> list[int] | None:
        """The ids of `sft.checks.model.CHAT` under the vocabulary of the released models; None for another."""

    def plain_logits(
        self, model: nn.Module, input_ids_T: Tensor, image_ids_T: Tensor, pixel_values_NCHW: Tensor
    ) -> Tensor:
        """Logits (T, V) of one sample by transformers' own forward and attention."""

    def encode_prompt(self, tokenizer: PreTrainedTokenizerFast, items: Sequence[str | ImageRef]) -> EncodedSample:
        """A prompt of texts and images as it stands, without roles; special tokens in a text are special."""

    def generation_inputs(
        self, prompts: Sequence[EncodedSample], pixels: Sequence[Sequence[NDArray[uint8]]], image_size: int
    ) -> dict[str, Tensor]:
        """What `generate` wants beside token ids and their mask, of prompts that are padded on the left."""

    def image_size(self, config: PreTrainedConfig) -> int:
        """Height and width in pixels that the vision tower takes."""

    def states_of_image(self, config: PreTrainedConfig) -> tuple[int, int]:
        """What an image is to the language model: how many states of which size."""

    def tower_settings(self, config: PreTrainedConfig) -> dict[str, Any]:
        """The part of a config on which it depends what is made of an image, as JSON."""

    def max_positions(self, config: PreTrainedConfig) -> int:
        """Longest sequence that the model has positions for."""

    def tokens_per_image(self, size: tuple[int, int]) -> int:
        """Text tokens that an image of this size costs."""

    def image_cost_in_tokens(self, config: PreTrainedConfig) -> float:
        """How much work an image is beside a text token; packs are dealt to ranks by it."""


class PackedOutput(NamedTuple):
    """What the forward over a packed micro-batch returns. P = trained positions."""

    loss: Tensor
    """(Summed cross entropy + z-loss) / trained tokens of the whole optimizer step."""
    token_losses_P: Tensor
    """Cross entropy of each trained position, float32, detached."""
    source_ids_P: Tensor
    """The mixture's source of each trained position."""
    logits_PV: Tensor | None
    """Logits of each trained position, float32; only in evaluation mode, they are large."""
