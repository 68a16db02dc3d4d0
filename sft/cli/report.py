"""`idefics-sft report RUN`: one page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sft.cli.terminal import Json, console, print_json

EXAMPLES = ("report runs/quickstart", "report quickstart --output page.html")


def run(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run, or its recipe.")],
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="In place of RUN/report.html.")] = None,
    json: Json = False,
) -> None:
    """Write one HTML page about a run, at any time: checkpoints, answers, losses, data, speed and settings.

    The page stands by itself: it fetches nothing and needs no JavaScript.
    """
    from sft.report import report
    from sft.runs.names import find_recipe

    file = report(Path(find_recipe(run).output_dir), output)
    if json:
        print_json({"report": str(file), "bytes": file.stat().st_size})
        return
    console().print(f"{file}: {file.stat().st_size / 1024:,.0f} KiB; open it in a browser")
