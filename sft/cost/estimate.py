"""What the training of a recipe needs: memory, time, money, and what to change when it does not fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from statistics import mean
from typing import Any, NamedTuple

import numpy as np

from sft.batches.look_ahead import look_ahead
from sft.core.errors import UserError
from sft.cost.devices import DEVICES, GIB, Device
from sft.cost.family import COMMON_SIZE, Cost, ModelCost, Precision, Setting, read_model
from sft.data.prepare import open_prepared
from sft.data.store import MANIFEST, Store
from sft.models import base_of, names_of_family
from sft.recipe import ENGINES, LoraSettings, Recipe, with_overrides
from sft.recipe.engines import check_can_shard, check_engine_precision, resolve_engine
from sft.recipe.optimizers import lighter_optimizers

MAX_GPUS = 1024
"""The most GPUs that advice suggests."""

NUM_SIZES = 10_000
"""At most so many images are looked at for their sizes, evenly spread, so that planning stays fast with millions."""


class Estimate(NamedTuple):
    """What a recipe's training takes on some GPUs."""

    setting: Setting
    device: Device
    cost: Cost
    micro_batches: int
    """Micro-batches of each GPU in an optimizer step."""
    report: dict[str, Any]
    """What --json prints."""


def estimate(recipe: Recipe, device: Device, gpus: int, utilisation: float, price_per_hour: float | None) -> Estimate:
    """Return memory, time and money of a recipe's training, with every micro-batch the fullest that the recipe allows.

    Raises:
        UserError: the model's shape is not known, or the GPU lacks what the recipe asks for.
    """
    model = read_model(recipe.model.family, base_of(recipe), recipe.model.image_settings)
    setting = setting_of(recipe, model, device, gpus)
    needed = model.cost(setting)
    fits = needed.peak_bytes <= device.usable_bytes
    micro_batches = math.ceil(recipe.packs_per_step / (recipe.training.micro_batch_packs * gpus))
    ahead = None
    with suppress(UserError):  # the sources are not prepared
        ahead = look_ahead(recipe, open_prepared(recipe)[0].sources)
    steps = ahead["steps"] if ahead else recipe.training.max_steps
    seconds = None
    if device.flop_per_second and steps:
        seconds = needed.flop * micro_batches * steps / (device.flop_per_second * utilisation)
    money = None if price_per_hour is None or seconds is None else seconds / 3600 * gpus * price_per_hour
    report = {
        "fits": fits,
        "parameters": model.parameters,
        "trainable_parameters": model.trained_parameters(setting),
        "peak_bytes": needed.peak_bytes,
        "bytes": needed.bytes,
        "steps": steps,
        "epochs": {source["name"]: source["epochs"] for source in ahead["sources"]} if ahead else None,
        "seconds": seconds,
        "gpus": gpus,
        "cost": money,
        "idle": 1 - recipe.packs_per_step / (micro_batches * recipe.training.micro_batch_packs * gpus),
        "feature_cache": feature_cache(recipe, model, setting),
        "checkpointing": list(_by_share(model, setting, device)),
        "advice": [] if fits else list(_advice(recipe, model, device, gpus)),
    }
    return Estimate(setting, device, needed, micro_batches, report)


def setting_of(recipe: Recipe, model: ModelCost, device: Device, gpus: int) -> Setting:
    """Return the way in which a recipe trains on some GPUs.

    Raises:
        UserError: bfloat16 is asked of a GPU that has none, or of an engine what it cannot shard.
    """
    training, data, packs = recipe.training, recipe.data, recipe.training.micro_batch_packs
    lora = recipe.model.lora or LoraSettings()
    engine = resolve_engine(recipe.distributed.engine, recipe.model.mode, gpus)
    if training.precision == "bfloat16" and device.half != "bfloat16":
        raise UserError(f"training.precision: {device.name} has no bfloat16; set auto")
    precision: Precision = device.half if training.precision == "auto" else training.precision
    check_can_shard(engine, recipe.model.mode, training.optimizer)
    check_engine_precision(engine, precision)
    images, image_weight = model.fullest_images(data.sequence_length, data.max_images_per_pack)
    return Setting(
        tokens=packs * data.sequence_length,
        images=packs * images,
        image_weight=packs * image_weight,
        trained_tokens=packs * data.sequence_length,
        mode=recipe.model.mode,
        trainable=recipe.model.trainable,
        lora_rank=lora.r,
        lora_layers=model.lora_layers(lora.targets),
        lora_dropout=lora.dropout,
        optimizer=training.optimizer,
        engine=engine,
        gpus=gpus,
        checkpointing=training.gradient_checkpointing,
        encoded=data.feature_cache,
        accumulates=recipe.packs_per_step > packs * gpus,
        precision=precision,
    )


