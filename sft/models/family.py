"""The seam between the toolkit and a kind of model: what a family of models offers.

A family is a package, found by its name: a folder of `sft/models/` called like `model_type` in the config.json of its
models, or the dotted name of a package outside the tree. It holds two modules:

    names    GROUPS, LORA_TARGETS and ENCODER_GROUPS, names that a recipe may use; without torch and transformers.
             IMAGE_SETTINGS and MODEL_TYPES, where there are any: keys of `model.images`, further `model_type`s
    family   FAMILY, a `Family`

There are two kinds. In IDEFICS-1 images stand beside the text, which looks at them through cross-attention. In
Idefics2, Idefics3 and SmolVLM images are part of the text: their states stand in the places of image tokens, so an
image has a length in tokens, which depends on how it is cut into tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # so that names can be checked without torch
    import torch
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

    from sft.core.sample import EncodedSample, ImageRef, Tiling
    from sft.models.packed_model import PackedModel

Pixels: TypeAlias = NDArray[np.uint8]
"""An image, (H, W, C)."""
Tiles: TypeAlias = NDArray[np.uint8]
"""The tiles of an image, (K, C, H, W)."""


class Text(Protocol):
    """The vocabulary of a family, and what its models may write."""

    ENDS: tuple[str, ...]
    """Tokens that end an answer, as far as a vocabulary has them."""
    NEVER_WRITTEN: tuple[str, ...]
    """Tokens that no answer may have."""

    def load_tokenizer(self, path: str | Path) -> PreTrainedTokenizerFast:
        """Load the tokenizer of a model folder or hub id, and check it.

        Raises:
            UserError: there is none, or it is not one of this family.
        """

    def chat_template(self, tokenizer: PreTrainedTokenizerFast) -> str:
        """Return the chat template of a vocabulary: a file name in chat_templates/, or the path of one outside the
        tree."""

    def num_rows(self, config: PreTrainedConfig) -> int:
        """Return how many tokens the vocabulary has, base and extra rows."""

    def max_positions(self, config: PreTrainedConfig) -> int:
        """Return the length of the longest sequence that the model has positions for."""

    def golden_ids(self, config: PreTrainedConfig) -> list[int] | None:
        """Return the ids of `sft.checks.subject.CHAT` under the vocabulary of the released models; None for another."""

    def wrong_with_tokens(self, tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], text: str) -> str:
        """Return what is wrong with the ids of a rendered chat by the rules that every vocabulary of the family
        follows; an empty text if nothing is."""

    def encode_prompt(
        self, tokenizer: PreTrainedTokenizerFast, images: Images, items: Sequence[str | ImageRef]
    ) -> EncodedSample:
        """Encode a prompt of texts and images as it stands, without roles; special tokens in a text are special."""


class Images(Protocol):
    """How the images of one model become tiles and tokens. It is small and can be sent to another process."""

    @property
    def one_tile(self) -> Tiling:
        """The tiling of an image that is one tile; a dummy image has it."""

    @property
    def depends_on_size(self) -> bool:
        """Whether images of different sizes have different tilings. If not, no image is opened to learn its size."""

    @property
    def shares_border(self) -> bool:
        """Whether the last token of an image is the first one of an image that follows directly."""

    @property
    def state_token_id(self) -> int | None:
        """The token in whose places the states of images stand; None in a family whose text looks at images."""

    @property
    def cost_in_tokens(self) -> float:
        """The work of encoding an image of weight 1, in text tokens of the language model."""

    def tiling(self, width: int, height: int) -> Tiling:
        """Return how an image of a size in pixels is cut."""

    def cut(self, pixels: Pixels, tiling: Tiling) -> Tiles:
        """Resize an image and cut it into the tiles of its tiling."""

    def token_ids(self, tokenizer: PreTrainedTokenizerFast, tiling: Tiling) -> list[int]:
        """Return the token ids that take the place of the chat template's `<image>`."""

    @property
    def state_size(self) -> int:
        """Numbers of a state."""

    def num_states(self, tiling: Tiling) -> int:
        """Return how many states the language model is given of an image."""

    def weight(self, tiling: Tiling) -> int:
        """Return what an image counts towards the cap of a pack: its tiles, or a finer measure of the same."""

    def settings(self) -> dict[str, Any]:
        """Return the settings, as JSON, on which the token ids of an image depend; empty if they depend on none."""


class Weights(Protocol):
    """Loading and saving the models of a family, and their parameters by name."""

    def prepare_base(self, path: str | Path, output: Path, images: Mapping[str, Any]) -> None:
        """Write a base that has every special token of the chat template, ready for any engine to load, and that cuts
        images as `images` says: those of `FamilyNames.image_settings` that a recipe gives."""

    def load_config(self, path: str | Path) -> PreTrainedConfig:
        """Load the config of a model folder or hub id, without its weights."""

    def load_model(
        self,
        path: str | Path,
        *,
        trained: Collection[str] | None = None,
        frozen_dtype: torch.dtype = ...,
        quantised: bool = False,
        device: torch.device | str = "cpu",
    ) -> PackedModel:
        """Load a model with float32 weights; those of groups that are not `trained` (None: all are) in `frozen_dtype`,
        or in 4 bits."""

    def save_model(
        self, model: PackedModel, directory: Path, dtype: torch.dtype, weights: dict[str, Tensor] | None = None
    ) -> None:
        """Write weights and config as a plain transformers folder. `weights` are given for a model that is sharded."""

    def write_config(self, config: dict[str, Any], directory: Path, dtype: torch.dtype) -> None:
        """Write config.json for weights of `dtype`."""

    def weight_files(self, folder: Path) -> dict[str, str]:
        """Return the name of the safetensors file of a model folder that holds each tensor."""

    def save_processor(self, tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig, directory: Path) -> None:
        """Write what transformers' `AutoProcessor` reads: the tokenizer, and how images become pixels."""

    def encoder_settings(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Return the part of a config, as JSON, that the states of an image depend on."""

    def group_of(self, name: str) -> str:
        """Return the group that a parameter belongs to; of an adapter, that of its layer."""

    def is_decayed(self, name: str) -> bool:
        """Return whether weight decay acts on a parameter."""

    def lora_pattern(self, targets: Collection[str]) -> str:
        """Return a regular expression for the whole names of the linear layers that `model.lora.targets` names."""

    def select_trainable(self, model: PackedModel, groups: Collection[str] | None = None) -> tuple[str, ...]:
        """Make some groups (None: all) and all adapters trainable; return the names of those that never get a
        gradient."""


@dataclass(frozen=True)
class Family:
    """A kind of model. The forward over packed batches is that of the models it loads (`PackedModel`)."""

    name: str
    text: Text
    images: Callable[[Any], Images]
    """Makes the `Images` of a model from its config."""
    weights: Weights


class FamilyNames(NamedTuple):
    """The names of a family that a recipe may use, each with what it means."""

    groups: Mapping[str, str]
    """Groups of parameters, which are trained or frozen together."""
    lora_targets: Mapping[str, str]
    """Linear layers that may get adapters."""
    encoder_groups: tuple[str, ...]
    """Groups that the states of an image depend on."""
    image_settings: tuple[str, ...] = ()
    """Keys of `model.images`."""
