"""The vocabulary of Idefics2: Mistral's, by the legacy rules of SentencePiece, which put a "▁" before each run of text,
and the tokens of images and of a turn's end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AddedToken, PreTrainedTokenizerFast

from sft.core.errors import UserError
from sft.models.idefics import text as llama
from sft.models.idefics3.text import END_OF_UTTERANCE, FAKE, IMAGE, open_tokenizer
from sft.models.idefics3.text import encode_prompt as encode_prompt
from sft.models.idefics3.text import golden_ids as golden_ids
from sft.models.idefics3.text import max_positions as max_positions
from sft.models.idefics3.text import num_rows as num_rows

START, CHAT_TEMPLATE = "<s>", "idefics2.jinja"

ENDS: tuple[str, ...] = ("</s>", END_OF_UTTERANCE)
"""Tokens that end an answer."""

NEVER_WRITTEN: tuple[str, ...] = (FAKE, IMAGE)
"""Tokens that no answer may have: an `<image>` that stands for nothing stops transformers' forward."""


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model folder or hub id, exactly as its tokenizer.json says. A base may be without
    `<end_of_utterance>`, which takes the next row then, as transformers' processor gives it.

    Raises:
        UserError: there is no tokenizer, it lacks what images need, or it is not by legacy rules.
    """
    tokenizer = open_tokenizer(path, (START,), (*ENDS, *NEVER_WRITTEN), NEVER_WRITTEN)
    tokenizer.add_tokens([AddedToken(END_OF_UTTERANCE, special=True, normalized=False)], special_tokens=True)
    first = tokenizer("User", add_special_tokens=False)["input_ids"][0]
    if not tokenizer.convert_ids_to_tokens(first).startswith("▁"):
        raise UserError(f"{path}: text after a special token does not begin with '▁'; Idefics2 needs legacy rules")
    return tokenizer


def chat_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the file name of the chat template."""
    return CHAT_TEMPLATE


def wrong_with_tokens(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], text: str) -> str:
    """Return what is wrong with the ids of a rendered chat, from its last image on; an empty text if nothing is."""
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    states = [place for place, index in enumerate(ids) if index == image]
    marker = FAKE * bool(states)
    return llama.wrong_with_tokens(tokenizer, ids[max(states, default=-1) + 1 :], marker + text.rpartition(IMAGE)[2])
