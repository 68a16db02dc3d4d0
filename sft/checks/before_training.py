"""The checks at the start of every training: disk for its checkpoints, and the model by one small forward."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

from sft.checks.environment import check_bitsandbytes, existing, versions_in_a_line
from sft.checks.finding import Finding, line_of, raise_failed
from sft.checks.model import check_gates, check_image, check_loss, check_tokens, check_weights
from sft.checks.subject import Subject
from sft.core.errors import UserError
from sft.core.precision import choose_precision, device
from sft.models.chat_template import ChatTemplate
from sft.models.family import Family
from sft.models.lora import has_adapters
from sft.models.packed_model import PackedModel
from sft.recipe import OPTIMIZERS, Recipe


def check_writable(folder: Path) -> None:
    """Raise UserError where no run can be written in a folder: a file without a name, of which nothing stays, is made.
    Permissions would not do: root has all of them, and yet /proc takes no file."""
    place = existing(folder)
    if not place.is_dir():
        raise UserError(f"output_dir {folder}: {place} is a file; choose another output_dir")
    try:
        TemporaryFile(dir=place).close()
    except OSError as error:
        raise UserError(f"output_dir {folder}: {place} cannot be written to; choose another output_dir") from error


@dataclass(frozen=True, kw_only=True)
class Room:
    """Disk space in bytes that the checkpoints of a run take."""

    snapshot: int
    """A weight snapshot, or adapters: the part that is evaluated."""
    state: int
    """A state: the part that a run resumes from."""
    total: int
    """All checkpoints, when the run ends."""


def room_for(recipe: Recipe, family: Family, model: PackedModel) -> Room:
    """Return what the checkpoints of a run will take. Full runs keep bfloat16 weights, others their trained float32
    weights; the state has the trained weights in float32 and the optimizer's states."""
    groups = recipe.model.trainable
    everything = trained = 0
    for name, parameter in model.named_parameters():
        everything += parameter.numel()
        in_group = groups is None or family.weights.group_of(name) in groups
        if ".lora_" in name or (in_group and ".base_layer." not in name):
            trained += parameter.numel()
    snapshot = 4 * trained if has_adapters(model) else 2 * everything
    state = round((4 + OPTIMIZERS[recipe.training.optimizer].bytes_per_parameter) * trained)
    snapshots = -(-recipe.training.steps // recipe.checkpoints.every_steps)
    if recipe.checkpoints.keep_weights == "best+last":
        snapshots = min(snapshots, 3)  # the best, the selected and the newest
    states = min(snapshots, recipe.checkpoints.keep_state + 1)  # the newest is whole before the oldest goes
    return Room(snapshot=snapshot, state=state, total=snapshots * snapshot + states * state)


def check_room(folder: Path, room: Room) -> Finding:
    """Check that the checkpoints fit the disk. Checkpoints that the folder holds already count as free: they are
    replaced, or are among those counted."""
    held = sum(file.stat().st_size for file in (folder / "checkpoints").rglob("*") if file.is_file())
    free = shutil.disk_usage(existing(folder)).free + held
    one = room.snapshot + room.state
    found = f"{free / 1e9:.3g} GB for {folder}, a checkpoint takes {one / 1e9:.3g} GB"
    if free < one:
        return Finding("free disk", "failed", found, "make room, or choose another output_dir", of_input=True)
    if free < room.total:
        all_take = f"all of them take {room.total / 1e9:.3g} GB"
        advice = f"{all_take}: raise checkpoints.every_steps, or set keep_weights=best+last"
        return Finding("free disk", "warning", found, advice)
    return Finding("free disk", "ok", found)


def before_training(
    recipe: Recipe, family: Family, model: PackedModel, template: ChatTemplate, run_dir: Path
) -> list[str]:
    """Check the model that is about to be trained, by one forward of about 150 tokens; return the warnings. No random
    number is drawn. Where this is the only process, the model is moved to its device. Raise UserError where the user's
    input is wrong (weights, tokenizer, too little disk), RunError where this machine or these versions of the libraries
    compute something else than they should."""
    findings = [versions_in_a_line(), check_room(run_dir, room_for(recipe, family, model))]
    if recipe.model.mode == "qlora" or OPTIMIZERS[recipe.training.optimizer].needs_bitsandbytes:
        findings.append(check_bitsandbytes())
    raise_failed(findings)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and next(model.parameters()).device != device():
        model.to(device())
    was_training = model.training
    subject = Subject(family, model.eval(), template, choose_precision(recipe.training.precision, device()))
    own_loss = partial(check_loss, by_own_logits=True)
    for check in (check_tokens, check_weights, check_gates, check_image, own_loss):
        findings.append(check(subject))
        raise_failed(findings[-1:])
    model.train(was_training)
    return [line_of(finding) for finding in findings if finding.result == "warning"]
