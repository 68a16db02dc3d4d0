"""Talking to a model in a terminal.

/image FILE   show an image with the next message
/reset        forget the conversation
/help         list the commands
/quit         end; so does /exit
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from sft.core import images
from sft.core.errors import UserError, nearest, printable
from sft.core.sample import ImageRef, Message, SkipSample
from sft.inference.generate import OnText, generate, prompt_of
from sft.models import family_of
from sft.models.chat_template import ChatTemplate
from sft.models.packed_model import PackedModel

Respond = Callable[[Sequence[Message], OnText], str]
"""Returns the answer to a conversation whose last message is the user's."""

HELP = "/image FILE shows an image with your next message, /reset forgets, /help lists, /quit ends."


def responder(
    model: PackedModel, template: ChatTemplate, *, max_new_tokens: int = 64, autocast: bool = False
) -> Respond:
    """Return a function that answers by greedy generation, and raises UserError where conversation and answer do not
    fit the model's positions."""
    room = family_of(model).text.max_positions(model.config) - max_new_tokens

    def respond(messages: Sequence[Message], on_text: OnText) -> str:
        prompt = prompt_of(template, messages)
        if (length := len(prompt.encoded.input_ids)) > room:
            raise UserError(f"the conversation has {length} tokens, the model takes {room}; /reset begins a new one")
        return generate(
            model, template.tokenizer, [prompt], max_new_tokens=max_new_tokens, autocast=autocast, on_text=on_text
        )[0]

    return respond


class Conversation:
    """The conversation so far, and what continues it. Images are read from inside one folder only."""

    def __init__(self, respond: Respond, *, folder: Path | None = None) -> None:
        """`folder` is where images may come from: the current directory, if left out."""
        self.respond = respond
        self.folder = (folder or Path.cwd()).resolve()
        self.messages: tuple[Message, ...] = ()

    def say(self, text: str, *shown: str | Path | ImageRef, on_text: OnText = None) -> str:
        """Say something, with the images before it, and return the model's answer; `on_text` gets it on the way. After
        a UserError of `open_image` or `responder` the conversation is as it was."""
        opened = [image if isinstance(image, ImageRef) else self.open_image(image) for image in shown]
        messages = (*self.messages, Message(role="user", content=(*opened, text)))
        try:
            answer = self.respond(messages, on_text)
        except SkipSample as skip:
            raise UserError(f"image: {skip.reason}") from skip
        self.messages = (*messages, Message(role="assistant", content=(answer,)))
        return answer

    def open_image(self, name: str | Path) -> ImageRef:
        """Read and check an image file, relative to the folder. Raise UserError where it is an address, lies outside
        the folder (links are followed), is missing, a folder itself or does not decode."""
        if not str(name):
            raise UserError(f"/image: no file is named; expected one of {self.folder}, as in /image photo.png")
        if "://" in str(name):
            told = f"save the image in {self.folder} and give its file name"
            raise UserError(f"{name}: addresses are not fetched; {told}")
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder):
            raise UserError(f"{name}: outside {self.folder}; images are read from inside that folder only")
        try:
            content = images.read_bytes(ImageRef(source=path))
            images.decode_rgb(content)
        except SkipSample as skip:
            raise UserError(f"{name}: {self._told(skip, path)}") from skip
        return ImageRef(source=content)

    def _told(self, skip: SkipSample, path: Path) -> str:
        if skip.reason != images.MISSING:
            return skip.explained
        return "a folder; expected an image file in it" if path.is_dir() else f"{skip.reason}; looked in {self.folder}"

    def reset(self) -> None:
        """Forget everything that was said."""
        self.messages = ()


def file_names(text: str, folder: Path) -> list[str]:
    """Return the files that a text names: one as it stands, or some as terminals paste them, quoted or escaped."""
    with suppress(ValueError):  # a quotation mark without its other half
        words = shlex.split(text)
        if not (folder / text).exists() and (len(words) == 1 or all((folder / word).is_file() for word in words)):
            return words
    return [text]


class Repl:
    """A conversation over lines of text: reads from one stream, prints to another."""

    def __init__(self, conversation: Conversation, lines: TextIO, output: TextIO) -> None:
        self.conversation, self.lines, self.output = conversation, lines, output
        self._shown: list[ImageRef] = []  # wait for the next message

    def run(self) -> None:
        """Read and answer until `/quit` or the end of the input. What is wrong with a line is printed, not raised."""
        self._print(HELP)
        while (line := self._read_line()) is not None:
            try:
                if not self._obey(line):
                    return
            except UserError as error:
                self._print(f"Error: {error}")

    def show(self, image: ImageRef) -> None:
        """Show an image with the next message, after those that wait for it."""
        self._shown.append(image)

    def _read_line(self) -> str | None:
        """Read the next line. What was not typed at a terminal is echoed, so that a transcript can be read."""
        self.output.write("User: ")
        self.output.flush()
        line = self.lines.readline()
        if not line or not self.lines.isatty():
            self._print(line.strip())
        return line.strip() if line else None

    def _obey(self, line: str) -> bool:
        """Do what a line says; False ends the conversation. Raise UserError as `Conversation` does, and for an unknown
        command."""
        command, _, argument = line.partition(" ")
        if command in ("/quit", "/exit"):
            return False
        if command == "/help":
            self._print(HELP)
        elif command == "/reset":
            self._shown.clear()
            self.conversation.reset()
        elif command == "/image":
            for image in map(self.conversation.open_image, file_names(argument.strip(), self.conversation.folder)):
                self.show(image)
        elif command.startswith("/"):
            raise UserError(f"{command}: unknown command{nearest(command, ('/image', '/reset')) or '.'} {HELP}")
        elif line:
            self._answer(line)
            self._shown.clear()
        return True

    def _answer(self, line: str) -> None:
        """Print the answer as it is written. A model cannot steer the terminal."""
        has_begun = False

        def show(piece: str) -> None:
            nonlocal has_begun
            safe = "\n".join(map(printable, piece.split("\n")))
            self.output.write(safe if has_begun else f"Assistant: {safe}")
            self.output.flush()
            has_begun = True

        answer = self.conversation.say(line, *self._shown, on_text=show)
        if not has_begun:
            show(answer or "(no answer)")
        self._print("")

    def _print(self, text: str) -> None:
        print(text, file=self.output, flush=True)
