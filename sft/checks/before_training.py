"""What is checked at the start of every training: room for its checkpoints, and the model by one small forward."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from torch import nn

from sft.checks.environment import check_bitsandbytes, existing, versions_in_a_line
from sft.checks.finding import Finding, line_of, raise_failed
from sft.checks.model import (
    Subject,
    check_gates,
    check_image,
    check_own_loss,
    check_tokens,
    check_weights,
)
from sft.core.errors import UserError
from sft.core.precision import choose_precision, device
from sft.models.chat_template import ChatTemplate
from sft.models.family import ModelFamily
from sft.models.lora import has_adapters
from sft.recipe import Recipe


def check_writable(folder: Path) -> None:
    """Whether a run can be written there, by a file without a name: nothing stays. To root all permissions are given,
    and yet /proc takes no file.

    Raises:
        UserError: it cannot.
    """
    place = existing(folder)
    if not place.is_dir():
        raise UserError(f"output_dir {folder}: {place} is a file; choose another output_dir")
    try:
        TemporaryFile(dir=place).close()
    except OSError as error:
        raise UserError(f"output_dir {folder}: {place} cannot be written to; choose another output_dir") from error


@dataclass(frozen=True, kw_only=True)
class Room:
    """Bytes that the checkpoints of a run take."""

    snapshot: int
    """Weights, or adapters: what is evaluated."""
    state: int
    """What a run goes on from."""
    total: int
    """All of them, when the run ends."""

    @property
    def one(self) -> int:
        """A checkpoint."""
        return self.snapshot + self.state


def room_for(recipe: Recipe, family: ModelFamily, model: nn.Module) -> Room:
    """What a run will write: full runs keep bfloat16 weights, others what they train in float32; the state has float32
    weights and two moments of what is trained."""
    trained = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if ".lora_" in name or (family.group_of(name) in recipe.model.trainable and ".base_layer." not in name)
    )
    everything = sum(parameter.numel() for parameter in model.parameters())
    snapshot = 4 * trained if has_adapters(model) else 2 * everything
    moments = 8 if recipe.training.optimizer == "adamw" else 2
    state = (4 + moments) * trained
    snapshots = -(-recipe.training.max_steps // recipe.checkpoints.every_steps)
    if recipe.checkpoints.keep_weights == "best+last":
        snapshots = min(snapshots, 3)  # the best, the selected and the newest
    states = min(snapshots, recipe.checkpoints.keep_state + 1)  # the newest is whole before the oldest goes
    return Room(snapshot=snapshot, state=state, total=snapshots * snapshot + states * state)


def check_room(folder: Path, room: Room) -> Finding:
    """Whether the checkpoints fit the disk. What the folder holds of checkpoints already is counted as free: they are
    replaced, or are among those counted."""
    held = sum(file.stat().st_size for file in (folder / "checkpoints").rglob("*") if file.is_file())
    free = shutil.disk_usage(existing(folder)).free + held
    found = f"{free / 1e9:.3g} GB for {folder}, a checkpoint takes {room.one / 1e9:.3g} GB"
    if free < room.one:
        advice = "make room, or choose another output_dir"
        return Finding(name="free disk", result="failed", found=found, advice=advice, of_input=True)
    if free < room.total:
        advice = (
            f"all of them take {room.total / 1e9:.3g} GB: raise checkpoints.every_steps, or set keep_weights=best+last"
        )
        return Finding(name="free disk", result="warning", found=found, advice=advice)
    return Finding(name="free disk", result="ok", found=found)


def before_training(
    recipe: Recipe, family: ModelFamily, model: nn.Module, template: ChatTemplate, run_dir: Path
) -> list[str]:
    """Check the model that is about to be trained, by one forward of about 150 tokens; return the warnings.

    The random numbers of training are not touched. Where this is the only process the model goes to its device.

    Raises:
        UserError: what the user gave is wrong: weights, tokenizer, too little disk.
        RunError: this machine or these versions of the libraries compute something else than they should.
    """
    findings = [versions_in_a_line(), check_room(run_dir, room_for(recipe, family, model))]
    if recipe.model.mode == "qlora" or recipe.training.optimizer != "adamw":
        findings.append(check_bitsandbytes())
    raise_failed(findings)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and next(model.parameters()).device != device():
        model.to(device())
    was_training = model.training
    subject = Subject(family, model.eval(), template, choose_precision(recipe.training.precision, device()))
    for check in (check_tokens, check_weights, check_gates, check_image, check_own_loss):
        findings.append(check(subject))
        raise_failed(findings[-1:])
    model.train(was_training)
    return [line_of(finding) for finding in findings if finding.result == "warning"]
