"""`--nproc`: the same command in several processes of this machine, among which its work is divided."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, NoReturn

import typer

from sft.core.errors import UserError

Nproc = Annotated[int, typer.Option(min=1, help="Processes on this machine, one a GPU, that divide the work.")]


def start(nproc: int, arguments: Sequence[str], options: Mapping[str, object]) -> NoReturn:
    """Run `idefics-sft ARGUMENTS OPTIONS` in so many processes, and end with their exit status.

    Options by the names of their parameters: True and False are switches, a list repeats its option, what is None is
    left out.

    Raises:
        UserError: they are started already, or there are fewer GPUs.
    """
    import torch

    from sft.core.distributed import launched_rank
    from sft.core.launch import launch

    if launched_rank().of > 1:
        raise UserError(f"--nproc {nproc}: the processes are started already, by torchrun or srun; leave it out")
    if torch.cuda.is_available() and nproc > torch.cuda.device_count():
        raise UserError(f"--nproc {nproc}: this machine has {torch.cuda.device_count()} GPUs; each process needs one")
    sys.exit(launch(nproc, [*arguments, *(text for name, value in options.items() for text in _option(name, value))]))


def _option(name: str, value: object) -> list[str]:
    switch = f"--{name.replace('_', '-')}"
    if value is None or isinstance(value, bool):
        return [switch] if value else []
    return [f"{switch}={one}" for one in (value if isinstance(value, list) else [value])]
