"""The folder of a run: its files, the run it belongs to, and the weight snapshots in it."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import torch

from sft.checks.environment import LIBRARIES
from sft.core.contain import on_error
from sft.core.errors import RunError, UserError, reason_of
from sft.core.files import discard
from sft.core.precision import torch_dtype
from sft.data.sources import Sources
from sft.models.lora import has_adapters, save_adapters
from sft.models.packed_model import PackedModel
from sft.models.plain_folder import make_portable, save_processor
from sft.recipe import Recipe
from sft.runs.checkpoint import STATE, check_state, step_of
from sft.runs.status import RunStatus
from sft.training.engines.resume_state import Progress, read_progress
from sft.training.open_model import OpenedModel

OUTPUTS = (
    "nonfinite.jsonl",
    "spikes.jsonl",
    "recipe.yaml",
    "metrics.jsonl",
    "before.json",
    "checkpoints",
    "evaluations",
    "selection.json",
    "selection.svg",
    "selections",
    "report.html",
    "tensorboard",
)
"""The outputs of a run, besides run.json."""

SNAPSHOT_DTYPE = "bfloat16"
"""Weight snapshots are rounded once to this: what is evaluated is what is shipped."""


def progress_of(checkpoint: Path, sources: Sources) -> Progress:
    """Return the progress in a checkpoint that this run can resume from; raise UserError where the state is not
    complete, or the prepared data have changed and would come in another order."""
    check_state(checkpoint)
    progress = read_progress(checkpoint / STATE)
    if progress["sources"] != sources.fingerprint():
        raise UserError(
            f"{checkpoint}: its run was trained on other prepared data (raw files, tokenizer or limits changed); "
            "--resume none starts anew"
        )
    return progress


def go_back_to(recipe: Recipe | None, checkpoint: Path) -> None:
    """Remove later checkpoints, whose steps come again, and keep the recipe as it is now. None is given where no step
    is left to train: the recipe in the folder is that of its weights."""
    if recipe:
        _write_recipe(recipe, checkpoint.parents[1])
    for path in checkpoint.parent.glob("checkpoint-*"):
        if step_of(path) > step_of(checkpoint):
            discard(path)


def check_ours(run_dir: Path) -> None:
    """Raise UserError where a folder holds files of a run's names, run.json among them, that no run of ours wrote."""
    if RunStatus.read(run_dir) is None:
        foreign = [name for name in OUTPUTS if (run_dir / name).exists()]
        if foreign:
            raise UserError(f"{run_dir}: holds {', '.join(foreign)}, but not of a run; choose another output_dir")


def claim_folder(recipe: Recipe, run_dir: Path, steps: int) -> None:
    """Claim the folder, if it is ours, for this run of so many steps: delete what an earlier run wrote, so that no step
    of it is taken for one of this run, and write the recipe."""
    run_dir.mkdir(parents=True, exist_ok=True)
    check_ours(run_dir)
    RunStatus(status="running", step=0, max_steps=steps).write(run_dir)
    delete_outputs(run_dir)
    _write_recipe(recipe, run_dir)


def delete_outputs(run_dir: Path) -> None:
    """Delete what a run has written in a folder, and nothing else."""
    for name in OUTPUTS:
        path = run_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def recorded(
    run_dir: Path,
    status: Callable[[str, str], RunStatus],
    outcome: Callable[[], tuple[str, str]] = lambda: ("finished", ""),
) -> Iterator[None]:
    """Keep run.json up to date: running, then finished, stopped or failed, and why."""
    status("running", "").write(run_dir)

    def write_reason(error: BaseException) -> None:
        with suppress(OSError, RunError):  # a full disk may be what ends the run, and is reported then
            is_wanted = isinstance(error, KeyboardInterrupt)
            why = "interrupted" if is_wanted else reason_of(error)
            status("stopped" if is_wanted else "failed", why).write(run_dir)

    with on_error(write_reason):
        yield
    status(*outcome()).write(run_dir)


def hardware(processes: int) -> str:
    """Return the devices of a training: `8 x NVIDIA H100 80GB HBM3`, `CPU (x86_64), 2 threads`."""
    if torch.cuda.is_available():
        return f"{processes} x {torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    many = "" if processes == 1 else f"{processes} processes of "
    return f"CPU ({platform.machine()}), {many}{threads} thread{'s' * (threads != 1)}"


def versions() -> dict[str, str]:
    """Return the versions of the libraries that can change what is trained."""
    return {name: version(name) for name in LIBRARIES}


def save_snapshot(
    opened: OpenedModel, model: PackedModel, recipe: Recipe, folder: Path, weights: dict[str, torch.Tensor] | None
) -> None:
    """Write weights or adapters, config, processor, chat template and recipe: a plain transformers or PEFT folder.
    `model` is the opened model as the engine has it, and `weights` are its weights, where an engine shards them."""
    family, template = opened.family, opened.template
    if not has_adapters(model):
        family.weights.save_model(model, folder, torch_dtype(SNAPSHOT_DTYPE), weights)
    save_processor(family, template, model.config, folder)
    if has_adapters(model):
        save_adapters(model, folder, weights)
        make_portable(model, folder)
    _write_recipe(recipe, folder)


def _write_recipe(recipe: Recipe, folder: Path) -> None:
    """Write recipe.yaml with absolute paths, by which its files are found from any current directory."""
    data = recipe.data.model_copy(update={"store": str(Path(recipe.data.store).absolute())})
    absolute = recipe.model_copy(update={"data": data, "output_dir": str(Path(recipe.output_dir).absolute())})
    (folder / "recipe.yaml").write_text(absolute.to_yaml(), encoding="utf-8")
