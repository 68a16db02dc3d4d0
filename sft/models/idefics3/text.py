"""The vocabularies of Idefics3 (Llama 3's) and SmolVLM (SmolLM2's), each with the tokens of images and of a turn's end.

Both are byte-level: text comes back from its ids as it was, and the ids of a run between two special tokens depend on
that run alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from transformers import AddedToken, PreTrainedConfig, PreTrainedTokenizerFast

from sft.core.errors import UserError
from sft.core.sample import EncodedSample, ImageRef
from sft.models.image_transform import tiling_of

if TYPE_CHECKING:
    from sft.models.family import Images

FAKE, IMAGE, GLOBAL = "<fake_token_around_image>", "<image>", "<global-img>"

END_OF_UTTERANCE = "<end_of_utterance>"

CHAT_TEMPLATES = {"<|im_start|>": "smolvlm.jinja", "<|begin_of_text|>": "idefics3.jinja"}
"""The chat template of a vocabulary, by the token that its texts begin with."""

ENDS: tuple[str, ...] = (END_OF_UTTERANCE, "<|end_of_text|>")
"""Tokens that end an answer, as far as a vocabulary has them."""

MAX_GRID = 12
"""Rows and columns that the longest images are cut into at most: 4,096 pixels in tiles of 364."""

NEVER_WRITTEN: tuple[str, ...] = (
    FAKE,
    IMAGE,
    GLOBAL,
    *(f"<row_{row + 1}_col_{column + 1}>" for row in range(MAX_GRID) for column in range(MAX_GRID)),
)
"""Tokens that no answer may have: an `<image>` that stands for nothing stops transformers' forward, and models are seen
to write rows and columns in loops."""


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model folder or hub id, exactly as its tokenizer.json says.

    Raises:
        UserError: there is no tokenizer, or it lacks what images and turns need.
    """
    return open_tokenizer(path, (*CHAT_TEMPLATES,), (*ENDS, *NEVER_WRITTEN), (FAKE, IMAGE, END_OF_UTTERANCE))


def open_tokenizer(
    path: str | Path, starts: Sequence[str], special: Sequence[str], needed: Sequence[str]
) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a family whose texts begin with one of `starts`. Of the tokens that are `special` the first
    ends a text if the folder names no other; those `needed` have to be there.

    Raises:
        UserError: there is no tokenizer, or it lacks what images and turns need.
    """
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no tokenizer.json that can be read; a folder of this family has one") from error
    tokenizer.padding_side = "left"  # generation with right padding gives wrong tokens
    tokens = tokenizer.get_vocab()
    if missing := [token for token in needed if token not in tokens]:
        raise UserError(f"{path}: the tokenizer has no token {missing[0]}; a base of this family has it")
    start = next((token for token in starts if token in tokens), None)
    if start is None:
        raise UserError(f"{path}: the tokenizer has none of {', '.join(starts)}, one of which begins a text")
    # Whatever a tokenizer.json says of them, nobody's text becomes one.
    ours = [token for token in (start, *special) if token in tokens]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in ours], special_tokens=True)
    tokenizer.bos_token = start  # a tokenizer_config.json may name none
    tokenizer.eos_token = tokenizer.eos_token or special[0]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def chat_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the file name of the chat template of a vocabulary."""
    return CHAT_TEMPLATES[str(tokenizer.bos_token)]


def num_rows(config: PreTrainedConfig) -> int:
    """Return how many rows the embedding has; SmolVLM's has some more than there are tokens."""
    return int(config.text_config.vocab_size)


def max_positions(config: PreTrainedConfig) -> int:
    """Return the length of the longest sequence that the model has positions for."""
    return int(config.text_config.max_position_embeddings)


def golden_ids(config: PreTrainedConfig) -> None:
    """Return nothing: the ids of a chat depend on how its image is cut. Any of these vocabularies gives a text back,
    which `wrong_with_tokens` checks; the tests have ids of SmolLM2's vocabulary."""
    return


def wrong_with_tokens(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], text: str) -> str:
    """Return what is wrong with the ids of a rendered chat, from its last image on; an empty text if nothing is."""
    expected = text.rpartition(IMAGE)[2]
    found = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)[-len(expected) :]
    return "" if found == expected else f"a chat ends with {found!r} where {expected!r} was written"


def encode_prompt(tokenizer: PreTrainedTokenizerFast, images: Images, items: Sequence[str | ImageRef]) -> EncodedSample:
    """Encode a prompt of texts and images as it stands, from the token that begins a text: to the ids that
    transformers' processor makes.

    No role is added. Special tokens in a text are special, so it must be one's own text: that is what
    `sft.models.chat_template` is for otherwise.

    Raises:
        UserError: a text holds a token of an image, for which there is no image.
        SkipSample: an image cannot be read.
    """
    ids: list[int] = [tokenizer.bos_token_id]
    positions, weights = [], []
    for item in items:
        if isinstance(item, ImageRef):
            tiling = tiling_of(item, images)
            positions.append(len(ids))
            weights.append(images.weight(tiling))
            own = images.token_ids(tokenizer, tiling)
            ids += own[images.shares_border and ids[-1:] == own[:1] :]
        elif marker := next((token for token in (FAKE, IMAGE, GLOBAL) if token in item), None):
            raise UserError(f"prompt: a text holds {marker}; give the image itself in its place")
        else:
            ids += tokenizer(item, add_special_tokens=False)["input_ids"]
    return EncodedSample(
        key="prompt",
        input_ids=np.array(ids, dtype=np.int64),
        trained_spans=(),
        image_positions=tuple(positions),
        image_weights=tuple(weights),
    )
