"""The mean of the weights of several checkpoints of a run, one tensor at a time: its memory does not grow with them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open

from sft.core.errors import UserError
from sft.core.files import discard
from sft.inference.merge import FORMAT_NAMES, whole_or_nothing, write_safetensors
from sft.runs.checkpoint import MANIFEST, write_manifest


def average_weights(checkpoints: Sequence[Path], output: Path) -> None:
    """Write the mean of the weights of checkpoints, or of their adapters, as one of their kind, without state.

    Adapters are averaged matrix by matrix. Sums are made in float32 and rounded once, to what the first one has.

    Raises:
        UserError: they do not have the same weights.
        RunError: the disk is full.
    """
    if output.exists():
        discard(output)
    with whole_or_nothing(output, "make room") as folder:
        for file in checkpoints[0].iterdir():
            if file.suffix == ".safetensors":
                _write_mean([checkpoint / file.name for checkpoint in checkpoints], folder / file.name)
            elif file.is_file() and file.name != MANIFEST:
                shutil.copyfile(file, folder / file.name)
        write_manifest(folder)


def _write_mean(files: Sequence[Path], output: Path) -> None:
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        headers = [{name: one.get_slice(name) for name in one.keys()} for one in opened]  # noqa: SIM118
        shapes, *others = ({name: part.get_shape() for name, part in header.items()} for header in headers)
        if any(other != shapes for other in others):
            raise UserError(f"{output.name}: the checkpoints have other weights than {files[0].parent}")
        kinds = {kind: dtype for dtype, kind in FORMAT_NAMES.items()}
        dtypes = {name: kinds[part.get_dtype()] for name, part in headers[0].items()}
        means = (torch.stack([one.get_tensor(name).float() for one in opened]).mean(0) for name in shapes)
        write_safetensors(output, shapes, dtypes, means)
