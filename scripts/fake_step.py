"""Memory and floating-point operations of one training step, measured on the real model without its weights.

torch's `FakeTensorMode` runs forward, backward and optimizer with tensors that have a shape and no data, `MemTracker`
follows every storage from its allocation to its release and `FlopCounterMode` counts every matrix product.
scripts/check_cost.py compares the formula with the result.

The number of results of `nonzero` depends on data, which fake tensors lack, so two look-ups are replaced by ones of
known size: the trained positions, and the groups of tokens. Fake tensors are CPU tensors here, so short attention is
sent to the fused kernel that a GPU has.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed._tools.mod_tracker import ModTracker
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import IdeficsConfig

from sft.core.sample import Batch
from sft.cost.family import Setting
from sft.models import grouped_attention, packed_model
from sft.models.activation_checkpointing import recompute_share
from sft.models.grouped_attention import Groups, group_tokens
from sft.models.idefics import packed
from sft.models.idefics.images import IdeficsImages
from sft.models.idefics.names import GROUPS
from sft.models.idefics.weights import weights
from sft.models.model_folder import kept_exact
from sft.models.packed_model import PackedModel
from sft.recipe import TrainingConfig
from sft.training.optimizer import make_optimizer, parameter_groups


class FakeStep(NamedTuple):
    """What one step took."""

    peak_bytes: int
    flop: int
    """Operations of a micro-batch, forward and backward."""
    trainable_parameters: int


class _NoModules(ModTracker):
    """Follows no modules. Its base class does so by hooks on the graph, which never fire in a recomputed layer and keep
    its activations alive to the end (torch 2.13); only totals are wanted here."""

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *args: object) -> None:
        pass


def run_fake_step(config: IdeficsConfig, setting: Setting) -> FakeStep:
    """Run the last micro-batch of a step and the optimizer's update on one device, and return what they take."""
    groups = [group_tokens(ids) for ids in _group_ids(setting)]
    fake = FakeTensorMode()
    groups = tree_map_only(Tensor, fake.from_tensor, groups)
    with fake, _known_sizes(setting, groups):
        model = _build(config, setting)
        batch = _batch(config, setting)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = _optimizer(model, setting)
        for parameter in trainable:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        if not setting.accumulates:
            optimizer.zero_grad(set_to_none=True)
        memory, flops = MemTracker(), FlopCounterMode(display=False, custom_mapping=_MORE_FLOP)
        memory._mod_tracker = flops.mod_tracker = _NoModules()  # type: ignore[assignment,no-untyped-call]
        memory.track_external(
            model, optimizer, *batch.tiles, *(() if batch.features_RE is None else (batch.features_RE,))
        )
        autocast = torch.autocast("cpu", getattr(torch, setting.precision), enabled=setting.precision != "float32")
        # Memory is the inner one: counting takes operations apart, and their parts would be held at once.
        with flops, memory, _GpuTypes(), _as_if_autocast():
            with autocast:
                loss = model(batch=batch).loss
            loss.backward()
            optimizer.step()
    (peak,) = memory.get_tracker_snapshot("peak").values()
    return FakeStep(
        peak_bytes=peak["Total"],
        flop=flops.get_total_flops(),
        trainable_parameters=sum(parameter.numel() for parameter in trainable),
    )


def _group_ids(setting: Setting) -> tuple[Tensor, Tensor]:
    """Return segment and image ids of a micro-batch that one sample fills, with images at even distances."""
    text = torch.zeros(setting.tokens, dtype=torch.long)
    if not setting.images:
        return text, text - 1
    return text, torch.arange(setting.tokens) * setting.images // setting.tokens


def _batch(config: IdeficsConfig, setting: Setting) -> Batch:
    shown, images = IdeficsImages(config), setting.images
    size, states, state_size = shown.one_tile.height, shown.num_states(shown.one_tile), shown.state_size
    tokens = torch.zeros(setting.tokens, dtype=torch.long)
    return Batch(
        input_ids_T=tokens,
        labels_T=tokens,
        position_ids_T=tokens,
        segment_ids_T=tokens,
        image_ids_T=tokens,
        source_ids_T=tokens,
        state_ids_T=tokens,
        tiles=() if setting.encoded or not images else (torch.zeros(images, 3, size, size, dtype=torch.uint8),),
        num_states=(states,) * images,
        tilings=(shown.one_tile,) * images,
        features_RE=torch.zeros(images * states, state_size).half() if setting.encoded else None,
        num_trained_tokens=setting.trained_tokens,
    )


@contextmanager
def _as_if_autocast() -> Iterator[None]:
    """Make `torch.is_autocast_enabled` return True: PEFT's layers ask it, without a device, about a GPU's autocast.
    Autocast asks too, to restore on leaving what it found, so what was there before is restored here."""
    before = torch.is_autocast_enabled("cpu")
    try:
        with patch.object(torch, "is_autocast_enabled", lambda *device: True):
            yield
    finally:
        torch.set_autocast_enabled("cpu", before)


