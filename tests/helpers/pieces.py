"""Vocabularies of SentencePiece as npm packages have them, in JavaScript."""

import base64
import re
import struct
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast


def legacy_tokenizer(file: Path, prefix: str = "") -> PreTrainedTokenizerFast:
    """The tokenizer of llama-tokenizer-js or mistral-tokenizer-js, by the legacy rules of SentencePiece."""
    source = file.read_text(encoding="utf-8")

    def embedded(name: str) -> bytes:
        match = re.search(f'{prefix}{name} = "([^"]+)"', source)
        assert match is not None
        return base64.b64decode(match[1])

    pieces = embedded("vocab_base64").decode().split("\n")
    numbers = [number for (number,) in struct.iter_unpack("<H", embedded("merges_binary"))]
    merges = [(pieces[a], pieces[b]) for a, b in zip(numbers[::2], numbers[1::2], strict=True)]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
