"""DeepSpeed's universal checkpoints: states that ZeRO-3 has written for one number of processes, for any other.

`zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt` hold whole tensors, flat. DeepSpeed keeps the number of AdamW's steps
only in a pickle, which is not read here, so a state has it in a file of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from sft.core.distributed import Rank, barrier, from_main
from sft.core.errors import RunError
from sft.core.files import discard
from sft.training.engines.sharded_state import MOMENTS, STEP, begin, check_names, trained

TAG = "zero3"
"""DeepSpeed's name for its files of a state, and their folder."""
ADAM_STEPS = "adam_steps.json"


@contextmanager
def converted(folder: Path, rank: Rank) -> Iterator[Path]:
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


def load(folder: Path, model: nn.Module, optimizer: Optimizer, rank: Rank) -> None:
    """Set the trained weights and the optimizer of a whole model to what ZeRO-3 has written into a state, `converted`;
    raise UserError where other tensors were trained then."""
    steps = json.loads((folder / ADAM_STEPS).read_text())
    with converted(folder / TAG, rank) as output:
        parameters, zero = trained(model), output / "zero"
        check_names(folder, {file.parent.name: None for file in zero.glob("*/exp_avg.pt")}, parameters)
        for name, parameter in parameters.items():
            state = begin(optimizer, parameter)
            state[STEP].fill_(steps)
            for what, tensor in (("fp32", parameter.data), *((moment, state[moment]) for moment in MOMENTS)):
                flat = torch.load(zero / name / f"{what}.pt", map_location="cpu", weights_only=True)
                tensor.copy_(flat.view_as(tensor))
