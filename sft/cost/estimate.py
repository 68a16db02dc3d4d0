"""What the training of a recipe needs: memory, time, money, and what to change when it does not fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sft.core.errors import UserError
from sft.cost.devices import DEVICES, GIB, Device
from sft.cost.idefics.configs import read_config
from sft.cost.idefics.formula import Cost, cost, trained_parameters
from sft.cost.idefics.setting import Precision, Setting
from sft.cost.idefics.shapes import Shape, shape_of
from sft.data.store import MANIFEST, Store
from sft.models import names_of_family
from sft.recipe import ENGINES, EngineName, LoraSettings, Recipe, with_overrides
from sft.recipe.engines import check_can_shard, check_engine_precision, resolve_engine
from sft.recipe.optimizers import lighter_optimizers

MAX_GPUS = 1024
"""More are not suggested."""


class Plan(NamedTuple):
    """A recipe's training on some GPUs."""

    shape: Shape
    setting: Setting
    device: Device
    cost: Cost
    micro_batches: int
    """Of each GPU, in an optimizer step."""
    report: dict[str, Any]
    """What --json prints."""


def plan(recipe: Recipe, device: Device, gpus: int, utilisation: float, price_per_hour: float | None) -> Plan:
    """Memory, time and money of a recipe's training, on the fullest micro-batch that the recipe allows.

    Raises:
        UserError: the model's shape is not known, or the GPU lacks what the recipe asks for.
    """
    if recipe.model.family != "idefics":
        raise UserError(f"model.family: plan knows 'idefics', found {recipe.model.family!r}")
    shape = shape_of(read_config(recipe.model.path))
    setting = setting_of(recipe, shape, device, gpus)
    needed = cost(shape, setting)
    fits = needed.peak_bytes <= device.usable_bytes
    micro_batches = math.ceil(recipe.packs_per_step / (recipe.training.micro_batch_packs * gpus))
    seconds = None
    if device.flop_per_second:
        flop = needed.flop * micro_batches * recipe.training.max_steps
        seconds = flop / (device.flop_per_second * utilisation)
    money = None if price_per_hour is None or seconds is None else seconds / 3600 * gpus * price_per_hour
    report = {
        "fits": fits,
        "parameters": shape.parameters,
        "trainable_parameters": trained_parameters(shape, setting),
        "peak_bytes": needed.peak_bytes,
        "bytes": needed.bytes,
        "seconds": seconds,
        "gpus": gpus,
        "cost": money,
        "feature_cache": feature_cache(recipe, shape, setting),
        "checkpointing": list(_by_share(shape, setting, device)),
        "advice": [] if fits else list(_advice(recipe, shape, device, gpus)),
    }
    return Plan(shape, setting, device, needed, micro_batches, report)


def setting_of(recipe: Recipe, shape: Shape, device: Device, gpus: int) -> Setting:
    """The recipe's way to train.

    Raises:
        UserError: bfloat16 is asked of a GPU that has none, or of an engine what it cannot share out.
    """
    model, training, packs = recipe.model, recipe.training, recipe.training.micro_batch_packs
    tokens = packs * recipe.data.sequence_length
    lora = model.lora or LoraSettings()
    engine, precision = _engine(recipe, gpus), _precision(training.precision, device)
    check_can_shard(engine, model.mode, training.optimizer)
    check_engine_precision(engine, precision)
    return Setting(
        tokens=tokens,
        images=packs * recipe.data.max_images_per_pack,
        trained_tokens=tokens,
        mode=model.mode,
        trainable=model.trainable,
        lora_rank=lora.r,
        lora_layers=shape.layers_of(lora.targets),
        lora_dropout=lora.dropout,
        optimizer=training.optimizer,
        engine=engine,
        gpus=gpus,
        checkpointing=training.gradient_checkpointing,
        encoded=recipe.data.feature_cache,
        accumulates=recipe.packs_per_step > packs * gpus,
        precision=precision,
    )


def feature_cache(recipe: Recipe, shape: Shape, setting: Setting) -> dict[str, Any] | None:
    """What `data.feature_cache` takes, as far as the sources are prepared, and the share of the work that it saves from
    the second epoch on; None where the recipe cannot have one."""
    names = names_of_family(recipe.model.family)
    trained = names.groups if recipe.model.trained_groups is None else recipe.model.trained_groups
    if not set(names.encoder_groups).isdisjoint(trained) or recipe.data.augment != "none":
        return None
    with_it, without = (cost(shape, replace(setting, encoded=encoded)).flop for encoded in (True, False))
    images = _distinct_images(recipe)
    return {
        "on": recipe.data.feature_cache,
        "bytes_per_image": shape.feature_bytes,
        "images": images,
        "bytes": None if images is None else images * shape.feature_bytes,
        "saves": 1 - with_it / without,
    }


