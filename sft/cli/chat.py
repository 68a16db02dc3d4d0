"""`idefics-sft chat MODEL`: talk to a model."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sft.cli.terminal import console, quiet_libraries


def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a hub id, a recipe, RUN or RUN@STEP.")],
    image: Annotated[Path | None, typer.Option(help="An image to show with the first message.")] = None,
    allow_dir: Annotated[Path, typer.Option(help="Images are read from this folder only.")] = Path("."),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
) -> None:
    """Talk to a model about images: /image FILE, /reset, /quit."""
    from sft.naming import find_model

    path = find_model(model)
    quiet_libraries()
    from sft.chat import Conversation, Repl, responder
    from sft.inference import load_for_inference

    console().print(f"model: {path}")
    loaded = load_for_inference(path)
    respond = responder(loaded.model, loaded.template, max_new_tokens=max_new_tokens, autocast=loaded.autocast)  # type: ignore[arg-type]
    repl = Repl(Conversation(respond, folder=allow_dir), sys.stdin, sys.stdout)
    if image is not None:
        repl.show(image)
    repl.run()
