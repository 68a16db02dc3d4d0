"""What families whose images are part of the text share of `Images`, and of the forward over packed micro-batches:
tower, connector, states in their places, and transformers' own language model with attention by groups.

transformers' forward cannot be given packs: with positions alone samples see each other, unless the cache is off, and
SmolVLM does not turn it off under activation checkpointing (differences of 0.6 in the logits).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Idefics3ForConditionalGeneration, PreTrainedConfig
from transformers.models.idefics2 import modeling_idefics2 as idefics2
from transformers.models.idefics3 import modeling_idefics3 as idefics3
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.smolvlm import modeling_smolvlm as smolvlm

from sft.core.sample import Batch, EncodedSample, Tiling
from sft.models.family import Tiles
from sft.models.fused_layers import Attention, DecoderLayer, Mlp, RmsNorm, TowerLayer, replace_layers, rotary_of
from sft.models.packed_model import PackedModel, sample_groups
from sft.models.shared_beginnings import share_beginnings

FUSED = {
    llama.LlamaRMSNorm: RmsNorm,
    llama.LlamaMLP: Mlp,
    llama.LlamaAttention: Attention,
    llama.LlamaDecoderLayer: DecoderLayer,
    mistral.MistralRMSNorm: RmsNorm,
    mistral.MistralMLP: Mlp,
    mistral.MistralAttention: Attention,
    mistral.MistralDecoderLayer: DecoderLayer,
    idefics2.Idefics2EncoderLayer: TowerLayer,
    idefics3.Idefics3EncoderLayer: TowerLayer,
    smolvlm.SmolVLMEncoderLayer: TowerLayer,
}


def normalise(pixels_KCHW: Tensor) -> Tensor:
    """Return uint8 pixels as float32 with mean and deviation 0.5, as SigLIP towers are trained."""
    return pixels_KCHW.to(torch.float32, copy=True).div_(255).sub_(0.5).div_(0.5)


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


class InlineModel(PackedModel):
    """What all families add to the classes of transformers. Each adds `encode_images` itself."""

    tower_attention = "sdpa"
    """How the tower attends in packs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        replace_layers(self, FUSED)

    @functools.wraps(Idefics3ForConditionalGeneration.forward)  # generate() reads the signature, which all have
    def forward(  # type: ignore[override]
        self, *args: Any, batch: Batch | None = None, read_P: Tensor | None = None, z_loss: float = 0.0, **kwargs: Any
    ) -> Any:
        """Compute what `PackedModel` says of `model(...)`."""
        return super().forward(*args, **kwargs) if batch is None else self.packed_forward(batch, read_P, z_loss)

    def enable_input_require_grads(self) -> None:
        """Do nothing: transformers would send gradients through a frozen tower under activation checkpointing, which
        doubles the work of a step. Without reentrant checkpoints no input needs a gradient."""

    def hidden_states(self, batch: Batch, read_P: Tensor) -> Tensor:
        """Return the final hidden states (P, D) at some positions."""
        batch, read_P = share_beginnings(batch, read_P)
        embeds_TD = self.model.text_model.get_input_embeddings()(batch.input_ids_T)
        states_RE = self.image_states(batch)
        if states_RE is not None:
            (places,) = torch.where(batch.state_ids_T >= 0)
            states_RE = states_RE.to(embeds_TD.dtype)
            embeds_TD = embeds_TD.index_put((places,), states_RE[batch.state_ids_T[places]])
            embeds_TD = embeds_TD + 0 * states_RE.sum()  # those of a dummy, which stand nowhere, get gradients too
        return self.decode(embeds_TD, batch, read_P)

    def decode(self, embeds_TD: Tensor, batch: Batch, read_P: Tensor) -> Tensor:
        """Return what the language model makes of a row of embeddings, (P, D) at some positions."""
        text = self.model.text_model
        shared = {"rotary": rotary_of(text.rotary_emb, batch.position_ids_T, embeds_TD), "groups": sample_groups(batch)}
        hidden_1TD, (*layers, last) = embeds_TD[None], text.layers
        for layer in layers:
            hidden_1TD = layer(hidden_1TD, **shared)
        return self.normed(text.norm, last(hidden_1TD, **shared, read_P=read_P))

    def plain_logits(self, batch: Batch, segment: int) -> Tensor:
        """Return the logits (T, V) of one segment by transformers' own forward and attention."""
        own_T = batch.segment_ids_T == segment
        first_state = {start: image for image, start in enumerate(accumulate(batch.num_states, initial=0))}
        shown = [first_state[state] for state in batch.state_ids_T[own_T].tolist() if state in first_state]
        by_image = dict(batch.tiles_by_image())
        tiles = [by_image[image].cpu().numpy() for image in shown]
        pixels = self.generation_inputs((), [tiles], [[batch.tilings[image] for image in shown]])
        self._attend_by("sdpa", "sdpa")
        try:
            pixels = {name: tensor.to(own_T.device) for name, tensor in pixels.items()}
            return torch.as_tensor(self(input_ids=batch.input_ids_T[own_T][None], use_cache=False, **pixels).logits[0])
        finally:
            self.use_grouped_attention()

    def generation_inputs(
        self,
        prompts: Sequence[EncodedSample],
        tiles: Sequence[Sequence[Tiles]],
        tilings: Sequence[Sequence[Tiling]],
    ) -> dict[str, Tensor]:
        """Return the tiles of each prompt (B, K, C, H, W), zeros where it has fewer, which transformers leaves out, and
        which of their pixels are shown."""
        sizes = [[size for tiling in own for size in tiling.tile_sizes] for own in tilings]
        laid = [torch.tensor(image) for images in tiles for image in images]
        if not laid:
            return {}
        pixels_KCHW = normalise(in_one(laid))
        is_shown_BKHW = torch.zeros(len(sizes), max(map(len, sizes)), *pixels_KCHW.shape[2:], dtype=torch.bool)
        pixels_BKCHW = is_shown_BKHW[:, :, None].repeat(1, 1, 3, 1, 1).float()
        left = iter(pixels_KCHW)
        for row, own in enumerate(sizes):
            for place, (height, width) in enumerate(own):
                pixels_BKCHW[row, place, :, :height, :width] = next(left)[:, :height, :width]
                is_shown_BKHW[row, place, :height, :width] = True
        return {"pixel_values": pixels_BKCHW, "pixel_attention_mask": is_shown_BKHW}

    def use_grouped_attention(self) -> None:
        """Set attention by groups in the language model, and in a tower that takes groups."""
        self._attend_by("grouped", self.tower_attention)

    def _attend_by(self, text: str, tower: str) -> None:
        self.config._attn_implementation = {"": text, "text_config": text, "vision_config": tower}


def in_one(tiles: Sequence[Tensor]) -> Tensor:
    """Return tiles of several sizes as (K, C, H, W), padded on the right and at the bottom."""
    height, width = (max(tile.shape[axis] for tile in tiles) for axis in (2, 3))
    return torch.cat([pad(tile, (0, width - tile.shape[3], 0, height - tile.shape[2])) for tile in tiles])
