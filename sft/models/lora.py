"""Low-rank adapters (LoRA) through PEFT: put into a model, written as a PEFT folder, read back, merged.

Adapters are put into the model's own layers (transformers' `add_adapter`), so it keeps its class and its forward.
What is trained beside them (the extra rows, the gates, the resampler) is trained in place and stands in the same
`adapter_model.safetensors` under its full name: PEFT and transformers load every tensor of that file whose name the
model has. PEFT's `modules_to_save` cannot do this for the gates, which are parameters and no modules.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sft.core.errors import UserError
from sft.models import adapter_settings
from sft.recipe import LoraSettings

if TYPE_CHECKING:
    from peft import LoraConfig

    from sft.models.packed_model import PackedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ADAPTER = ".default."


def add_adapters(model: PackedModel, pattern: str, settings: LoraSettings, base: str | Path) -> None:
    """Put fresh float32 adapters beside the linear layers whose whole name matches `pattern`; freeze everything else.

    They change nothing yet: B is zero. The name of the base and its class in transformers are written to their config,
    for whoever loads them.

    Raises:
        UserError: no layer matches.
    """
    from peft import LoraConfig

    if not any(re.fullmatch(pattern, name) for name, _ in model.named_modules()):
        raise UserError(f"model.lora.targets: this model has no layers of {', '.join(settings.targets)}")
    config = LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=pattern, bias="none"
    )
    _add(model, config)
    config.base_model_name_or_path = str(base)
    for architecture in model.config.architectures or ():  # one, by which `AutoPeftModel` knows what to load
        config.auto_mapping = {"base_model_class": architecture, "parent_library": "transformers"}


def _add(model: Any, config: LoraConfig) -> None:
    with warnings.catch_warnings():
        # PEFT reads a property of the model that transformers 5 has renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        model.add_adapter(config)
    for _, parameter in adapter_parameters(model):
        parameter.data = parameter.data.float()


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Return the matrices A and B of all adapters, with their names."""
    return ((name, parameter) for name, parameter in model.named_parameters() if "lora_" in name)


def has_adapters(model: nn.Module) -> bool:
    """Return whether adapters were put into the model."""
    return next(adapter_parameters(model), None) is not None


