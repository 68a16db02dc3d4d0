"""IDEFICS with a forward over packed micro-batches: tokens look at the last image at or before them.

transformers' own forward cannot do this (it has no packing) and its loss crashes on every released checkpoint, whose
vocabulary has extra rows. Shape letters beside those of `sft.core.sample`: B prompts, P positions that are read, D
hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import IdeficsForVisionText2Text as PlainIdefics

from sft.core.sample import Batch, EncodedSample, Tiling
from sft.models.family import Tiles
from sft.models.fused_layers import replace_layers, rotary_of
from sft.models.grouped_attention import group_tokens
from sft.models.idefics.images import IdeficsImages, normalise
from sft.models.idefics.layers import FUSED
from sft.models.packed_model import PackedModel, sample_groups


class PackedIdefics(PackedModel, PlainIdefics):  # type: ignore[misc]  # transformers is not typed
    """IDEFICS with a forward for packed micro-batches: `model(batch=batch)`. Anything else goes to transformers."""

    shard_units = tuple(PlainIdefics._no_split_modules)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        replace_layers(self, FUSED)

    @functools.wraps(PlainIdefics.forward)  # generate() reads the signature
    def forward(  # type: ignore[override]
        self, *args: Any, batch: Batch | None = None, read_P: Tensor | None = None, z_loss: float = 0.0, **kwargs: Any
    ) -> Any:
        """Compute what `PackedModel` says of `model(...)`."""
        return super().forward(*args, **kwargs) if batch is None else self.packed_forward(batch, read_P, z_loss)

    def encode_images(self, tiles: Sequence[Tensor], tilings: Sequence[Tiling] = ()) -> Tensor:
        """Return the states (R, E) of images, of uint8 or already normalised tiles: what cross-attention looks at."""
        (pixels_NCHW,) = tiles
        if pixels_NCHW.dtype == torch.uint8:
            pixels_NCHW = normalise(pixels_NCHW)
        features_NSE = self.model.vision_model(pixel_values=pixels_NCHW.to(self.dtype)).last_hidden_state
        if self.config.use_resampler:
            features_NSE = self.model.perceiver_resampler(features_NSE)
        return torch.as_tensor(features_NSE).flatten(0, 1)

    def hidden_states(self, batch: Batch, read_P: Tensor) -> Tensor:
        """Return the final hidden states (P, D) at some positions, as `IdeficsModel.forward` makes them."""
        decoder = self.model
        states_RE = self.image_states(batch)
        if states_RE is None:  # text only, on one device: nothing can look at these zeros
            size = self.config.vision_config.embed_dim
            states_RE = torch.zeros(1, size, dtype=self.dtype, device=batch.input_ids_T.device)
        samples, lookers = sample_groups(batch), group_tokens(batch.image_ids_T)
        sees_image_1T = (batch.image_ids_T >= 0)[None]
        hidden_1TD = decoder.embed_tokens(batch.input_ids_T[None])
        rotary = rotary_of(decoder.layers[0].self_attn.rotary_emb, batch.position_ids_T, hidden_1TD)
        for index, layer in enumerate(decoder.layers):
            if index % decoder.cross_layer_interval == 0:
                hidden_1TD = decoder.gated_cross_attn_layers[index // decoder.cross_layer_interval](
                    hidden_1TD,
                    None,
                    states_RE[None],
                    cross_attention_gate=sees_image_1T,
                    groups=lookers,
                    num_images=max(batch.num_images, 1),
                )
            is_last = index == len(decoder.layers) - 1
            hidden_1TD = layer(hidden_1TD, rotary=rotary, groups=samples, read_P=read_P if is_last else None)
        return self.normed(decoder.norm, hidden_1TD)

    def plain_logits(self, batch: Batch, segment: int) -> Tensor:
        """Return the logits (T, V) of one segment by transformers' own forward and attention."""
        own_T = batch.segment_ids_T == segment
        input_ids_T, image_ids_T = batch.input_ids_T[own_T], batch.image_ids_T[own_T]
        (pixels_NCHW,) = batch.tiles
        looks_TN = image_ids_T[:, None] == torch.arange(len(pixels_NCHW), device=image_ids_T.device)
        self.config._attn_implementation = self.config.vision_config._attn_implementation = "sdpa"
        try:
            output = self(
                input_ids=input_ids_T[None],
                attention_mask=torch.ones_like(input_ids_T)[None],
                pixel_values=normalise(pixels_NCHW).to(self.dtype)[None],
                image_attention_mask=looks_TN.long()[None],
                use_cache=False,
            )
        finally:
            self.use_grouped_attention()
        return torch.as_tensor(output.logits[0])

    def generation_inputs(
        self,
        prompts: Sequence[EncodedSample],
        tiles: Sequence[Sequence[Tiles]],
        tilings: Sequence[Sequence[Tiling]] = (),
    ) -> dict[str, Tensor]:
        """Return the pixels of images (B, N, C, H, W), zeros where a prompt has fewer, and who looks at them."""
        num_images = max(1, *(len(images) for images in tiles))  # at least one, seen by no token
        tile = IdeficsImages(self.config).one_tile
        pixels_BNCHW = torch.zeros(len(tiles), num_images, 3, tile.height, tile.width)
        for row, images in enumerate(tiles):
            for number, image in enumerate(images):
                pixels_BNCHW[row, number] = normalise(torch.tensor(image))[0]
        return {"pixel_values": pixels_BNCHW, "image_attention_mask": image_attention_mask(prompts, num_images)}

    def use_grouped_attention(self) -> None:
        """Set attention by groups. The vision tower has no groups and attends as ever, see `grouped_attention`."""
        self.config._attn_implementation = self.config.vision_config._attn_implementation = "grouped"


def image_attention_mask(prompts: Sequence[EncodedSample], num_images: int) -> Tensor:
    """(B, T, N): each token looks at the last image at or before it; new tokens look where the last one did."""
    longest = max(len(prompt.input_ids) for prompt in prompts)
    mask_BTN = torch.zeros(len(prompts), longest, num_images, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        offset = longest - len(prompt.input_ids)
        for image, position in enumerate(prompt.image_positions):
            mask_BTN[row, offset + position :] = 0
            mask_BTN[row, offset + position :, image] = 1
    return mask_BTN
