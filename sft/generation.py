"""Answers in words: batched greedy generation, through transformers' own `generate`.

The prompt is the one of training, made by the same template. Shape letters: B conversations, T tokens of the longest
prompt, N images of the conversation that has most, C, H, W channels, height, width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from sft import images
from sft.chat_template import ChatTemplate
from sft.models import idefics
from sft.pixels import load_pixels
from sft.sample import EncodedSample, ImageRef, Message

Pixels = NDArray[np.uint8]


def generate(
    model: idefics.PackedIdefics,
    template: ChatTemplate,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    load_pixels: Callable[[ImageRef], Pixels] | None = None,
    batch_size: int = 16,
    autocast: bool = False,
) -> list[str]:
    """The model's answer to each conversation, whose last message is the user's; stripped of spaces at its ends.

    Greedy; an answer ends at `</s>`, `<end_of_utterance>` or after `max_new_tokens`, and never holds an image marker.
    `load_pixels` makes uint8 (C, H, W) of an image; left out, the image is opened and squashed as in training.

    Raises:
        SkipSample: an image is missing or does not decode.
    """
    load = load_pixels or _load_pixels(idefics.image_size(model.config))
    was_training = model.training
    model.eval()
    try:
        answers: list[str] = []
        for first in range(0, len(conversations), batch_size):
            batch = conversations[first : first + batch_size]
            answers += _generate_batch(model, template, batch, load, max_new_tokens, autocast)
        return answers
    finally:
        model.train(was_training)


def _generate_batch(
    model: idefics.PackedIdefics,
    template: ChatTemplate,
    conversations: Sequence[Sequence[Message]],
    load_pixels: Callable[[ImageRef], Pixels],
    max_new_tokens: int,
    autocast: bool,
) -> list[str]:
    tokenizer = template.tokenizer
    stops = tokenizer.convert_tokens_to_ids(["</s>", idefics.END_OF_UTTERANCE])
    prompts = [template.encode_prompt(messages) for messages in conversations]
    pixels = [[load_pixels(image) for image in _images(messages)] for messages in conversations]
    num_images = max(1, *(len(pictures) for pictures in pixels))  # IDEFICS wants at least one, seen by no token
    input_ids_BT, attention_mask_BT = _left_padded(prompts, tokenizer.pad_token_id)
    device = model.device
    # Not inference_mode: what a module keeps from it could not be trained with afterwards.
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        output_BT = model.generate(
            input_ids=input_ids_BT.to(device),
            attention_mask=attention_mask_BT.to(device),
            pixel_values=_pixel_values(pixels, num_images, idefics.image_size(model.config)).to(device),
            image_attention_mask=_image_attention_mask(prompts, num_images).to(device),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=max_new_tokens,
                bad_words_ids=[[tokenizer.convert_tokens_to_ids(t)] for t in (idefics.FAKE, idefics.IMAGE)],
                eos_token_id=stops,
                bos_token_id=tokenizer.bos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            ),
        )
    new_tokens = output_BT[:, input_ids_BT.shape[1] :].tolist()
    return [_decode(tokenizer, token_ids, stops) for token_ids in new_tokens]


def _left_padded(prompts: Sequence[EncodedSample], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (B, T). Padding on the left: new tokens follow the prompt directly."""
    longest = max(len(prompt.input_ids) for prompt in prompts)
    input_ids_BT = torch.full((len(prompts), longest), pad_token_id)
    mask_BT = torch.zeros_like(input_ids_BT)
    for row, prompt in enumerate(prompts):
        input_ids_BT[row, longest - len(prompt.input_ids) :] = torch.from_numpy(prompt.input_ids)
        mask_BT[row, longest - len(prompt.input_ids) :] = 1
    return input_ids_BT, mask_BT


def _image_attention_mask(prompts: Sequence[EncodedSample], num_images: int) -> Tensor:
    """(B, T, N): each token looks at the last image at or before it; new tokens look where the last one did."""
    longest = max(len(prompt.input_ids) for prompt in prompts)
    mask_BTN = torch.zeros(len(prompts), longest, num_images, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        offset = longest - len(prompt.input_ids)
        for image, position in enumerate(prompt.image_positions):
            mask_BTN[row, offset + position :] = 0
            mask_BTN[row, offset + position :, image] = 1
    return mask_BTN


def _pixel_values(pixels: Sequence[Sequence[Pixels]], num_images: int, size: int) -> Tensor:
    """Normalised pixels (B, N, C, H, W); zeros where a conversation has fewer images."""
    values_BNCHW = torch.zeros(len(pixels), num_images, 3, size, size)
    for row, pictures in enumerate(pixels):
        for image, picture in enumerate(pictures):
            values_BNCHW[row, image] = idefics.normalise(torch.tensor(picture)[None])[0]
    return values_BNCHW


def _decode(tokenizer: PreTrainedTokenizerFast, token_ids: Sequence[int], stops: Sequence[int]) -> str:
    """Text of the tokens before the first stop."""
    end = next((i for i, token in enumerate(token_ids) if token in stops), len(token_ids))
    return str(tokenizer.decode(token_ids[:end], skip_special_tokens=True)).strip()


def _images(messages: Sequence[Message]) -> list[ImageRef]:
    return [item for message in messages for item in message.content if isinstance(item, ImageRef)]


def _load_pixels(size: int) -> Callable[[ImageRef], Pixels]:
    return lambda image: load_pixels(images.read_bytes(image), size)