def save_adapters(model: PackedModel, directory: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write everything that is trained as a PEFT folder: the adapters, and the weights trained beside them.

    `weights` are those of the model, where its parameters hold but a share of them.
    """
    from safetensors.torch import save_file

    trained = {
        _PREFIX + name.replace(_ADAPTER, "."): (weights[name] if weights else parameter).detach().contiguous().cpu()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(trained, directory / WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config["default"]
    before = config.inference_mode
    config.inference_mode = True
    config.save_pretrained(directory)
    config.inference_mode = before


def is_adapter_folder(path: str | Path) -> bool:
    """Return whether a folder holds adapters rather than a model."""
    return (Path(path) / CONFIG).is_file()


def read_config(folder: Path) -> LoraConfig:
    """Read the config of a folder of adapters.

    Raises:
        UserError: see `adapter_settings`.
    """
    from peft import LoraConfig

    adapter_settings(folder)
    try:
        config: LoraConfig = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"{folder / CONFIG}: damaged, not the config of an adapter ({error})") from error
    return config


def load_adapters(model: PackedModel, folder: Path) -> dict[str, Tensor]:
    """Put trained adapters into a base model, and the weights that were trained beside them; nothing stays trainable.

    Returns the base's own weights where others took their place, for `remove_adapters`.

    Raises:
        UserError: they are not adapters of this model. It is as it was then.
    """
    config = read_config(folder)
    replaced: dict[str, Tensor] = {}
    try:
        _add(model, config)
        _fill(model, folder, replaced)
    except (UserError, ValueError) as error:
        remove_adapters(model, replaced)
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder}: {error}; was it trained on another model?") from error  # PEFT's: no such layers
    model.requires_grad_(False)
    return replaced


def continue_adapters(model: PackedModel, folder: Path, group_of: Callable[[str], str]) -> None:
    """Give the adapters of a model, and what is trained beside them, the weights in a folder, so that training goes on.

    Raises:
        UserError: they stand at other layers, or a group is frozen now of which the folder holds weights: the next
            checkpoint would lack it.
    """
    with open_weights(folder) as tensors:
        given = {key.removeprefix(_PREFIX) for key in tensors.keys()}  # noqa: SIM118
    is_trained = {name.replace(_ADAPTER, "."): weight.requires_grad for name, weight in model.named_parameters()}
    own = {name for name, trained in is_trained.items() if trained}
    if apart := sorted(name for name in own ^ given if "lora_" in name):
        lack, layer = "lack" if apart[0] in own else "have", apart[0].partition(".lora_")[0]
        raise UserError(f"model.lora.targets: the adapters of {folder} {lack} {layer}; name the targets they have")
    if frozen := sorted({group_of(name) for name in given & is_trained.keys() - own}):
        raise UserError(f"model.trainable: the adapters of {folder} hold weights of {', '.join(frozen)}; add these")
    _fill(model, folder, {})


def _fill(model: nn.Module, folder: Path, replaced: dict[str, Tensor]) -> None:
    """Give fresh adapters, and what was trained beside them, their weights; `replaced` gets those of the base."""
    parameters = dict(model.named_parameters())
    wanted = {name.replace(_ADAPTER, "."): name for name, _ in adapter_parameters(model)}
    with open_weights(folder) as tensors:
        given = {key.removeprefix(_PREFIX): key for key in tensors.keys()}  # noqa: SIM118
        for short in sorted(wanted.keys() | given.keys()):
            parameter = parameters.get(wanted.get(short, short))
            if short not in given or parameter is None:
                where = "the adapter lacks" if short not in given else "its base model has no"
                raise UserError(f"{folder}: {where} {short}; was it trained on another model?")
            tensor = tensors.get_tensor(given[short])
            if tensor.shape != parameter.shape:
                raise UserError(
                    f"{folder}: {short} has shape {tuple(tensor.shape)}, the base model's has {tuple(parameter.shape)}"
                )
            if short not in wanted:
                replaced[short] = parameter.data
            parameter.data = tensor.to(parameter.device)


def remove_adapters(model: PackedModel, replaced: dict[str, Tensor]) -> None:
    """Make a model the base again that it was before `load_adapters`, which returned `replaced`."""
    from peft.tuners.lora import LoraLayer

    for name, layer in [*model.named_modules()]:
        if isinstance(layer, LoraLayer):
            model.set_submodule(name, layer.get_base_layer())
    for name, tensor in replaced.items():
        model.get_parameter(name).data = tensor
    for name in ("peft_config", "_hf_peft_config_loaded"):  # by which transformers knows of adapters
        vars(model).pop(name, None)


def open_weights(folder: Path) -> Any:
    """Open the tensors of a folder of adapters, to be read one by one.

    Raises:
        UserError: they are missing or damaged.
    """
    try:
        return safe_open(folder / WEIGHTS, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS}: not readable as safetensors ({error})") from error


class Merger:
    """Weights of a base with a folder of adapters merged in, one tensor at a time."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            UserError: see `read_config` and `open_weights`.
        """
        config = read_config(folder)
        self.folder = folder
        self.scaling = config.lora_alpha / config.r
        self._tensors = open_weights(folder)
        self._unused = {key.removeprefix(_PREFIX) for key in self._tensors.keys()}  # noqa: SIM118

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight of the base as adapted: W + alpha / r * B A in float32, or what was trained in its place."""
        if name in self._unused:
            return self._take(name)
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" not in self._unused:
            return weight
        a, b = self._take(f"{layer}.lora_A.weight"), self._take(f"{layer}.lora_B.weight")
        return torch.addmm(weight.float(), b.float(), a.float(), alpha=self.scaling)

    def check_all_used(self) -> None:
        """
        Raises:
            UserError: the base lacks a layer that an adapter is for.
        """
        if self._unused:
            raise UserError(f"{self.folder}: the base model has no {min(self._unused)}; was it trained on another?")

    def _take(self, name: str) -> Tensor:
        self._unused.remove(name)
        tensor: Tensor = self._tensors.get_tensor(_PREFIX + name)
        return tensor
