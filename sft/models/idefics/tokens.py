"""The vocabulary of IDEFICS: LLaMA-1's, and extra rows for the tokens around images and the end of an utterance."""

from __future__ import annotations

from pathlib import Path

from transformers import IdeficsConfig, PreTrainedTokenizerFast

from sft.core.errors import UserError
from sft.models.idefics.folders import read_config

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


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model folder or hub id, exactly as its tokenizer.json says.

    Not through `AutoTokenizer`: transformers 5 rebuilds a `LlamaTokenizer` from its vocabulary, ignores the normalizer
    of tokenizer.json and gives other ids than the model was trained with (no "▁" after special tokens).

    Raises:
        UserError: there is no tokenizer, or it is not one of IDEFICS.
    """
    config = read_config(path)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no tokenizer.json found; an IDEFICS folder has one") from error
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
    """The ids of `sft.checks.model.CHAT` that idefics-9b-instruct was trained with (LLaMA-1's vocabulary; the prompt of
    transformers#28591 and the rules of its released processor); None for another vocabulary."""
    return list(GOLDEN_IDS) if config.vocab_size == LLAMA_VOCABULARY else None


def num_rows(config: IdeficsConfig) -> int:
    """Tokens of the vocabulary: base and extra rows."""
    return int(config.vocab_size + config.additional_vocab_size)


def tokens_per_image(size: tuple[int, int]) -> int:
    """`<fake><image><fake>`, whatever the size: the image itself comes through cross-attention."""
    return 3
