"""A base folder whose vocabulary has `<end_of_utterance>`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sft.models.idefics.folders import expected_weights, read_config
from sft.models.idefics.text import END_OF_UTTERANCE, EXTRA_TOKENS, load_tokenizer
from sft.models.model_folder import check_weights, local_folder, new_base, weight_files

EXTRA_EMBEDDING = "model.embed_tokens.additional_embedding.weight"

EXTRA_HEAD = "lm_head.additional_fc.weight"

BASE_EMBEDDING = "model.embed_tokens.weight"

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def prepare_base(path: str | Path, output: Path, images: Mapping[str, Any] | None = None) -> None:
    """Write a base folder whose vocabulary has `<end_of_utterance>`, so that every engine loads a plain checkpoint.

    Only the shards that hold the extra rows are rewritten, the others are linked. The new row of the embedding and of
    the head is the mean of the base embedding rows (the method of HuggingFaceM4's update_model_embeds.py). A base that
    has the token already (an instruct model) is linked as it is. `resize_token_embeddings` cannot do this: it grows the
    *base* rows and throws the extra rows of the head away. There are no settings of `images`.

    Raises:
        UserError: the folder is not an IDEFICS model.
    """
    source = local_folder(path)
    config = read_config(source)
    check_weights(source, expected_weights(config))
    grow = config["additional_vocab_size"] == len(EXTRA_TOKENS) - 1
    with new_base(source, output, TOKENIZER_FILES) as folder:
        if grow:
            _grow_extra_rows(source, folder)
            config["additional_vocab_size"] += 1
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        tokenizer = load_tokenizer(source)
        tokenizer.add_tokens([END_OF_UTTERANCE], special_tokens=True)
        tokenizer.save_pretrained(folder)


def _grow_extra_rows(source: Path, output: Path) -> None:
    """Write the shards that hold the extra rows with one row more."""
    from safetensors.torch import load_file, save_file

    shards = weight_files(source)
    mean = load_file(source / shards[BASE_EMBEDDING])[BASE_EMBEDDING].float().mean(0, keepdim=True)
    for name in {shards[EXTRA_EMBEDDING], shards[EXTRA_HEAD]}:
        tensors = load_file(source / name)
        for key in (EXTRA_EMBEDDING, EXTRA_HEAD):
            if key in tensors:
                tensors[key] = torch.cat([tensors[key], mean.to(tensors[key].dtype)])
        save_file(tensors, output / name, metadata={"format": "pt"})
