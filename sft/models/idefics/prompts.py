"""What transformers' `generate` of IDEFICS wants to be given.

Shape letters: B prompts, T tokens of the longest, N images of the prompt that has most, C, H, W.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sft.core.errors import UserError
from sft.core.sample import EncodedSample, ImageRef
from sft.models.idefics.pixels import normalise
from sft.models.idefics.tokens import END_OF_UTTERANCE, FAKE, IMAGE

ENDS = ("</s>", END_OF_UTTERANCE)
"""Tokens that end an answer, as far as a vocabulary has them: a base has no `<end_of_utterance>`."""

NEVER_WRITTEN = (FAKE, IMAGE)
"""Tokens that no answer may have: the released models were trained to predict them (the card's `bad_words_ids`)."""


def encode_prompt(tokenizer: PreTrainedTokenizerFast, items: Sequence[str | ImageRef]) -> EncodedSample:
    """A prompt of texts and images as it stands, from `<s>`: the ids that transformers' `IdeficsProcessor` makes of it.

    No role is added. Special tokens in a text are special, so it must be one's own text: that is what
    `sft.models.chat_template` is for otherwise. As in the processor, spaces at the ends of a text go.

    Raises:
        UserError: a text holds an image marker, for which there is no image.
    """
    text, last_was_image = str(tokenizer.bos_token), False
    for item in items:
        if isinstance(item, ImageRef):
            text += IMAGE + FAKE if last_was_image else FAKE + IMAGE + FAKE
        elif marker := next((token for token in NEVER_WRITTEN if token in item), None):
            raise UserError(f"prompt: a text holds {marker}; give the image itself in its place")
        else:
            text += item.strip(" ")
        last_was_image = isinstance(item, ImageRef)
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
    return EncodedSample(
        key="prompt",
        input_ids=ids,
        trained_spans=(),
        image_positions=tuple(np.flatnonzero(ids == image_token_id).tolist()),
    )


def generation_inputs(
    prompts: Sequence[EncodedSample], pixels: Sequence[Sequence[NDArray[np.uint8]]], image_size: int
) -> dict[str, Tensor]:
    """Images, and who looks at them, of prompts that are padded on the left. `pixels` are uint8 (C, H, W)."""
    num_images = max(1, *(len(pictures) for pictures in pixels))  # at least one, seen by no token
    return {
        "pixel_values": _pixel_values(pixels, num_images, image_size),
        "image_attention_mask": image_attention_mask(prompts, num_images),
    }


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


def _pixel_values(pixels: Sequence[Sequence[NDArray[np.uint8]]], num_images: int, size: int) -> Tensor:
    """Normalised pixels (B, N, C, H, W); zeros where a prompt has fewer images."""
    values_BNCHW = torch.zeros(len(pixels), num_images, 3, size, size)
    for row, pictures in enumerate(pixels):
        for image, picture in enumerate(pictures):
            values_BNCHW[row, image] = normalise(torch.tensor(picture)[None])[0]
    return values_BNCHW
