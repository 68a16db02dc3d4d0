"""`--nproc`: the same command in several processes of this machine, among which its work is divided."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Annotated, NoReturn

import typer

from sft.cli.terminal import is_quiet
from sft.core.errors import UserError

Nproc = Annotated[int, typer.Option(min=1, help="Processes on this machine, one a GPU, that divide the work.")]


def start(context: typer.Context, before: Callable[[], None] = lambda: None) -> NoReturn:
    """Run the command with the same arguments in `--nproc` processes, after `before`, and end with their exit status;
    raise UserError where they are started already, or there are fewer GPUs."""
    import torch

    from sft.core.distributed import launched_rank
    from sft.core.launch import launch

    nproc = context.params["nproc"]
    if launched_rank().of > 1:
        raise UserError(f"--nproc {nproc}: the processes are started already, by torchrun or srun; leave it out")
    if torch.cuda.is_available() and nproc > torch.cuda.device_count():
        raise UserError(f"--nproc {nproc}: this machine has {torch.cuda.device_count()} GPUs; each process needs one")
    before()
    sys.exit(launch(nproc, [str(context.info_name), *_arguments(context), *["--quiet"] * is_quiet()]))


def _arguments(context: typer.Context) -> Iterator[str]:
    """Yield the arguments of a command as they may be typed, without --nproc, and options behind the others."""
    for parameter in sorted(context.command.params, key=lambda parameter: parameter.param_type_name):
        value = context.params[str(parameter.name)]
        if parameter.name == "nproc" or value is None:
            continue
        if isinstance(value, bool):
            yield from (parameter.opts if value else parameter.secondary_opts)[:1]
            continue
        switch = "" if parameter.param_type_name == "argument" else f"{parameter.opts[0]}="
        yield from (f"{switch}{one}" for one in (value if isinstance(value, list | tuple) else [value]))
