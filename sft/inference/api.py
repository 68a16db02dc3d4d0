"""A model in a few lines of Python.

import sft

model = sft.load("runs/mine")
model.chat("What is in this image?", images=["dog.jpg"])
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any, overload

from PIL import Image, ImageOps
from transformers import GenerationConfig
from transformers.utils import logging

from sft.core import images as checked
from sft.core.errors import UserError, nearest
from sft.core.sample import ImageRef, Message, SkipSample
from sft.inference.generate import OnText, Prompt, generate, prompt_of
from sft.models.loaded_model import Loaded, load_for_inference
from sft.runs.names import find_model

Picture = Image.Image | Path | bytes
"""An image: opened by Pillow, a file, or the bytes of one. A `str` is a text, but where only an image can stand."""
PromptItems = Sequence[str | Picture]
"""A prompt as it stands: texts and images in reading order."""
Turns = str | Sequence[Mapping[str, Any] | Message]
"""A conversation up to the user's question, in transformers' form; a `str` is the question."""
Images = str | Picture | Sequence[str | Picture]
ROLES = ("system", "user", "assistant")


def load(model: str | Path, *, load_in_4bit: bool = False, precision: str = "auto") -> Model:
    """Load a model to ask: a folder (base, full checkpoint, merged model, adapters), a run, `RUN@STEP`, a hub id, or
    `shipped:tiny_base`.

    Adapters come with their base. `load_in_4bit` keeps the weights in 4 bits, as QLoRA training does. `precision`:
    `bfloat16`, `float32`, or what the device has. Bars are shown on a terminal only.

    Raises:
        UserError: nothing of that name, not a model, or the base of adapters is missing.
    """
    with _bars_on_terminals_only():
        return Model(load_for_inference(find_model(str(model)), load_in_4bit=load_in_4bit, precision=precision))


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Hide transformers' bars, which write a hundred lines into a log; the caller's choice holds again afterwards."""
    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


