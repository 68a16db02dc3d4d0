"""A base folder whose vocabulary has `<end_of_utterance>`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch

from sft.core.errors import UserError
from sft.models.idefics.folders import check_weights, local_folder, read_config, weight_files
from sft.models.idefics.text import END_OF_UTTERANCE, EXTRA_TOKENS, load_tokenizer

EXTRA_EMBEDDING = "model.embed_tokens.additional_embedding.weight"

EXTRA_HEAD = "lm_head.additional_fc.weight"

BASE_EMBEDDING = "model.embed_tokens.weight"


def prepare_base(path: str | Path, output: Path) -> None:
    """Write a base folder whose vocabulary has `<end_of_utterance>`, so that every engine loads a plain checkpoint.

    Only the shards that hold the extra rows are rewritten, the others are linked. The new row of the embedding and of
    the head is the mean of the base embedding rows (the method of HuggingFaceM4's update_model_embeds.py). A base that
    has the token already (an instruct model) is linked as it is. `resize_token_embeddings` cannot do this: it grows the
    *base* rows and throws the extra rows of the head away.

    Raises:
        UserError: the folder is not an IDEFICS model.
    """
    source = local_folder(path)
    config = read_config(source)
    check_weights(source, config)
    if source.resolve() == output.resolve():
        raise UserError(f"{output}: the prepared base would replace the base it is made from; give another folder")
    staging = output.with_name(f".{output.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)

    grow = config["additional_vocab_size"] == len(EXTRA_TOKENS) - 1
    rewritten = _grow_extra_rows(source, staging) if grow else set()
    if grow:
        config["additional_vocab_size"] += 1
    (staging / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for file in source.iterdir():
        if file.suffix in (".safetensors", ".json") and file.name not in rewritten | {"config.json"}:
            _link(file, staging / file.name)

    tokenizer = load_tokenizer(source)
    tokenizer.add_tokens([END_OF_UTTERANCE], special_tokens=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (staging / name).unlink(missing_ok=True)  # never write through a link into the base
    tokenizer.save_pretrained(staging)
    shutil.rmtree(output, ignore_errors=True)
    staging.rename(output)


def _grow_extra_rows(source: Path, output: Path) -> set[str]:
    """Write the shards that hold the extra rows with one row more; return their file names."""
    from safetensors.torch import load_file, save_file

    shards = weight_files(source)
    mean = load_file(source / shards[BASE_EMBEDDING])[BASE_EMBEDDING].float().mean(0, keepdim=True)
    rewritten = {shards[EXTRA_EMBEDDING], shards[EXTRA_HEAD]}
    for name in rewritten:
        tensors = load_file(source / name)
        for key in (EXTRA_EMBEDDING, EXTRA_HEAD):
            if key in tensors:
                tensors[key] = torch.cat([tensors[key], mean.to(tensors[key].dtype)])
        save_file(tensors, output / name, metadata={"format": "pt"})
    return rewritten


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
