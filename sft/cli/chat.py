"""`idefics-sft chat MODEL`: talk to a model."""

import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

from sft.cli.terminal import console, quiet_libraries
from sft.core.errors import UserError
from sft.core.sample import ImageRef, SkipSample

EXAMPLES = ("chat runs/my-data --image photo.png",)


def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a hub id, a recipe, RUN or RUN@STEP.")],
    image: Annotated[
        list[str] | None, typer.Option(help="An image to show with the first message. May be repeated.")
    ] = None,
    allow_dir: Annotated[
        Path | None, typer.Option(help="Images are read from this folder only; left out, /image from the current one.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    load_4bit: Annotated[bool, typer.Option("--load-4bit", help="Weights in 4 bits.")] = False,
) -> None:
    """Talk to a model about images: /image FILE, /reset, /help, /quit."""
    from sft.runs.names import chosen_by, find_model

    path = find_model(model)
    if allow_dir is not None and not allow_dir.is_dir():
        raise UserError(f"--allow-dir: {allow_dir} is not a folder")
    shown = [_opened(file, allow_dir) for file in image or []]
    quiet_libraries()
    from sft.inference.chat import Conversation, Repl, responder
    from sft.models.loaded_model import load_for_inference

    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    console().print(f"model: {path}{chosen_by(path)}")
    loaded = load_for_inference(path, load_in_4bit=load_4bit)
    respond = responder(loaded.model, loaded.template, max_new_tokens=max_new_tokens, autocast=loaded.autocast)
    repl = Repl(Conversation(respond, folder=allow_dir or Path()), sys.stdin, sys.stdout)
    for picture in shown:
        repl.show(picture)
    repl.run()


def _opened(file: str, allow_dir: Path | None) -> ImageRef:
    """Return an image that was named on the command line: it may stand anywhere, or in `allow_dir` alone, but must be
    one."""
    from sft.core.images import DOES_NOT_DECODE, READ, open_image

    if "://" in file:
        raise UserError(f"{file}: addresses are not fetched; save the image and give its file name")
    if allow_dir is not None and not Path(file).resolve().is_relative_to(allow_dir.resolve()):
        raise UserError(f"{file}: not in {allow_dir}, and --allow-dir keeps to that folder")
    try:
        open_image(Path(file))
    except SkipSample as skip:
        expected = f"; expected a {READ} image" if skip.reason == DOES_NOT_DECODE else ""
        raise UserError(f"{file}: {skip.explained}{expected}") from skip
    return ImageRef(source=Path(file))
