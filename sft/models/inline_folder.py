"""The model folders of families whose images are part of the text: what the toolkit asks of them
(`sft.models.family.Weights`).

How images are cut stands in preprocessor_config.json. A config that is loaded here has it as its attribute
`preprocessor`, so that it goes wherever the config goes, and back into a file of its own when a model is saved.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast

from sft import models
from sft.core.errors import UserError
from sft.models.inline_model import InlineImages, InlineModel
from sft.models.model_folder import (
    check_weights,
    choose_trainable,
    find_group,
    layer_pattern,
    load_weights,
    local_folder,
    new_base,
    weight_files,
    write_plain_config,
)
from sft.models.packed_model import PackedModel
from sft.models.preprocessor import PREPROCESSOR, PROCESSOR, read_preprocessor, with_settings

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
    "language.attention": r"model\.text_model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
    "language.mlp": r"model\.text_model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
}
"""Whole names of the linear layers that adapters can stand beside, but for those of the connector. Anchored at the
front: the names that the published notebook gives hit six layers of the tower for twenty that it means."""

DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(
        ("do_convert_rgb", "do_image_splitting", "do_normalize", "do_pad", "do_rescale", "do_resize"), True
    ),
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "rescale_factor": 1 / 255,
}
"""What preprocessor_config.json of every released model says besides the sizes."""

ALLOWED: dict[str, tuple[Any, ...]] = {
    **{name: (DEFAULTS[name],) for name in ("do_normalize", "do_rescale", "do_resize", "image_mean", "image_std")},
    "rescale_factor": (round(1 / 255, 6),),
    "do_image_splitting": (True, False),
}
"""Values of what pixels and tokens depend on. With others a model would see what it does not know."""


class InlineFolder:
    """The folders of a family."""

    model_types: tuple[str, ...]
    text_type: str
    """`model_type` of the language models that are known to pack without leaks."""
    encoder_parts: tuple[str, ...]
    """Keys of config.json that the states of an image depend on, besides `vision_config`."""
    connector_layers: Mapping[str, str]
    """The part of LORA_LAYERS that the family has for itself."""
    not_decayed: tuple[str, ...] = ("bias", "layernorm", "layer_norm")
    """Parameters whose name holds one of these are not decayed, as m4's rule has it; `text_model.norm` is decayed."""
    images: Callable[[PreTrainedConfig], InlineImages]
    load_tokenizer: Callable[[str | Path], PreTrainedTokenizerFast]
    model_class: Callable[[PreTrainedConfig], type[InlineModel]]
    weight_files = staticmethod(weight_files)

    def load_config(self, path: str | Path) -> PreTrainedConfig:
        """Load the config of a model folder or hub id, with what its preprocessor_config.json says.

        Raises:
            UserError: there is none, it is of another family, or of a kind that no released model has.
        """
        folder = local_folder(path)
        values = models.read_config(folder)
        if values.get("model_type") not in self.model_types:
            known = " or ".join(self.model_types)
            raise UserError(f"{path}: model_type is {values.get('model_type')!r}; model.family loads {known}")
        config: PreTrainedConfig = AutoConfig.for_model(**values)
        if (kind := config.text_config.model_type) != self.text_type:
            only = f"only {self.text_type!r} is known to pack without leaks"
            raise UserError(f"{path}: text_config.model_type is {kind!r}; {only}")
        config.preprocessor = read_preprocessor(folder)
        try:
            _check_pixels(config.preprocessor, self.images(config).preprocessor()["resample"])
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        return config

    def save_processor(self, tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig, directory: Path) -> None:
        """Write what transformers' `AutoProcessor` and servers read: the tokenizer, and how images become tiles. Keys
        that the base had, such as those of videos, are kept."""
        kind, images = _class_names(config.model_type), self.images(config)
        names = {"image_processor_type": f"{kind}ImageProcessor", "processor_class": f"{kind}Processor"}
        _write_json(directory / PREPROCESSOR, {**DEFAULTS, **config.preprocessor, **images.preprocessor(), **names})
        processor = {"image_seq_len": images.states_per_tile, "processor_class": f"{kind}Processor"}
        _write_json(directory / PROCESSOR, processor)
        tokenizer.save_pretrained(directory)

    def prepare_base(self, path: str | Path, output: Path, images: Mapping[str, Any] | None = None) -> None:
        """Write a base that cuts images as `images` (`model.images` of a recipe) says. Every released model has all
        tokens of the chat template, so weights and tokenizer are linked as they are.

        Raises:
            UserError: the folder is no model of this family, or its tokenizer has more tokens than the model has rows.
        """
        source = local_folder(path)
        config = self.load_config(source)
        check_weights(source, self._expected_weights(config))
        tokenizer = self.load_tokenizer(source)
        if len(tokenizer) > (rows := config.text_config.vocab_size):
            raise UserError(f"{path}: the tokenizer has {len(tokenizer)} tokens, the model {rows}")
        found, expected = tokenizer.convert_tokens_to_ids("<image>"), config.image_token_id
        if found != expected:
            raise UserError(f"{path}: <image> has id {found} in the tokenizer and {expected} in config.json")
        config.preprocessor = with_settings(config.preprocessor, images or {})
        with new_base(source, output) as folder:
            self.save_processor(tokenizer, config, folder)

    def _expected_weights(self, config: PreTrainedConfig) -> dict[str, Tensor]:
        with torch.device("meta"):
            return _without_tied(config, self.model_class(config)(config).state_dict())

    def load_model(
        self,
        path: str | Path,
        *,
        trained: Collection[str] | None = None,
        frozen_dtype: torch.dtype = torch.float32,
        quantised: bool = False,
        device: torch.device | str = "cpu",
    ) -> InlineModel:
        """Load a model folder or hub id, ready for packed training, evaluation and generation (`load_weights`). In 4
        bits are the layers of the language model alone.

        Raises:
            UserError: the folder is not a model of this family, or weights are missing, damaged or of another shape.
        """
        folder = local_folder(path)
        config = self.load_config(folder)
        model = load_weights(
            self.model_class(config),
            folder,
            self._expected_weights(config),
            config=config,
            trained=trained,
            frozen_dtype=frozen_dtype,
            exact=EXACT,
            in_4_bits=("language",) if quantised else (),
            group_of=GROUP_OF,
            device=device,
        )
        # A config may tie a head that the folder has for itself: transformers keeps such a head, and so does saving.
        model.config.tie_word_embeddings &= model.lm_head.weight is model.model.text_model.embed_tokens.weight
        model.use_grouped_attention()
        return model

    def save_model(
        self, model: PackedModel, directory: Path, dtype: torch.dtype, weights: dict[str, Tensor] | None = None
    ) -> None:
        """Write weights rounded once to `dtype`, and the config, as of transformers' plain class.

        `weights` are those of the model, where its parameters hold but a share of them.
        """
        own = _without_tied(model.config, weights or model.state_dict())
        model.save_pretrained(directory, state_dict={name: weight.to(dtype) for name, weight in own.items()})
        self.write_config(json.loads((directory / "config.json").read_text()), directory, dtype)

    def write_config(self, config: dict[str, Any], directory: Path, dtype: torch.dtype) -> None:
        """Write config.json for weights of `dtype`, as of the plain class."""
        plain = f"{_class_names(config['model_type'])}ForConditionalGeneration"
        own = {key: value for key, value in config.items() if key != "preprocessor"}
        write_plain_config(own, directory, dtype, plain)

    def encoder_settings(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Return the part of a config, as JSON, that the states of an image depend on."""
        values = config.to_dict()
        return {name: values[name] for name in ("vision_config", *self.encoder_parts, "preprocessor")}

    def group_of(self, name: str) -> str:
        """Return the group of a parameter; an adapter belongs to the group of its layer."""
        return find_group(name, GROUP_OF)

    def is_decayed(self, name: str) -> bool:
        """Return whether weight decay acts on a parameter."""
        return not any(part in name for part in self.not_decayed)

    def lora_pattern(self, targets: Collection[str]) -> str:
        """Return a regular expression for the whole names of the linear layers that `model.lora.targets` names."""
        return layer_pattern({**LORA_LAYERS, **self.connector_layers}, targets)

    def select_trainable(self, model: PackedModel, groups: Collection[str] | None = None) -> tuple[str, ...]:
        """Make the weights of some groups (None: all) trainable, and adapters if there are any; freeze everything else.
        No parameter is left without a gradient.

        Raises:
            UserError: the head is to be trained without the embeddings, which it is tied to.
        """
        if groups is not None and model.config.tie_word_embeddings and ("head" in groups) != ("embeddings" in groups):
            raise UserError("model.trainable: this model's head is tied to its embeddings; name both, or neither")
        return choose_trainable(model, lambda name: groups is None or self.group_of(name) in groups)


def _check_pixels(preprocessor: Mapping[str, Any], kernel: int) -> None:
    for name, allowed in {**ALLOWED, "resample": (kernel,)}.items():
        value = preprocessor.get(name)
        if value is not None and (round(value, 6) if isinstance(value, float) else value) not in allowed:
            expected = " or ".join(map(json.dumps, allowed))
            raise UserError(f"{PREPROCESSOR}: {name} is {json.dumps(value)}; this family has {expected} only")


def _class_names(model_type: str) -> str:
    """Return what transformers' classes of a model begin with."""
    return "SmolVLM" if model_type == "smolvlm" else model_type.capitalize()


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _without_tied(config: PreTrainedConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the head where it is the embedding, as files of weights do."""
    return {name: weight for name, weight in weights.items() if not (config.tie_word_embeddings and name == HEAD)}
