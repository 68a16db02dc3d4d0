"""`idefics-sft train RECIPE --dry-run`: check everything, and measure memory and time of a step."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sft.cli.terminal import console, notes, preparation, print_json, quiet_libraries, table

if TYPE_CHECKING:
    from sft.recipe import Recipe


def show_dry_run(recipe: Recipe, *, json: bool) -> None:
    """Prepare the data, do two steps of the training, and print what they take. Nothing is written to output_dir."""
    quiet_libraries()
    from sft.checks.before_training import check_writable
    from sft.core.precision import choose_precision, device
    from sft.data.prepare import prepare
    from sft.training.dry_run import dry_run

    out = console(to_stderr=json)
    check_writable(Path(recipe.output_dir))
    with preparation(out) as update:
        sources = prepare(recipe, update)
    measured = dry_run(recipe, sources, notes(to_stderr=json).print)
    precision = choose_precision(recipe.training.precision, device())
    if json:
        batches = [asdict(one) for one in measured]
        print_json({"device": device().type, "precision": precision, "micro_batches": batches})
        return
    rows = [
        (
            one.what,
            f"{one.tokens:,}",
            f"{one.images:,}",
            f"{one.seconds:.2f}",
            f"{one.tokens_per_second:,.0f}",
            f"{one.peak_memory_bytes / 2**30:.2f}",
        )
        for one in measured
    ]
    header = ("micro-batch", "tokens", "images", "seconds", "tokens/s", "peak GiB")
    out.print(table(f"On {device().type} in {precision}", header, rows))
    out.print(f"nothing was written to {recipe.output_dir}")
