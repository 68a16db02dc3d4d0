"""The model folders of families whose images are part of the text: what the toolkit asks of them
(`sft.models.family.Weights`).

How images are cut stands in preprocessor_config.json. A config that is loaded here has it as its attribute
`preprocessor`, so that it goes wherever the config goes, and back into a file of its own when a model is saved.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from sft.core.errors import UserError
from sft.models.family_folder import PLAIN_NAMES, FamilyFolder
from sft.models.inline_model import InlineImages
from sft.models.model_folder import check_weights, local_folder, new_base, write_json
from sft.models.preprocessor import PREPROCESSOR, PROCESSOR, read_preprocessor, with_settings

LORA_LAYERS = {
    "vision.attention": r"model\.vision_model\.encoder\.layers\.\d+\.self_attn\.(q|k|v|out)_proj",
    "vision.mlp": r"model\.vision_model\.encoder\.layers\.\d+\.mlp\.fc[12]",
    "language.attention": r"model\.text_model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
    "language.mlp": r"model\.text_model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
}
"""Linear layers that adapters can stand beside, but for those of the connector. Anchored at the front: the names that
the published notebook gives hit six layers of the tower for twenty that it means."""

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


class InlineFolder(FamilyFolder):
    """The folders of a family whose images are part of the text."""

    text_type: str
    """`model_type` of the language models that are known to pack without leaks."""
    groups = MappingProxyType(
        {
            "model.vision_model.": "vision",
            "model.connector.": "connector",
            "model.text_model.embed_tokens.": "embeddings",
            "model.text_model.": "language",
            "lm_head.": "head",
        }
    )
    exact = ("lm_head.", "model.vision_model.embeddings.")
    """The head computes in float32 in evaluation. The first of all matrices gives the type in which SmolVLM's own
    forward puts image states among embeddings, which are float32."""
    quantised = ("language",)
    not_decayed: tuple[str, ...] = ("bias", "layernorm", "layer_norm")
    """As m4's rule has it; `text_model.norm` is decayed."""
    images: Callable[[PreTrainedConfig], InlineImages]
    load_tokenizer: Callable[[str | Path], PreTrainedTokenizerFast]

    def load_config(self, path: str | Path) -> Any:
        """Load the config of a model folder or hub id, with what its preprocessor_config.json says.

        Raises:
            UserError: there is none, it is of another family, or of a kind that no released model has.
        """
        folder = local_folder(path)
        config = super().load_config(folder)
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
        kind = PLAIN_NAMES[config.model_type].removesuffix("ForConditionalGeneration")
        images = self.images(config)
        names = {"image_processor_type": f"{kind}ImageProcessor", "processor_class": f"{kind}Processor"}
        write_json(directory / PREPROCESSOR, {**DEFAULTS, **config.preprocessor, **images.preprocessor(), **names})
        processor = {"image_seq_len": images.states_per_tile, "processor_class": f"{kind}Processor"}
        write_json(directory / PROCESSOR, processor)
        tokenizer.save_pretrained(directory)

    def prepare_base(self, path: str | Path, output: Path, images: Mapping[str, Any] | None = None) -> None:
        """Write a base that cuts images as `images` (`model.images` of a recipe) says. Every released model has all
        tokens of the chat template, so weights and tokenizer are linked as they are.

        Raises:
            UserError: the folder is no model of this family, or its tokenizer has more tokens than the model has rows.
        """
        source = local_folder(path)
        config = self.load_config(source)
        check_weights(source, self.expected_weights(config))
        tokenizer = self.load_tokenizer(source)
        if len(tokenizer) > (rows := config.text_config.vocab_size):
            raise UserError(f"{path}: the tokenizer has {len(tokenizer)} tokens, the model {rows}")
        found, expected = tokenizer.convert_tokens_to_ids("<image>"), config.image_token_id
        if found != expected:
            raise UserError(f"{path}: <image> has id {found} in the tokenizer and {expected} in config.json")
        config.preprocessor = with_settings(config.preprocessor, images or {})
        with new_base(source, output) as folder:
            self.save_processor(tokenizer, config, folder)


def _check_pixels(preprocessor: Mapping[str, Any], kernel: int) -> None:
    """
    Raises:
        UserError: pixels are to be made in another way than they are here.
    """
    for name, allowed in {**ALLOWED, "resample": (kernel,)}.items():
        value = preprocessor.get(name)
        if value is not None and (round(value, 6) if isinstance(value, float) else value) not in allowed:
            expected = " or ".join(map(json.dumps, allowed))
            raise UserError(f"{PREPROCESSOR}: {name} is {json.dumps(value)}; this family has {expected} only")
