"""The vocabulary of IDEFICS: LLaMA-1's, and extra rows for the tokens around images and the end of an utterance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from transformers import IdeficsConfig, PreTrainedTokenizerFast

from sft.core.errors import UserError
from sft.core.sample import EncodedSample, ImageRef
from sft.models import read_config
from sft.models.idefics.names import MODEL_TYPES

if TYPE_CHECKING:
    from sft.models.family import Images

CHAT_TEMPLATE = "idefics.jinja"

FAKE, IMAGE, END_OF_UTTERANCE = "<fake_token_around_image>", "<image>", "<end_of_utterance>"

EXTRA_TOKENS = (FAKE, IMAGE, END_OF_UTTERANCE)
"""Extra vocabulary in the order of the released checkpoints: rows 32000, 32001 and, in instruct models, 32002."""

LLAMA_VOCABULARY = 32000
"""Tokens of LLaMA-1, on which the released models are built."""

GOLDEN_IDS = (
    *(1, 4911, 29901, 32000, 32001, 32000, 20355, 915, 445, 1967, 29889, 32002),  # User:<image>Describe this image.
    *(29871, 13, 7900, 22137, 29901, 319, 11203, 29889, 32002),  # \nAssistant: A dog.
    *(29871, 13, 2659, 29901, 1724, 338, 372, 29973, 32002),  # \nUser: What is it?
    *(29871, 13, 7900, 22137, 29901, 319, 11203, 29889, 32002, 2),
)
"""See `golden_ids`."""


ENDS: tuple[str, ...] = ("</s>", END_OF_UTTERANCE)
"""Tokens that end an answer, as far as a vocabulary has them: a base has no `<end_of_utterance>`."""

NEVER_WRITTEN: tuple[str, ...] = (FAKE, IMAGE)
"""Tokens that no answer may have: the released models were trained to predict them (the card's `bad_words_ids`)."""


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model folder or hub id, exactly as its tokenizer.json says.

    Not through `AutoTokenizer`: transformers 5 rebuilds a `LlamaTokenizer` from its vocabulary, ignores the normalizer
    of tokenizer.json and gives other ids than the model was trained with (no "▁" after special tokens).

    Raises:
        UserError: there is no tokenizer, or it is not one of IDEFICS.
    """
    config = read_config(path, MODEL_TYPES)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no tokenizer.json that can be read; an IDEFICS folder has one") from error
    tokenizer.padding_side = "left"  # generation with right padding gives wrong tokens
    num_base = config.get("vocab_size")
    if num_base is None:
        raise UserError(f"{path}: config.json has no vocab_size")
    expected = {"<unk>": 0, "<s>": 1, "</s>": 2, FAKE: num_base, IMAGE: num_base + 1}
    found = {token: tokenizer.convert_tokens_to_ids(token) for token in expected}
    if found != expected:
        raise UserError(f"{path}: special tokens have ids {found}; with this model's vocabulary they are {expected}")
    first = tokenizer("User", add_special_tokens=False)["input_ids"][0]
    if not tokenizer.convert_ids_to_tokens(first).startswith("▁"):
        raise UserError(f"{path}: text after a special token does not begin with '▁'; IDEFICS needs legacy LLaMA rules")
    return tokenizer


def golden_ids(config: IdeficsConfig) -> list[int] | None:
    """Return the ids of `sft.checks.subject.CHAT` that idefics-9b-instruct was trained with (LLaMA-1's vocabulary; the
    prompt of transformers#28591 and the rules of its released processor); None for another vocabulary."""
    return list(GOLDEN_IDS) if config.vocab_size == LLAMA_VOCABULARY else None


def num_rows(config: IdeficsConfig) -> int:
    """Return how many tokens the vocabulary has, base and extra rows."""
    return int(config.vocab_size + config.additional_vocab_size)


def max_positions(config: IdeficsConfig) -> int:
    """Return the length of the longest sequence that the model has positions for."""
    return int(config.max_position_embeddings)


def wrong_with_tokens(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], text: str) -> str:
    """Return what is wrong with the ids of a rendered chat by the rules of LLaMA-1's vocabulary; an empty text if
    nothing is.

    transformers 5 can rebuild a tokenizer by other rules without a word: 32 tokens in place of 35 for a short chat.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    for before, index, token in zip(ids, ids[1:], tokens[1:], strict=False):
        if before in special and index not in special and not token.startswith("▁"):
            return f"text after a special token begins with {token!r}, not with '▁'"
    written = "".join(tokens).replace("▁", "").replace("<0x0A>", "").replace("\n", "")
    rendered = "".join(text.split())
    if written != rendered:
        at = next(i for i in range(len(rendered) + 1) if written[: i + 1] != rendered[: i + 1])
        return f"a chat comes back with {written[at : at + 20]!r} where {rendered[at : at + 20]!r} was written"
    return ""


def chat_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the file name of the chat template."""
    return CHAT_TEMPLATE


def encode_prompt(tokenizer: PreTrainedTokenizerFast, images: Images, items: Sequence[str | ImageRef]) -> EncodedSample:
    """Encode a prompt of texts and images as it stands, from `<s>`: to the ids that transformers' `IdeficsProcessor`
    makes.

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
