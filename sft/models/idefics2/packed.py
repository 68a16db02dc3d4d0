"""Idefics2 with a forward over packed micro-batches. The patches of all tiles are one row of the tower, in which each
tile attends to itself: a large image makes a small one no dearer, and a batch takes one call, whatever its sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Idefics2ForConditionalGeneration

from sft.core.sample import Tiling
from sft.models.grouped_attention import group_tokens
from sft.models.inline_model import InlineModel, in_one, normalise


class PackedIdefics2(InlineModel, Idefics2ForConditionalGeneration):  # type: ignore[misc]  # transformers is not typed
    """Idefics2 with a forward for packed micro-batches: `model(batch=batch)`. Anything else goes to transformers."""

    shard_units = ("Idefics2EncoderLayer", "Idefics2PerceiverLayer", "MistralDecoderLayer")
    tower_attention = "grouped"

    def encode_images(self, tiles: Sequence[Tensor], tilings: Sequence[Tiling]) -> Tensor:
        """Return the states (R, E) of images: one call of the tower and one of the connector for all tiles."""
        tower, connector = self.model.vision_model, self.model.connector
        pixels_KCHW = in_one(tiles)
        device = pixels_KCHW.device
        sizes = [size for tiling in tilings for size in tiling.tile_sizes]
        is_shown_KHW = _patches_shown(sizes, pixels_KCHW, tower.config.patch_size)
        counts = is_shown_KHW.flatten(1).sum(1)
        embeds_KHE = tower.embeddings(normalise(pixels_KCHW).to(tower.dtype), is_shown_KHW.to(device)).flatten(0, 1)
        embeds_PE = embeds_KHE[is_shown_KHW.flatten().nonzero()[:, 0].to(device)]
        tile_ids_P = torch.repeat_interleave(torch.arange(len(sizes)), counts)
        groups = group_tokens(tile_ids_P.to(device), is_causal=False)
        # The layers hand on a mask and nothing else: groups stand in its place.
        hidden_1PE = tower.encoder(inputs_embeds=embeds_PE[None], attention_mask=groups).last_hidden_state
        context_1PE = connector.modality_projection(tower.post_layernorm(hidden_1PE))
        context_KPE = pad_sequence([*torch.split(context_1PE[0], counts.tolist())], batch_first=True)
        is_real_KP = torch.arange(context_KPE.shape[1]) < counts[:, None]
        return torch.as_tensor(connector.perceiver_resampler(context_KPE, is_real_KP.to(device))).flatten(0, 1)


def _patches_shown(sizes: Sequence[tuple[int, int]], pixels_KCHW: Tensor, patch: int) -> Tensor:
    """Return which patches (K, H, W) are whole ones of their tile, on the CPU: the tower leaves out all others."""
    is_shown_KHW = torch.zeros(len(sizes), *(edge // patch for edge in pixels_KCHW.shape[2:]), dtype=torch.bool)
    for is_shown_HW, (height, width) in zip(is_shown_KHW, sizes, strict=True):
        is_shown_HW[: height // patch, : width // patch] = True
    return is_shown_KHW
