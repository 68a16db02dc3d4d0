"""What the model folders of all families share (`sft.models.family.Weights`). Each family says how its own differ."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from sft import models
from sft.core.errors import UserError
from sft.models.model_folder import (
    check_weights,
    find_group,
    kept_exact,
    local_folder,
    quantisation,
    reload_exactly,
    weight_files,
    write_json,
)
from sft.models.packed_model import PackedModel

HEAD = "lm_head.weight"

PLAIN_NAMES: Mapping[str, str] = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
"""transformers' own class of a model, by `model_type`."""


class FamilyFolder:
    """The folders of a family."""

    model_types: tuple[str, ...]
    """Values of `model_type` in config.json."""
    encoder_parts: tuple[str, ...]
    """Keys of config.json that the states of an image depend on."""
    groups: Mapping[str, str]
    """The group of parameters that a name begins with."""
    exact: tuple[str, ...]
    """Matrices that are float32 wherever they are frozen, by the beginnings of their names."""
    quantised: tuple[str, ...]
    """Groups whose weight matrices are stored in 4 bits."""
    lora_layers: Mapping[str, str]
    """Whole names of the linear layers that adapters can stand beside, by names of `model.lora.targets`."""
    not_decayed: tuple[str, ...]
    """Parameters whose name holds one of these are not decayed."""
    never_trained: tuple[str, ...] = ()
    """Beginnings of the names of parameters that never get a gradient."""
    weight_files = staticmethod(weight_files)

    def model_class(self, config: PreTrainedConfig) -> type[PackedModel]:
        """Return the class of a model."""
        raise NotImplementedError

    def load_config(self, path: str | Path) -> Any:
        """Load the config of a model folder or hub id, without its weights.

        Raises:
            UserError: there is none, it is damaged, or of another family.
        """
        return AutoConfig.for_model(**models.read_config(path, self.model_types))

    def expected_weights(self, config: PreTrainedConfig) -> dict[str, Tensor]:
        """Return the names and shapes of all weights of a model's files."""
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
    ) -> PackedModel:
        """Load a model folder or hub id, ready for packed training, evaluation and generation. Parameters of groups in
        `trained` (None: all) are float32, since updates of 1e-5 are lost in bfloat16.

        Matrices of other groups are stored in `frozen_dtype` or, if `quantised`, those of `self.quantised` in nf4 with
        double quantisation (Dettmers et al. 2023, QLoRA) of what is in the folder, computed in `frozen_dtype`.
        Embeddings, norms, biases, gates and what is `exact` are always float32. Quantised weights stay on the `device`
        they are loaded to.

        Raises:
            UserError: the folder is not a model of this family, or weights are missing, damaged or of another shape.
        """
        folder = local_folder(path)
        config = self.load_config(folder)
        check_weights(folder, self.expected_weights(config))
        groups = {*self.groups.values()}
        trained = groups if trained is None else trained
        if groups <= {*trained}:
            frozen_dtype = torch.float32  # nothing is frozen
        options = {}
        if frozen := {*self.quantised} - {*trained} if quantised else set():
            kept = [name for name, group in self.groups.items() if group not in frozen]
            options = quantisation(kept, frozen_dtype, device)
        loaded_dtype = torch.float32 if frozen else frozen_dtype  # nothing is rounded before it is quantised
        model: PackedModel = self.model_class(config).from_pretrained(  # type: ignore[attr-defined]
            folder, config=config, dtype=loaded_dtype, attn_implementation="sdpa", use_safetensors=True, **options
        )
        in_float32 = {*kept_exact(model, trained, self.exact, self.groups)}
        if loaded_dtype != torch.float32:
            reload_exactly(model, folder, in_float32)
        for name, parameter in model.named_parameters():
            if name not in in_float32 and parameter.is_floating_point():
                parameter.data = parameter.data.to(frozen_dtype)
        for module in model.modules():
            if type(module).__name__ == "Linear4bit":
                module.weight.quant_state.dtype = frozen_dtype  # type: ignore[union-attr]  # what it is dequantised to
                # On a CPU with avx512_bf16 a forward without gradients would repack the weights in place, with which
                # the next one with gradients fails (bitsandbytes 0.50.2).
                module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        # A config may tie a head that the folder has for itself: transformers keeps such a head, and so does saving.
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
        model.config.tie_word_embeddings &= head.weight is embeddings.weight
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

    def write_config(self, config: Mapping[str, Any], directory: Path, dtype: torch.dtype) -> None:
        """Write config.json for weights of `dtype`, as of transformers' plain class."""
        own = {key: value for key, value in config.items() if key not in ("preprocessor", "quantization_config")}
        kind = {"architectures": [PLAIN_NAMES[own["model_type"]]], "dtype": str(dtype).removeprefix("torch.")}
        write_json(directory / "config.json", own | kind)

    def encoder_settings(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Return the part of a config, as JSON, that the states of an image depend on."""
        values = config.to_dict()
        return {name: values[name] for name in self.encoder_parts}

    def group_of(self, name: str) -> str:
        """Return the group of a parameter; an adapter belongs to the group of its layer.

        Raises:
            KeyError: not a parameter of this model.
        """
        return find_group(name, self.groups)

    def is_decayed(self, name: str) -> bool:
        """Return whether weight decay acts on a parameter."""
        return not any(part in name for part in self.not_decayed)

    def lora_pattern(self, targets: Collection[str]) -> str:
        """Return a regular expression for the whole names of the linear layers that `model.lora.targets` names:
        `language.mlp`, or `language` for all of the group."""
        layers = self.lora_layers.items()
        return "|".join(f"({pattern})" for name, pattern in layers if {name, name.partition(".")[0]} & {*targets})

    def select_trainable(self, model: PackedModel, groups: Collection[str] | None = None) -> tuple[str, ...]:
        """Make the weights of some groups (None: all) trainable, and adapters if there are any; freeze everything else.

        Returns the names of parameters of these groups that stay frozen, since they never get a gradient.
        `from_pretrained` silently resets what the config's freeze_* flags say, so this is done after every load.

        Raises:
            UserError: the head is to be trained without the embeddings, which it is tied to.
        """
        if groups is not None and model.config.tie_word_embeddings and ("head" in groups) != ("embeddings" in groups):
            raise UserError("model.trainable: this model's head is tied to its embeddings; name both, or neither")
        frozen = []
        for name, parameter in model.named_parameters():
            is_chosen = groups is None or self.group_of(name) in groups
            asked = ".lora_" in name or (".base_layer." not in name and is_chosen)
            if asked and name.startswith(self.never_trained):
                frozen.append(name)
            parameter.requires_grad_(asked and not name.startswith(self.never_trained))
        return tuple(frozen)


def _without_tied(config: PreTrainedConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the head where it is the embedding, as files of weights do."""
    return {name: weight for name, weight in weights.items() if not (config.tie_word_embeddings and name == HEAD)}
