"""ZeRO stage 3, by DeepSpeed: every process has a shard of the weights, gradients and optimizer states, and gathers a
layer's weights when it comes to the layer. The idefics-9b-instruct card trained with it.

Another number of processes reads a state through DeepSpeed's universal checkpoints: `zero/<parameter>/` with fp32.pt,
exp_avg.pt and exp_avg_sq.pt, whole tensors, flat. DeepSpeed keeps the number of AdamW's steps only in a pickle, which
is not read here, so a state has it in a file of its own.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from sft.core.distributed import TIMEOUT, Rank, barrier, from_main
from sft.core.errors import RunError, UserError
from sft.core.files import discard
from sft.recipe.engines import check_engine_precision
from sft.training.engines import Engine
from sft.training.engines.resume_state import Progress
from sft.training.engines.sharded_state import MOMENTS, STEP, begin, check_names, trained

if TYPE_CHECKING:
    from sft.training.trainer import Trainer

TAG = "zero3"
"""DeepSpeed's name for its files of a state, and their folder."""
ADAM_STEPS = "adam_steps.json"
_INSTALL = "`DS_BUILD_OPS=0 pip install --no-build-isolation 'idefics-sft[deepspeed]'`"


class Zero3(Engine):
    """DeepSpeed wraps the model in an engine of its own, and shards it, when training begins."""

    KEEPS_GRADIENTS = False

    def check_installed(self) -> None:
        """Raise UserError where DeepSpeed is not installed."""
        if find_spec("deepspeed") is None:
            raise UserError(
                f"distributed.engine: zero3 needs DeepSpeed, which is not installed: {_INSTALL}; or set "
                "distributed.engine=fsdp2, or ddp, where memory allows"
            )

    def check_precision(self, precision: str) -> None:
        """Refuse float16, and bfloat16 without a GPU."""
        check_engine_precision("zero3", precision)
        if precision == "bfloat16" and not torch.cuda.is_available():  # transformers refuses it
            raise UserError("training.precision: zero3 without a GPU trains in float32; set float32")

    def check_state(self, checkpoint: Path, *, written_by: int, read_by: int) -> None:
        """Raise UserError where the state is of another number of processes, and DeepSpeed, which has to convert it, is
        not installed."""
        if written_by != read_by and find_spec("deepspeed") is None:
            raise UserError(
                f"{checkpoint}: was written under zero3 by another number of processes; DeepSpeed has to convert it, "
                f"and is not installed: {_INSTALL}"
            )

    def arguments(self, *, clip: float, precision: str, convert: bool) -> dict[str, Any]:
        """Return the settings of DeepSpeed. Its own optimizers, which would have to be compiled, are not used."""
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": clip,
            "bf16": {"enabled": precision == "bfloat16"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": 3,
                "overlap_comm": True,
                "contiguous_gradients": True,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "checkpoint": {"load_universal": convert},
        }
        return {"ddp_timeout": int(TIMEOUT.total_seconds()), "deepspeed": settings}

    def own_shard(self, tensor: Tensor) -> Tensor:
        """Return this process's slice of the flattened parameter."""
        return getattr(tensor, "ds_tensor", tensor)

    def gradient_norm(self, trainer: Trainer, norm: Any) -> Any:
        """Return NaN for a step that DeepSpeed has left out because its norm is not finite: DeepSpeed has made the step
        by now, and goes on to report the last norm that was finite."""
        return math.nan if trainer.model_wrapped.optimizer.overflow else norm

    def gather_weights(self, trainer: Trainer) -> dict[str, Tensor] | None:
        """Return the weights as DeepSpeed keeps them for computing: bfloat16, or float32."""
        weights: dict[str, Tensor] | None = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        return weights

    def save(self, trainer: Trainer, folder: Path) -> None:
        """Write DeepSpeed's own files, two of each process. Frozen weights are the base's and are left out."""
        trainer.model_wrapped.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True, save_latest=False)
        if trainer.rank.is_main:
            states = _adamw(trainer).state.values()
            (folder / ADAM_STEPS).write_text(json.dumps(int(next(iter(states))["step"])))

    def load(self, trainer: Trainer, folder: Path, progress: Progress) -> None:
        """Read the shard of each process; from another number of processes through DeepSpeed's universal conversion."""
        if progress["processes"] == trainer.rank.of:
            _load(trainer, folder, TAG)
            return
        with _converted(folder / TAG, trainer.rank) as output:
            _load(trainer, output.parent, output.name)
        # DeepSpeed 0.19.8 gives all states one tensor of the number of steps, to which AdamW then adds as often as
        # there are groups. (It also gives all groups the settings of the first; the trainer sets them to the recipe's.)
        for state in _adamw(trainer).state.values():
            state["step"] = state["step"].clone()

    def load_whole(self, folder: Path, model: nn.Module, optimizer: Optimizer, rank: Rank) -> None:
        """Set a whole model to the shards of all processes, through DeepSpeed's universal conversion; raise UserError
        where other tensors were trained then."""
        steps = json.loads((folder / ADAM_STEPS).read_text())
        with _converted(folder / TAG, rank) as output:
            parameters, zero = trained(model), output / "zero"
            check_names(folder, {file.parent.name: None for file in zero.glob("*/exp_avg.pt")}, parameters)
            for name, parameter in parameters.items():
                state = begin(optimizer, parameter)
                state[STEP].fill_(steps)
                for what, tensor in (("fp32", parameter.data), *((moment, state[moment]) for moment in MOMENTS)):
                    flat = torch.load(zero / name / f"{what}.pt", map_location="cpu", weights_only=True)
                    tensor.copy_(flat.view_as(tensor))


def _adamw(trainer: Trainer) -> Any:
    """Return the optimizer inside DeepSpeed's."""
    return trainer.model_wrapped.optimizer.optimizer


def _load(trainer: Trainer, folder: Path, tag: str) -> None:
    trainer.model_wrapped.load_checkpoint(
        str(folder), tag=tag, load_module_strict=False, load_lr_scheduler_states=False
    )


@contextmanager
def _converted(folder: Path, rank: Rank) -> Iterator[Path]:
    """Yield DeepSpeed's files of a state in their universal form, which are there while the block lasts. The main
    process makes them, or raises RunError; they are as large as the state. All processes call it."""
    checkpoint = folder.parents[1]
    output = checkpoint.parent / f".{checkpoint.name}.universal" / "universal"
    from_main(lambda: _convert(folder, output))
    yield output
    barrier()
    from_main(lambda: discard(output.parent))


def _convert(folder: Path, output: Path) -> None:
    discard(output.parent)
    output.parent.mkdir()
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(folder), "--output_folder", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise RunError(f"{folder}: DeepSpeed could not convert it for another number of processes ({reason})")


ENGINE = Zero3()