def _by_share(shape: Shape, setting: Setting, device: Device) -> Iterator[dict[str, Any]]:
    """Memory and work by the share of the layers that compute their activations again."""
    none = cost(shape, replace(setting, checkpointing=0.0)).flop
    for share in sorted({0.0, 0.25, 0.5, 0.75, 1.0, setting.checkpointing}):
        needed = cost(shape, replace(setting, checkpointing=share))
        peak = needed.peak_bytes
        yield {"share": share, "peak_bytes": peak, "fits": peak <= device.usable_bytes, "work": needed.flop / none}


def _distinct_images(recipe: Recipe) -> int | None:
    """Of all sources; None as long as not all are prepared."""
    names = {dataset.store_name for source in recipe.data.mixture for dataset in source.datasets}
    stores = [Path(recipe.data.store) / name for name in sorted(names)]
    if not all((store / MANIFEST).is_file() for store in stores):
        return None
    return len(np.unique(np.concatenate([Store(store).image_keys for store in stores])))


def _engine(recipe: Recipe, gpus: int) -> EngineName:
    return resolve_engine(recipe.distributed.engine, recipe.model.mode, gpus)


def _precision(asked: str, device: Device) -> Precision:
    if asked == "bfloat16" and device.half != "bfloat16":
        raise UserError(f"training.precision: {device.name} has no bfloat16; set auto")
    precision: Precision = device.half if asked == "auto" else asked  # type: ignore[assignment]
    return precision


# ---------------------------------------------------------------------------------------------------------- advice


class _Change(NamedTuple):
    """Something else to ask for: a GPU, a number of them, overrides of the recipe."""

    device: Device
    gpus: int
    overrides: tuple[str, ...] = ()
    options: str = ""
    """Of the command line, where the GPUs are others."""

    @property
    def text(self) -> str:
        """As it is typed."""
        return " ".join(filter(None, (self.options, *self.overrides)))


def _advice(recipe: Recipe, shape: Shape, device: Device, gpus: int) -> Iterator[str]:
    """Changes after which it fits, each by itself, as far as there are any: each was planned."""
    for attempts in _changes(recipe, device, gpus):
        for change in attempts:
            peak = _peak_bytes(recipe, shape, change)
            if peak is not None and change.text and peak <= change.device.usable_bytes:
                yield f"{change.text}: {peak / GIB:.1f} GiB"
                break


def _changes(recipe: Recipe, device: Device, gpus: int) -> Iterator[Iterator[_Change]]:
    """Nothing, fewer images, another mode, a larger GPU, more GPUs: of each what to try, the least first."""
    here = _Change(device, gpus)
    yield _eased(recipe, here)
    for cap in (12, 6):
        if cap < recipe.data.max_images_per_pack:
            yield _eased(recipe, here._replace(overrides=(f"data.max_images_per_pack={cap}",)))
            break
    for mode in _MODES[_MODES.index(recipe.model.mode) + 1 :]:
        yield _eased(recipe, here._replace(overrides=(f"model.mode={mode}",)))
    for name, larger in sorted(DEVICES.items(), key=lambda item: item[1].usable_gib):
        if larger.usable_gib > device.usable_gib:
            yield _eased(recipe, here._replace(device=larger, options=f"--gpu {name}"))
            break
    yield (more for eased in _eased(recipe, here) for more in _more_gpus(recipe, eased))


_MODES = ("full", "lora", "qlora")
"""Each takes less memory than the one before."""


def _eased(recipe: Recipe, change: _Change) -> Iterator[_Change]:
    """The change, and on top of it one after another what makes little or no difference to the result."""
    training, overrides = recipe.training, change.overrides
    yield change
    for is_open, override in (
        (not training.gradient_checkpointing, "training.gradient_checkpointing=true"),
        (training.micro_batch_packs > 1, "training.micro_batch_packs=1"),
    ):
        if is_open:
            overrides += (override,)
            yield change._replace(overrides=overrides)
    for name in lighter_optimizers(training.optimizer):
        yield change._replace(overrides=(*overrides, f"training.optimizer={name}"))


def _more_gpus(recipe: Recipe, change: _Change) -> Iterator[_Change]:
    """Sharded over more GPUs, in powers of two, no more than there are packs in a step."""
    gpus = 2 * change.gpus
    while ENGINES[engine := _engine(recipe, gpus)].shards and gpus <= min(MAX_GPUS, recipe.packs_per_step):
        yield change._replace(gpus=gpus, options=f"--gpus {gpus} ({engine})")
        gpus *= 2


def _peak_bytes(recipe: Recipe, shape: Shape, change: _Change) -> int | None:
    """What the changed recipe would take; None where it would be refused."""
    try:
        changed = with_overrides(recipe, change.overrides)
        return cost(shape, setting_of(changed, shape, change.device, change.gpus)).peak_bytes
    except UserError:
        return None
