"""What the training of a recipe needs: memory, time, money, and what to change when it does not fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple, get_args

from sft.cost.configs import read_config
from sft.cost.devices import DEVICES, GIB, Device
from sft.cost.formula import Cost, cost, trained_parameters
from sft.cost.setting import Engine, Mode, Optimizer, Precision, Setting
from sft.cost.shapes import Shape, shape_of
from sft.errors import UserError
from sft.recipe import ModelConfig, Recipe, TrainingConfig

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
        "advice": [] if fits else list(_advice(recipe, shape, setting, device)),
    }
    return Plan(shape, setting, device, needed, micro_batches, report)


def setting_of(recipe: Recipe, shape: Shape, device: Device, gpus: int) -> Setting:
    """The recipe's way to train. Keys that a recipe does not have yet stand at what training does today.

    Raises:
        UserError: bfloat16 is asked of a GPU that has none, or a LoRA target is not known.
    """
    training, packs = recipe.training, recipe.training.micro_batch_packs
    mode: Mode = recipe.model.mode
    tokens = packs * recipe.data.sequence_length
    optimizer: Optimizer = getattr(training, "optimizer", "adamw")
    setting = Setting(
        tokens=tokens,
        images=packs * recipe.data.max_images_per_pack,
        trained_tokens=tokens,
        mode=mode,
        optimizer=optimizer,
        engine=_engine(recipe, mode, gpus),
        gpus=gpus,
        checkpointing=training.gradient_checkpointing,
        accumulates=recipe.packs_per_step > packs * gpus,
        precision=_precision(training.precision, device),
    )
    lora = getattr(recipe.model, "lora", None)
    return setting if mode == "full" or lora is None else _with_lora(setting, lora, shape)


def _with_lora(setting: Setting, lora: Any, shape: Shape) -> Setting:
    """Rank, dropout and targets of `model.lora`; a target is a part of the model or the name of a layer in it."""
    targets = getattr(lora, "targets", None) or ()
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    every_part = setting.lora_parts
    known = {*every_part, *(linear.name for linear in shape.linears)}
    for target in targets:
        if target not in known:
            raise UserError(f"model.lora.targets: plan knows {', '.join(sorted(known))}; found {target!r}")
    return replace(
        setting,
        lora_rank=getattr(lora, "r", setting.lora_rank),
        lora_dropout=getattr(lora, "dropout", setting.lora_dropout),
        lora_parts=tuple(part for part in every_part if part in targets) or every_part,
        lora_targets=tuple(name for name in targets if name not in every_part) or setting.lora_targets,
    )


def _engine(recipe: Recipe, mode: Mode, gpus: int) -> Engine:
    """`auto`: a copy on each GPU where little is trained or there is but one, else ZeRO-3, as the card."""
    asked = recipe.distributed.engine
    if asked == "auto":
        return "zero3" if mode == "full" and gpus > 1 else "ddp"
    return asked


def _precision(asked: str, device: Device) -> Precision:
    if asked == "bfloat16" and device.half != "bfloat16":
        raise UserError(f"training.precision: {device.name} has no bfloat16; set auto")
    precision: Precision = device.half if asked == "auto" else asked  # type: ignore[assignment]
    return precision


# ---------------------------------------------------------------------------------------------------------- advice


class _Change(NamedTuple):
    """Something to set, and what becomes of the setting."""

    text: str
    setting: Setting
    device: Device


def _advice(recipe: Recipe, shape: Shape, setting: Setting, device: Device) -> Iterator[str]:
    """Changes after which it fits, each by itself, as far as there are any: each was computed."""
    for change in _changes(recipe, setting, device):
        found = _eased_until_it_fits(recipe, shape, change)
        if found:
            yield f"{found.text}: {cost(shape, found.setting).peak_bytes / GIB:.1f} GiB"


def _changes(recipe: Recipe, setting: Setting, device: Device) -> Iterator[_Change]:
    """Nothing, fewer images, another mode, a larger GPU. More GPUs come at once with the number that is enough."""
    yield _Change("", setting, device)
    for cap in (12, 6):
        if cap < recipe.data.max_images_per_pack:
            fewer = replace(setting, images=recipe.training.micro_batch_packs * cap)
            yield _Change(f"data.max_images_per_pack={cap}", fewer, device)
            break
    modes = get_args(ModelConfig.model_fields["mode"].annotation)
    for mode in ("lora", "qlora"):
        if mode in modes and setting.mode == "full":
            other = replace(setting, mode=mode, engine=_engine(recipe, mode, setting.gpus))
            yield _Change(f"model.mode={mode}", other, device)
    for name, larger in sorted(DEVICES.items(), key=lambda item: item[1].usable_gib):
        if larger.usable_gib > device.usable_gib:
            precision: Precision = setting.precision if setting.precision == "float32" else larger.half
            yield _Change(f"--gpu {name}", replace(setting, precision=precision), larger)
            break
    yield _Change("--gpus", setting, device)


def _eased_until_it_fits(recipe: Recipe, shape: Shape, change: _Change) -> _Change | None:
    """The change and, one after another, what makes no difference to the result, until it fits."""
    texts, setting = [change.text] if change.text else [], change.setting
    for text, eased in ((None, setting), *_easings(recipe, setting)):
        setting = eased
        texts += [text] if text else []
        if change.text == "--gpus":
            enough = _enough_gpus(recipe, shape, setting, change.device)
            if enough:
                return _Change(" ".join([enough.text, *texts[1:]]), enough.setting, change.device)
        elif texts and cost(shape, setting).peak_bytes <= change.device.usable_bytes:
            return _Change(" ".join(texts), setting, change.device)
    return None


def _easings(recipe: Recipe, setting: Setting) -> Iterator[tuple[str, Setting]]:
    """Checkpointing, one pack at a time, an optimizer with 8-bit states; each on top of those before."""
    if not setting.checkpointing:
        setting = replace(setting, checkpointing=True)
        yield "training.gradient_checkpointing=true", setting
    packs = recipe.training.micro_batch_packs
    if packs > 1:
        setting = replace(
            setting,
            tokens=setting.tokens // packs,
            images=setting.images // packs,
            trained_tokens=setting.trained_tokens // packs,
            accumulates=True,
        )
        yield "training.micro_batch_packs=1", setting
    if "optimizer" in TrainingConfig.model_fields and setting.optimizer == "adamw":
        yield "training.optimizer=adamw_8bit", replace(setting, optimizer="adamw_8bit")


def _enough_gpus(recipe: Recipe, shape: Shape, setting: Setting, device: Device) -> _Change | None:
    """Sharded over as few GPUs, in powers of two, as it fits on; no more than there are packs in a step."""
    engine, text = _engine(recipe, setting.mode, 2 * setting.gpus), ""
    if engine == "ddp":
        if setting.mode == "qlora":
            return None
        engine, text = "zero3", " distributed.engine=zero3"
    gpus = 2 * setting.gpus
    while gpus <= min(MAX_GPUS, recipe.packs_per_step):
        packs = setting.tokens // recipe.data.sequence_length * gpus
        sharded = replace(setting, gpus=gpus, engine=engine, accumulates=recipe.packs_per_step > packs)
        if cost(shape, sharded).peak_bytes <= device.usable_bytes:
            return _Change(f"--gpus {gpus}{text or f' ({engine})'}", sharded, device)
        gpus *= 2
    return None
