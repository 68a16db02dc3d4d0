"""`idefics-sft chat MODEL`: talk to a model."""

import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

from sft.cli.terminal import console, quiet_libraries
from sft.sample import ImageRef

EXAMPLES = ("chat runs/my-data --image photo.png",)


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

    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    console().print(f"model: {path}")
    loaded = load_for_inference(path)
    respond = responder(loaded.model, loaded.template, max_new_tokens=max_new_tokens, autocast=loaded.autocast)  # type: ignore[arg-type]
    repl = Repl(Conversation(respond, folder=allow_dir), sys.stdin, sys.stdout)
    if image is not None:
        repl.show(_opened(image))
    repl.run()


def _opened(file: Path) -> ImageRef:
    """An image that was named on the command line: it may stand anywhere, but must be one."""
    from sft.errors import UserError
    from sft.images import open_image
    from sft.sample import SkipSample

    try:
        open_image(file)
    except SkipSample as skip:
        raise UserError(f"{file}: {skip.reason}; expected a JPEG, PNG, WEBP, GIF or BMP image") from skip
    return ImageRef(source=file)
