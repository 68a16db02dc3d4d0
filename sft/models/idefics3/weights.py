"""The folders of Idefics3 and SmolVLM: what the toolkit asks of them (`sft.models.family.Weights`).

How images are cut stands in preprocessor_config.json. A config that is loaded here has it as its attribute
`preprocessor`, so that it goes wherever the config goes, and back into a file of its own when a model is saved.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast

from sft import models
from sft.core.errors import UserError
from sft.models.idefics3.images import TiledImages
from sft.models.idefics3.names import MODEL_TYPES
from sft.models.idefics3.packed import PackedIdefics3, PackedSmolVLM, model_class, use_grouped_attention
from sft.models.idefics3.text import load_tokenizer
from sft.models.idefics3.tilings import PREPROCESSOR, PROCESSOR, read_preprocessor, with_settings
from sft.models.model_folder import (
    check_weights,
    choose_trainable,
    find_group,
    layer_pattern,
    load_weights,
    local_folder,
    new_base,
    write_plain_config,
)
from sft.models.model_folder import weight_files as weight_files
from sft.models.packed_model import PackedModel

HEAD = "lm_head.weight"

GROUP_OF = {
    "model.vision_model.": "vision",
    "model.connector.": "connector",
    "model.text_model.embed_tokens.": "embeddings",
    "model.text_model.": "language",
    "lm_head.": "head",
}
"""The group of parameters that a name begins with."""

EXACT = ("lm_head.", "model.vision_model.embeddings.")
"""Matrices that are float32 wherever they are frozen. The head computes in float32 in evaluation. The first of all
matrices gives the type in which SmolVLM's own forward puts image states among embeddings, which are float32."""

LORA_LAYERS = {
    "vision.attention": r"model\.vision_model\.encoder\.layers\.\d+\.self_attn\.(q|k|v|out)_proj",
    "vision.mlp": r"model\.vision_model\.encoder\.layers\.\d+\.mlp\.fc[12]",
    "connector": r"model\.connector\.modality_projection\.proj",
    "language.attention": r"model\.text_model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
    "language.mlp": r"model\.text_model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
}
"""Whole names of the linear layers that adapters can stand beside. Anchored at the front: the names that the published
notebook gives hit six layers of the tower for twenty that it means."""

NOT_DECAYED = ("bias", "layernorm", "layer_norm")
"""Parameters whose name holds one of these are not decayed, as m4's rule has it; `text_model.norm` is decayed."""

DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(
        ("do_convert_rgb", "do_image_splitting", "do_normalize", "do_pad", "do_rescale", "do_resize"), True
    ),
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "rescale_factor": 1 / 255,
    "resample": 1,  # 1: Lanczos
}
"""What preprocessor_config.json of every released model says besides the sizes."""


def load_config(path: str | Path) -> PreTrainedConfig:
    """Load the config of a model folder or hub id, with what its preprocessor_config.json says.

    Raises:
        UserError: there is none, it is of another family, or of a kind that no released model has.
    """
    folder = local_folder(path)
    values = models.read_config(folder)
    if values.get("model_type") not in MODEL_TYPES:
        known = " or ".join(MODEL_TYPES)
        raise UserError(f"{path}: model_type is {values.get('model_type')!r}; model.family loads {known}")
    config: PreTrainedConfig = AutoConfig.for_model(**values)
    if (kind := config.text_config.model_type) != "llama":
        raise UserError(f"{path}: text_config.model_type is {kind!r}; only 'llama' is known to pack without leaks")
    config.preprocessor = read_preprocessor(folder)
    tile, image_size = TiledImages(config).tiles.tile, config.vision_config.image_size
    if tile != image_size:
        raise UserError(f"{path}: {PREPROCESSOR} cuts tiles of {tile} pixels, the vision tower takes {image_size}")
    return config


def save_processor(tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig, directory: Path) -> None:
    """Write what transformers' `AutoProcessor` and servers read: the tokenizer, and how images become tiles. Keys that
    the base had, such as those of videos, are kept."""
    kind, images = _class_names(config.model_type), TiledImages(config)
    preprocessor = {
        **DEFAULTS,
        **config.preprocessor,
        "image_processor_type": f"{kind}ImageProcessor",
        "processor_class": f"{kind}Processor",
        "size": {"longest_edge": images.tiles.longest_edge},
        "max_image_size": {"longest_edge": images.tiles.tile},
    }
    _write_json(directory / PREPROCESSOR, preprocessor)
    _write_json(directory / PROCESSOR, {"image_seq_len": images.states_per_tile, "processor_class": f"{kind}Processor"})
    tokenizer.save_pretrained(directory)