class _GpuTypes(TorchFunctionMode):
    """Computes in float32 what autocast computes in float32 on a GPU, but not on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.layer_norm, Tensor.softmax) and args[0].dtype != torch.float32:
            args = tree_map_only(Tensor, Tensor.float, args)
            kwargs = tree_map_only(Tensor, Tensor.float, kwargs)
        return func(*args, **kwargs or {})


@contextmanager
def _known_sizes(setting: Setting, groups: list[Groups]) -> Iterator[None]:
    """Replace look-ups whose size depends on data by ones of known size, and bitsandbytes' tables by empty ones."""
    both = iter(groups)

    with (
        patch.object(packed_model, "group_tokens", lambda ids: next(both)),
        patch.object(packed, "group_tokens", lambda ids: next(both)),
        patch.object(packed_model, "trained_positions", lambda labels: torch.arange(setting.trained_tokens)),
        patch.object(grouped_attention, "_SHORT", 0),
        patch.object(bnb.functional, "create_dynamic_map", lambda *args, **kwargs: torch.zeros(256)),
        patch.dict(bnb.functional.name2qmap, clear=True),  # bitsandbytes keeps such tables; not the fake ones
    ):
        yield


def _build(config: IdeficsConfig, setting: Setting) -> PackedModel:
    """Return the model as training has it: types of its weights, frozen parameters, adapters, checkpointing."""
    half = getattr(torch, setting.precision)
    model = packed.PackedIdefics(config)
    model.use_grouped_attention()
    model.requires_grad_(False)
    trained = [group for group in GROUPS if setting.trains(group)]
    if len(trained) < len(GROUPS):
        _round_frozen(model, half, set(kept_exact(model, trained, weights.exact, weights.groups)))
    if setting.mode == "qlora":
        _quantise(model, [group for group in weights.quantised if group not in trained])
    if setting.mode != "full":
        _add_adapters(model, setting)
    weights.select_trainable(model, trained)
    model.train()
    if setting.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        recompute_share(model, setting.checkpointing)
    return model


def _round_frozen(model: nn.Module, dtype: torch.dtype, exact: Collection[str]) -> None:
    """Store parameters in `dtype`, except those named in `exact`."""
    for name, parameter in list(model.named_parameters()):
        if name not in exact:
            parent, _, own = name.rpartition(".")
            rounded = nn.Parameter(parameter.to(dtype), requires_grad=False)
            setattr(model.get_submodule(parent), own, rounded)


class _FourBitLinear(bnb.nn.Linear4bit):  # type: ignore[misc]
    """bitsandbytes' layer by its own operators, which take fake tensors; its parameter class does not."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = linear.weight.dtype
        packed, state = bnb.functional.quantize_4bit(linear.weight, compress_statistics=True, quant_type="nf4")
        weight: Any = nn.Parameter(packed, requires_grad=False)
        weight.compress_statistics, weight.quant_type = True, "nf4"  # what PEFT asks
        self.weight = weight
        self.bias = linear.bias
        self.state = state
        self.absmax, self.absmax_of_absmax = nn.Buffer(state.absmax), nn.Buffer(state.state2.absmax)

    def forward(self, x: Tensor) -> Tensor:
        result = bnb.matmul_4bit(x.to(self.compute_dtype), self.weight, quant_state=self.state, bias=self.bias)
        return torch.as_tensor(result.to(x.dtype))


def _quantise(model: Any, groups: Collection[str]) -> None:
    """Replace the linear layers of some groups by layers in nf4 with double quantisation."""
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and weights.group_of(f"{name}.weight") in groups:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, _FourBitLinear(linear))
    model.is_loaded_in_4bit = True  # so that PEFT wraps them in its layer for bitsandbytes


_MODULES = {
    "language": r"model\.layers\.\d+\.\w+",
    "cross_attention": r"model\.gated_cross_attn_layers\.\d+\.\w+",
    "resampler": r"model\.perceiver_resampler\.blocks\.\d+\.\d+",
    "vision": r"model\.vision_model\.encoder\.layers\.\d+\.\w+",
}


def _add_adapters(model: Any, setting: Setting) -> None:
    """Add LoRA adapters in float32 to the layers of the setting."""
    from peft import LoraConfig, inject_adapter_in_model

    layers = (layer.split(".") for layer in setting.lora_layers)
    targets = "|".join(rf"({_MODULES[group]}\.{name})" for group, name in layers)
    adapters = LoraConfig(r=setting.lora_rank, lora_dropout=setting.lora_dropout, target_modules=targets)
    # Fake tensors cannot be moved, and are on the right device.
    with patch.object(nn.Module, "to", lambda self, *args, **kwargs: self):
        inject_adapter_in_model(adapters, model)


def _optimizer(model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    training = TrainingConfig(max_steps=1, tokens_per_step=1, learning_rate=1e-5, optimizer=setting.optimizer)
    return make_optimizer(parameter_groups(model, training, weights), training, model)


def _four_bit_flop(x: Sequence[int], packed: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Return the operations of `x @ weight.T`; all arguments are shapes."""
    return 2 * math.prod(x) * weight[0]


def _attention_flop(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward_flop(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]


_MORE_FLOP = {
    torch.ops.bitsandbytes.gemm_4bit: _four_bit_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
}
"""Products that `FlopCounterMode` does not count itself: bitsandbytes', and attention on a CPU."""
