"""Your own conversations: a JSON-lines file in the `messages` form that TRL, LLaMA-Factory and ms-swift read.

    {"messages": [{"role": "user", "content": "<image>What is this?"}, {"role": "assistant", "content": "A dog."}],
     "images": ["photos/dog.jpg"]}

Content is a string, or a list of {"type": "text", "text": …} and {"type": "image"}. In string content `<image>` marks
where an image stands when the record's markers are as many as its images; with no images it is plain text. Image paths
are relative to the folder of the file and stay inside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from sft.sample import ImageRef, Message, Role, Sample, SkipSample
from sft.sources import Row, read_jsonl

MARKER = "<image>"


def rows(path: Path, split: str) -> Iterator[Row | SkipSample]:
    """The lines of the file, or of `<split>.jsonl` where the path is a folder."""
    return read_jsonl(path / f"{split}.jsonl" if path.is_dir() else path)


def to_sample(row: Row, path: Path) -> Sample:
    """One line as a sample."""
    folder = path if path.is_dir() else path.parent
    names = row.get("images") or []
    if not isinstance(names, list):
        raise SkipSample("images is not a list")
    images = [_image(name, folder) for name in names]
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise SkipSample("no messages")
    num_markers = sum(_num_markers(message, bool(images)) for message in messages)
    if num_markers != len(images):
        raise SkipSample("number of image markers differs from number of images")
    remaining = iter(images)
    turns = tuple(_message(message, remaining, has_images=bool(images)) for message in messages)
    if not any(turn.role in ("assistant", "document") for turn in turns):
        raise SkipSample("no assistant message")
    return Sample(key=f"messages/{path.stem}/{row['__line__']}", messages=turns)


def _image(name: Any, folder: Path) -> ImageRef:
    if not isinstance(name, str) or "://" in name or "\0" in name:
        raise SkipSample("image is not a local path")
    file = (folder / name).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise SkipSample("image path leaves the folder")
    return ImageRef(source=file)


def _num_markers(message: Any, has_images: bool) -> int:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        return sum(isinstance(part, dict) and part.get("type") == "image" for part in content)
    return content.count(MARKER) if has_images and isinstance(content, str) else 0


def _message(message: Any, images: Iterator[ImageRef], *, has_images: bool) -> Message:
    role: Any = message.get("role") if isinstance(message, dict) else None
    if role not in get_args(Role):
        raise SkipSample("unknown role")
    content = tuple(item for item in _items(message.get("content"), images, has_images) if item != "")
    if not content:
        raise SkipSample("empty message")
    return Message(role=role, content=content)


def _items(content: Any, images: Iterator[ImageRef], has_images: bool) -> Iterator[str | ImageRef]:
    if isinstance(content, str):
        for number, text in enumerate(content.split(MARKER) if has_images else [content]):
            if number:
                yield next(images)
            yield text.strip()
    elif isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image":
                yield next(images)
            elif kind == "text" and isinstance(part.get("text"), str):
                yield part["text"].strip()
            else:
                raise SkipSample("unknown content part")
    else:
        raise SkipSample("content is neither text nor a list of parts")
