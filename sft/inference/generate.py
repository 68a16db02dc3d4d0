"""Answers in words: batched generation through transformers' own `generate`.

The prompt is the one of training, made by the same template. Shape letters: B prompts, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, TextStreamer

from sft.core.images import read_bytes
from sft.core.sample import EncodedSample, ImageRef, Message
from sft.models import family_of
from sft.models.chat_template import ChatTemplate
from sft.models.family import Tiles
from sft.models.image_transform import load_tiles, tiling_of
from sft.models.packed_model import PackedModel

OnText = Callable[[str], None] | None
"""Gets a text piece by piece, as it is written; None where nobody follows it."""


class Prompt(NamedTuple):
    """A text to continue, encoded, and the images in it."""

    encoded: EncodedSample
    images: tuple[ImageRef, ...]


def prompt_of(template: ChatTemplate, messages: Sequence[Message]) -> Prompt:
    """Return the prompt of a conversation whose last message is the user's, up to where the model answers."""
    images = [item for message in messages for item in message.content if isinstance(item, ImageRef)]
    return Prompt(template.encode_prompt(messages), tuple(images))


def generate(
    model: PackedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    load_image: Callable[[ImageRef], Tiles] | None = None,
    batch_size: int = 16,
    autocast: bool = False,
    settings: Mapping[str, Any] | None = None,
    forbidden: Sequence[str] = (),
    on_text: OnText = None,
) -> list[str]:
    """Return the text that the model generates after each prompt, stripped of spaces at its ends. Greedy, unless
    `settings` (fields of transformers' `GenerationConfig`) say otherwise; a text ends at `</s>`, `<end_of_utterance>`
    or after `max_new_tokens`, and never holds an image marker, nor a token that writes one of the `forbidden` texts.
    `load_image` makes the tiles of an image; left out, the image is opened and cut as in training. `on_text` gets the
    text of a single prompt word by word as it is written; beams are not streamed. Raise SkipSample for an image that is
    missing or does not decode."""
    text, images = family_of(model).text, family_of(model).images(model.config)
    load = load_image or (lambda image: load_tiles(read_bytes(image), images, decoding=image.decoding))
    stops = _ids_of(tokenizer, text.ENDS)
    never = _ids_of(tokenizer, text.NEVER_WRITTEN) + [_last_id(tokenizer, own) for own in forbidden]
    own = {
        "do_sample": False,
        "max_new_tokens": max_new_tokens,
        "bad_words_ids": [[index] for index in never],
        "eos_token_id": stops,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = GenerationConfig(**(own | dict(settings or {})))
    texts: list[str] = []
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            streamer = _Words(tokenizer, on_text) if on_text and config.num_beams in (None, 1) else None
            # Not inference_mode: what a module keeps from it could not be trained with afterwards.
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                encoded = [prompt.encoded for prompt in batch]
                tiles = [[load(image) for image in prompt.images] for prompt in batch]
                tilings = [[tiling_of(image, images) for image in prompt.images] for prompt in batch]
                inputs = model.generation_inputs(encoded, tiles, tilings)
                inputs |= _left_padded(encoded, tokenizer.pad_token_id)
                on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
                output_BT = model.generate(**on_device, generation_config=config, streamer=streamer)
            new_tokens = output_BT[:, inputs["input_ids"].shape[1] :].tolist()
            texts += [_decode(tokenizer, token_ids, stops) for token_ids in new_tokens]
        return texts
    finally:
        model.train(was_training)


class _Words(TextStreamer):  # type: ignore[misc]  # transformers is not typed
    """Hands on a text as it is written, whole words at a time, without the prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text, self._has_begun = on_text, False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Leave out the space before the first word."""
        text = text if self._has_begun else text.lstrip()
        if text:
            self._has_begun = True
            self._on_text(text)


def _ids_of(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str]) -> list[int]:
    """Return the ids of those tokens that the vocabulary has."""
    ids = (tokenizer.convert_tokens_to_ids(token) for token in tokens)
    return [index for index in ids if index not in (None, tokenizer.unk_token_id)]


def _last_id(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    """Return the last token of a text that follows a word."""
    return int(tokenizer(f"a{text}", add_special_tokens=False)["input_ids"][-1])


def _left_padded(prompts: Sequence[EncodedSample], pad_token_id: int) -> dict[str, Tensor]:
    """Return token ids and attention mask, both (B, T). Padding on the left: new tokens follow the prompt directly."""
    longest = max(len(prompt.input_ids) for prompt in prompts)
    input_ids_BT = torch.full((len(prompts), longest), pad_token_id)
    mask_BT = torch.zeros_like(input_ids_BT)
    for row, prompt in enumerate(prompts):
        input_ids_BT[row, longest - len(prompt.input_ids) :] = torch.from_numpy(prompt.input_ids)
        mask_BT[row, longest - len(prompt.input_ids) :] = 1
    return {"input_ids": input_ids_BT, "attention_mask": mask_BT}


def _decode(tokenizer: PreTrainedTokenizerFast, token_ids: Sequence[int], stops: Sequence[int]) -> str:
    """Return the text of the tokens before the first stop."""
    end = next((i for i, token in enumerate(token_ids) if token in stops), len(token_ids))
    return str(tokenizer.decode(token_ids[:end], skip_special_tokens=True)).strip()