class Model:
    """A model that answers, on its device. Further keyword arguments of `chat` and `generate` are fields of
    transformers' `GenerationConfig`: `num_beams=3`, `do_sample=True, temperature=0.7`. Without them the likeliest token
    is taken each time."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        """The transformers model, the tokenizer, the chat template and the precision."""

    @overload
    def chat(
        self, conversation: Turns, *, images: Images = (), max_new_tokens: int = 64, on_text: OnText = None, **more: Any
    ) -> str: ...

    @overload
    def chat(
        self, conversation: Sequence[Sequence[Mapping[str, Any]]], *, max_new_tokens: int = 64, **more: Any
    ) -> list[str]: ...

    def chat(
        self, conversation: Any, *, images: Images = (), max_new_tokens: int = 64, on_text: OnText = None, **more: Any
    ) -> str | list[str]:
        """Return the answer to a conversation, or to each of a list of them, in one batch.

        A message is `{"role": "user", "content": [{"type": "image", "image": "dog.jpg"}, {"type": "text", "text":
        "What is it?"}]}`; `images`, one or several, stand before the question where that is a `str`. Texts are never
        markup: what looks like a special token in one is spelled out. `on_text` gets the answer as it is written.

        Raises:
            UserError: a message is not in this form, an image cannot be read or is an address, which nothing fetches,
                or conversation and answer do not fit the model.
        """
        is_batch = _is_list(conversation) and bool(conversation) and _is_list(conversation[0])
        shown = _one_or_several(images)
        if shown and not isinstance(conversation, str):
            raise UserError("images: they stand in the messages, unless the conversation is but a question")
        batch = conversation if is_batch else [conversation]
        prompts = [prompt_of(self.loaded.template, _messages(turns, shown)) for turns in batch]
        answers = self._generate(prompts, max_new_tokens, more, on_text)
        return answers if is_batch else answers[0]

    @overload
    def generate(
        self, prompt: PromptItems | Picture, *, max_new_tokens: int = 64, on_text: OnText = None, **more: Any
    ) -> str: ...

    @overload
    def generate(self, prompt: Sequence[PromptItems], *, max_new_tokens: int = 64, **more: Any) -> list[str]: ...

    def generate(
        self, prompt: Any, *, max_new_tokens: int = 64, on_text: OnText = None, **more: Any
    ) -> str | list[str]:
        """Return the text that the model generates after a prompt, or after each of a list of them, in one batch.

        A prompt is a list of texts and images, or one image, and is taken as it stands: for base models, and prompts of
        one's own making. Special tokens in its texts are special; `chat` is for the texts of others.

        Raises:
            UserError: a prompt is no list, a text is an address or holds an image marker, an image cannot be read, or
                prompt and new tokens do not fit the model.
        """
        is_batch = _is_list(prompt) and bool(prompt) and _is_list(prompt[0])
        prompts = [self._prompt(items) for items in (prompt if is_batch else [prompt])]
        texts = self._generate(prompts, max_new_tokens, more, on_text)
        return texts if is_batch else texts[0]

    def _prompt(self, items: PromptItems | Picture) -> Prompt:
        if isinstance(items, Picture):
            items = [items]
        if not _is_list(items):
            found = type(items).__name__
            raise UserError(f"prompt: {found}; expected a list of texts and images; for one text, a list of one")
        parts = [_text(item) if isinstance(item, str) else _image(item) for item in items]
        encoded = self.loaded.family.text.encode_prompt(self.loaded.tokenizer, self.loaded.images, parts)
        return Prompt(encoded, tuple(part for part in parts if isinstance(part, ImageRef)))

    def _generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int, settings: Mapping[str, Any], on_text: OnText
    ) -> list[str]:
        known = GenerationConfig().to_dict()
        for name in settings:
            if name not in known:  # it would change nothing in silence
                raise UserError(f"{name}: not a field of transformers' GenerationConfig{nearest(name, known)}")
        if not isinstance(max_new_tokens, Integral) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
            raise UserError(f"max_new_tokens: {max_new_tokens!r}; expected a whole number, 1 or more")
        room = self.loaded.max_positions - max_new_tokens
        for prompt in prompts:
            if (length := len(prompt.encoded.input_ids)) > room:
                raise UserError(
                    f"the prompt has {length} tokens; beside {max_new_tokens} new ones the model takes {max(room, 0)}"
                )
        if on_text and len(prompts) > 1:
            raise UserError("on_text: only one text can be followed at a time")
        return generate(
            self.loaded.model,
            self.loaded.tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=max(len(prompts), 1),
            autocast=self.loaded.autocast,
            settings=settings,
            on_text=on_text,
        )


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _one_or_several(images: Any) -> list[Any]:
    is_one = isinstance(images, str | bytes) or not isinstance(images, Iterable)
    return [images] if is_one else list(images)


def _messages(turns: Any, images: Iterable[str | Picture]) -> list[Message]:
    if isinstance(turns, str):
        return [Message(role="user", content=(*map(_image, images), turns))]
    if not _is_list(turns):
        raise UserError(f"conversation: {type(turns).__name__}; expected a question or a list of messages")
    messages = [turn if isinstance(turn, Message) else _message(turn) for turn in turns]
    if not messages or messages[-1].role != "user":
        raise UserError("conversation: the last message must be the user's, for the model to answer")
    return messages


def _message(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        found = type(turn).__name__
        raise UserError(f'conversation: a message is a {found}; expected {{"role": "user", "content": ...}}')
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        raise UserError(f"conversation: role {role!r}; expected {', '.join(ROLES[:-1])} or {ROLES[-1]}")
    if isinstance(content, str):
        return Message(role=role, content=(content,))
    if not _is_list(content):
        raise UserError(f"conversation: content {content!r}; expected a text or a list of parts")
    assert content is not None
    return Message(role=role, content=tuple(map(_part, content)))


def _part(part: Any) -> str | ImageRef:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind == "image" and part.get("image") is not None:
        return _image(part["image"])
    expected = '{"type": "text", "text": ...} or {"type": "image", "image": ...}'
    raise UserError(f"conversation: {part!r}; expected {expected}")


def _text(text: str) -> str:
    """Return a text of a prompt, and refuse an address: the card's examples have some there, and nothing is fetched
    here."""
    if "://" in text and " " not in text.strip():
        raise UserError(f"{text}: addresses are not fetched; open the image and give it in its place")
    return text


def _image(image: str | Picture) -> ImageRef:
    """Return an image that was read and decodes."""
    if isinstance(image, Image.Image):
        return ImageRef(source=_png(image))
    if isinstance(image, str) and "://" in image:
        raise UserError(f"{image}: addresses are not fetched; save the image and give its file name")
    if not isinstance(image, str | Path | bytes):
        raise UserError(f"image: {type(image).__name__}; expected a file name, bytes or a Pillow image")
    name = "image" if isinstance(image, bytes) else str(image)
    try:
        content = checked.read_bytes(ImageRef(source=image if isinstance(image, bytes) else Path(image)))
        checked.decode_rgb(content)
    except SkipSample as skip:
        raise UserError(f"{name}: {skip.explained}") from skip
    return ImageRef(source=content)


def _png(image: Image.Image) -> bytes:
    """Return the same pixels as a file, turned as their EXIF says, so that all images go one way."""
    file = io.BytesIO()
    image = ImageOps.exif_transpose(image)
    (image if image.mode in ("RGB", "RGBA", "L", "LA", "P", "1") else image.convert("RGB")).save(file, "PNG")
    return file.getvalue()
