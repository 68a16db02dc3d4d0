"""Images whose states are part of the text: what families share of `sft.models.family.Images`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from sft.core.sample import Tiling


@dataclass(frozen=True)
class InlineImages(ABC):
    """The images of a model. Its config has what preprocessor_config.json says (`InlineFolder.load_config`)."""

    config: PreTrainedConfig

    @property
    def state_token_id(self) -> int:
        """The id of `<image>`, in whose places the states stand."""
        return int(self.config.image_token_id)

    @property
    def state_size(self) -> int:
        """The width of the language model."""
        return int(self.config.text_config.hidden_size)

    @property
    @abstractmethod
    def states_per_tile(self) -> int:
        """States that the connector makes of the patches of a tile."""

    def num_states(self, tiling: Tiling) -> int:
        """Return how many states an image has."""
        return tiling.num_tiles * self.states_per_tile

    @abstractmethod
    def preprocessor(self) -> dict[str, Any]:
        """Return what preprocessor_config.json says of the sizes of images and of the kernel that resizes them."""