def feature_cache(recipe: Recipe, model: ModelCost, setting: Setting) -> dict[str, Any] | None:
    """Return what `data.feature_cache` takes, as far as the sources are prepared, and the share of the work that it
    saves from the second epoch on; None where the recipe cannot have one."""
    names = names_of_family(recipe.model.family)
    trained = names.groups if recipe.model.trained_groups is None else recipe.model.trained_groups
    if not set(names.encoder_groups).isdisjoint(trained) or recipe.data.augment != "none":
        return None
    with_it, without = (model.cost(replace(setting, encoded=encoded)).flop for encoded in (True, False))
    images, sizes = _distinct_images(recipe)
    bytes_per_image = mean(model.feature_bytes(*size) for size in sizes or [COMMON_SIZE])
    return {
        "on": recipe.data.feature_cache,
        "bytes_per_image": round(bytes_per_image),
        "images": images,
        "bytes": None if images is None else round(images * bytes_per_image),
        "saves": 1 - with_it / without,
    }


def _by_share(model: ModelCost, setting: Setting, device: Device) -> Iterator[dict[str, Any]]:
    """Yield memory and work for some shares of the layers that recompute their activations."""
    none = model.cost(replace(setting, checkpointing=0.0)).flop
    for share in sorted({0.0, 0.25, 0.5, 0.75, 1.0, setting.checkpointing}):
        needed = model.cost(replace(setting, checkpointing=share))
        peak = needed.peak_bytes
        yield {"share": share, "peak_bytes": peak, "fits": peak <= device.usable_bytes, "work": needed.flop / none}


def _distinct_images(recipe: Recipe) -> tuple[int | None, list[tuple[int, int]]]:
    """Return the number of distinct images of all sources, None while not all are prepared, and the sizes of some."""
    datasets = (dataset for source in recipe.data.mixture for dataset in source.datasets)
    folders = sorted({dataset.store_in(recipe.data.store) for dataset in datasets})
    if not all((folder / MANIFEST).is_file() for folder in folders):
        return None, []
    stores = [Store(folder) for folder in folders]
    keys = np.concatenate([store.image_keys for store in stores])
    step = len(keys) // NUM_SIZES + 1
    sizes = [store.image_size(row) for store in stores for row in range(0, len(store.image_keys), step)]
    return len(np.unique(keys)), sizes


# ---------------------------------------------------------------------------------------------------------- advice


class _Change(NamedTuple):
    """One thing to do otherwise: other GPUs, or overrides of the recipe."""

    device: Device
    gpus: int
    overrides: tuple[str, ...] = ()
    options: str = ""
    """Options of the command that name the other GPUs."""

    @property
    def text(self) -> str:
        """What to type after the recipe."""
        return " ".join(filter(None, (self.options, *self.overrides)))


def _advice(recipe: Recipe, model: ModelCost, device: Device, gpus: int) -> Iterator[str]:
    """Yield changes after which the training fits, each by itself. Each was planned."""
    for attempts in _changes(recipe, model, device, gpus):
        for change in attempts:
            peak = _peak_bytes(recipe, model, change)
            if peak is not None and change.text and peak <= change.device.usable_bytes:
                yield f"{change.text}: {peak / GIB:.1f} GiB"
                break


def _changes(recipe: Recipe, model: ModelCost, device: Device, gpus: int) -> Iterator[Iterator[_Change]]:
    """Yield the kinds of change: settings alone, fewer images, another mode, a larger GPU, more GPUs. Each is a row of
    attempts, the smallest first."""
    here = _Change(device, gpus)
    yield _with_settings(recipe, here)
    _, weight = model.fullest_images(recipe.data.sequence_length, recipe.data.max_images_per_pack)
    if weight > 1:
        yield _with_settings(recipe, here._replace(overrides=(f"data.max_images_per_pack={weight // 2}",)))
    for mode in _MODES[_MODES.index(recipe.model.mode) + 1 :]:
        yield _with_settings(recipe, here._replace(overrides=(f"model.mode={mode}",)))
    larger = (
        here._replace(device=other, options=f"--gpu {name}")
        for name, other in sorted(DEVICES.items(), key=lambda item: item[1].usable_gib)
        if other.usable_gib > device.usable_gib and (other.flop_per_second or 0) >= (device.flop_per_second or 0)
    )
    yield (change for on_larger in larger for change in _with_settings(recipe, on_larger))
    yield (more for change in _with_settings(recipe, here) for more in _more_gpus(recipe, change))


_MODES = ("full", "lora", "qlora")
"""Each takes less memory than the one before."""


def _with_settings(recipe: Recipe, change: _Change) -> Iterator[_Change]:
    """Yield a change, then with it one after another the settings that make little or no difference to the result."""
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
    """Yield a change with the model sharded over 2, 4, 8, … times the GPUs, at most one for each pack of a step."""
    gpus = 2 * change.gpus
    engine = resolve_engine(recipe.distributed.engine, recipe.model.mode, gpus)
    while ENGINES[engine].shards and gpus <= min(MAX_GPUS, recipe.packs_per_step):
        yield change._replace(gpus=gpus, options=f"--gpus {gpus} ({engine})")
        gpus *= 2


def _peak_bytes(recipe: Recipe, model: ModelCost, change: _Change) -> int | None:
    """Return what the changed recipe would take; None where it would be refused."""
    try:
        changed = with_overrides(recipe, change.overrides)
        return model.cost(setting_of(changed, model, change.device, change.gpus)).peak_bytes
    except UserError:
        return None
