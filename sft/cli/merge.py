"""`idefics-sft merge RUN --output DIR`: a checkpoint as a plain transformers model."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from sft.cli.terminal import Json, console, percent, print_json, progress, quiet_libraries, table
from sft.core.errors import UserError

EXAMPLES = ("merge runs/my-data --output my-idefics", "merge runs/my-data@100 --output my-idefics --check")


def run(
    run: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT", help="A run, its recipe, RUN@STEP or a checkpoint.")],
    output: Annotated[Path, typer.Option(help="Folder of the new model.")],
    base_dtype: Annotated[
        Literal["bf16", "fp32"] | None, typer.Option(help="What adapters are merged in: bf16 by default.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is in DIR.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Compare logits; needs room for the model.")] = False,
    json: Json = False,
) -> None:
    """Merge adapters into their base, or copy a full run's checkpoint: a plain transformers folder with a model card.

    A RUN means its selected, else its newest checkpoint.
    """
    from sft.runs.names import chosen_by, find_model

    checkpoint = find_model(run)
    if not isinstance(checkpoint, Path):
        raise UserError(f"{run}: expected a run or a checkpoint of one; a hub model has nothing to merge")
    quiet_libraries()
    import torch

    from sft.inference.merge import compare, merge

    out = console(to_stderr=json)
    out.print(f"checkpoint: {checkpoint}{chosen_by(checkpoint)}")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[base_dtype] if base_dtype else None
    with progress("merging", None, out) as update:

        def on_progress(done: int, total: int) -> None:
            update(done, f"of {total} tensors")

        made = merge(checkpoint, output, dtype=dtype, overwrite=overwrite, on_progress=on_progress)
    differences = compare(checkpoint, output) if check else {}
    if json:
        print_json(asdict(made) | ({"check": {k: asdict(v) for k, v in differences.items()}} if check else {}))
        return
    how = f"adapters merged into {made.base}" if made.base else "copied"
    out.print(f"{made.output}: {how}; {made.parameters:,} parameters in {made.dtype}, {made.bytes / 1e6:,.1f} MB")
    if check:
        rows = [(k, f"{v.largest:.2g}", f"{v.mean:.2g}", percent(v.same_choice)) for k, v in differences.items()]
        title = "logits of the merged model compared with those of"
        out.print(table(title, ("", "largest difference", "mean", "same likeliest token"), rows))
    out.print(f"Next: idefics-sft chat {made.output}")