def _class_names(model_type: str) -> str:
    """Return what transformers' classes of a model begin with."""
    return "SmolVLM" if model_type == "smolvlm" else "Idefics3"


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def prepare_base(path: str | Path, output: Path, images: Mapping[str, Any] | None = None) -> None:
    """Write a base that cuts images as `images` (`model.images` of a recipe) says. Every released model has all tokens
    of the chat template, so weights and tokenizer are linked as they are.

    Raises:
        UserError: the folder is not a model of this family, or its tokenizer has more tokens than the model has rows.
    """
    source = local_folder(path)
    config = load_config(source)
    check_weights(source, _expected_weights(config))
    tokenizer = load_tokenizer(source)
    if len(tokenizer) > config.text_config.vocab_size:
        raise UserError(f"{path}: the tokenizer has {len(tokenizer)} tokens, the model {config.text_config.vocab_size}")
    if (found := tokenizer.convert_tokens_to_ids("<image>")) != config.image_token_id:
        raise UserError(f"{path}: <image> has id {found} in the tokenizer and {config.image_token_id} in config.json")
    config.preprocessor = with_settings(config.preprocessor, images or {})
    with new_base(source, output) as folder:
        save_processor(tokenizer, config, folder)


def _expected_weights(config: PreTrainedConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return _without_tied(config, model_class(config)(config).state_dict())


def _without_tied(config: PreTrainedConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the head where it is the embedding, as files of weights do."""
    return {name: weight for name, weight in weights.items() if not (config.tie_word_embeddings and name == HEAD)}


def load_model(
    path: str | Path,
    *,
    trained: Collection[str] | None = None,
    frozen_dtype: torch.dtype = torch.float32,
    quantised: bool = False,
    device: torch.device | str = "cpu",
) -> PackedIdefics3 | PackedSmolVLM:
    """Load a model folder or hub id, ready for packed training, evaluation and generation (`load_weights`). In 4 bits
    are the layers of the language model alone.

    Raises:
        UserError: the folder is not a model of this family, or weights are missing, damaged or of another shape.
    """
    folder = local_folder(path)
    config = load_config(folder)
    model = load_weights(
        model_class(config),
        folder,
        _expected_weights(config),
        config=config,
        trained=trained,
        frozen_dtype=frozen_dtype,
        exact=EXACT,
        in_4_bits=("language",) if quantised else (),
        group_of=GROUP_OF,
        device=device,
    )
    use_grouped_attention(model)
    return model


def save_model(
    model: PackedModel, directory: Path, dtype: torch.dtype, weights: dict[str, Tensor] | None = None
) -> None:
    """Write weights rounded once to `dtype`, and the config, as of transformers' plain class.

    `weights` are those of the model, where its parameters hold but a share of them.
    """
    own = _without_tied(model.config, weights or model.state_dict())
    model.save_pretrained(directory, state_dict={name: weight.to(dtype) for name, weight in own.items()})
    write_config(json.loads((directory / "config.json").read_text()), directory, dtype)


def write_config(config: dict[str, Any], directory: Path, dtype: torch.dtype) -> None:
    """Write config.json for weights of `dtype`, as of the plain class."""
    plain = f"{_class_names(config['model_type'])}ForConditionalGeneration"
    write_plain_config({key: value for key, value in config.items() if key != "preprocessor"}, directory, dtype, plain)


def encoder_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the part of a config, as JSON, that the states of an image depend on."""
    values = config.to_dict()
    return {name: values[name] for name in ("vision_config", "scale_factor", "preprocessor")}


def group_of(name: str) -> str:
    """Return the group of a parameter; an adapter belongs to the group of its layer."""
    return find_group(name, GROUP_OF)


def is_decayed(name: str) -> bool:
    """Return whether weight decay acts on a parameter."""
    return not any(part in name for part in NOT_DECAYED)


def lora_pattern(targets: Collection[str]) -> str:
    """Return a regular expression for the whole names of the linear layers that `model.lora.targets` names."""
    return layer_pattern(LORA_LAYERS, targets)


def select_trainable(model: nn.Module, groups: Collection[str] | None = None) -> tuple[str, ...]:
    """Make the weights of some groups (None: all) trainable, and adapters if there are any; freeze everything else. No
    parameter is left without a gradient.

    Raises:
        UserError: the head is to be trained without the embeddings, which it is tied to.
    """
    assert isinstance(model, PackedModel)
    if groups is not None and model.config.tie_word_embeddings and ("head" in groups) != ("embeddings" in groups):
        raise UserError("model.trainable: this model's head is tied to its embeddings; name both, or neither")
    return choose_trainable(model, lambda name: groups is None or group_of(name) in groups)
