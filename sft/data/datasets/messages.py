"""Your own conversations, in the forms that TRL, LLaMA-Factory, ms-swift and LLaVA read.

    {"messages": [{"role": "user", "content": "<image>What is this?"}, {"role": "assistant", "content": "A dog."}],
     "images": ["photos/dog.jpg"]}
    {"conversations": [{"from": "human", "value": "What is this?\\n<image>"}, {"from": "gpt", "value": "A dog."}],
     "image": "photos/dog.jpg"}

Raw layout: a file of one such object a line (.jsonl), of one list (.json) or of one a row (.parquet); or a folder that
holds `<split>.jsonl`, `.json` or `.parquet`, or `<split>-00000-of-00002.parquet` and so on, as the hub has them.

Roles     system, user (human), assistant (gpt), in alternation up to an assistant's turn; or `document` alone, which is
          text to continue, as in pre-training. A `system` beside the messages is their first message; an empty one,
          here or there, is none.
Content   a string, or parts: {"type": "text", "text": …}, {"type": "image"}, {"type": "image", "image": "dog.jpg"}.
          `<image>` in a string marks where an image stands if the record has images, then there must be one marker for
          each, or the record is left out; otherwise it is plain text, as every other special token always is. Strings
          are stripped, also around markers; parts are taken as they are.
Images    paths relative to the data's folder (or `image_folder`) that stay inside it, {"bytes": …, "path": …} as
          parquet files of `datasets` have them, bytes, or `data:image/…;base64,…`.

Other keys are not read, among them a turn's `loss` or `weight`; records with videos, audio or tools are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

from sft.core.errors import UserError
from sft.core.images import base64_image, local_image
from sft.core.sample import ImageRef, Message, Role, Sample, SkipSample
from sft.data.datasets._system import without_empty_system
from sft.data.formats import Row, read_json, read_records, record_files

LICENCE = "your own"
READS_HUB = True
VERSION = 2
MARKER = "<image>"
ROLES = {role: role for role in get_args(Role)} | {"human": "user", "gpt": "assistant"}
EXPECTED = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], "images": ["…"]}'
OTHER_FORMS = ("prompt", "completion", "instruction", "output", "query", "response", "question", "answer", "text")


class _Place(NamedTuple):
    """Where an image stands: the next one of the record's list, or one that its part brings along."""

    image: Any = None


# -------------------------------------------------------------------------------------------------------- files


def files(path: Path, split: str, *, image_folder: str | None = None) -> list[Path]:
    """Return the file itself, or the split's file of the folder."""
    if image_folder is not None and not _images_of(path, image_folder).is_dir():
        raise UserError(f"{_images_of(path, image_folder)}: no such folder; expected images (option image_folder)")
    if path.is_file():
        return [path]
    name = re.escape(split)
    found = record_files(path, name)
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise UserError(f"{path}: holds {names}; expected one of them, or say which by the path")
    part = r"-\d+-of-\d+(-\w+)?"
    for folder, stem in ((path, name + part), (path / "data", name + part), (path, f".+-{name}({part})?")):
        found = found or record_files(folder, stem)  # of the hub, of the cache of `datasets`
    if found := found or _saved_files(path, split) or record_files(path, "metadata"):
        return found
    raise UserError(
        f"{path}: no {split}.jsonl, {split}.json or {split}.parquet; {_what_is_in(path)}; "
        "name the file after the split, or say which by the path"
    )


def _saved_files(folder: Path, split: str) -> list[Path]:
    """Return the files of a folder that `save_to_disk` of `datasets` wrote, of one set or of several by their split."""
    states = (state for state in (folder / "state.json", folder / split / "state.json") if state.is_file())
    return [state.parent / one["filename"] for state in states for one in read_json(state)["_data_files"]]


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _images_of(path: Path, image_folder: str | None) -> Path:
    return _folder_of(path) / (image_folder or "")


def _what_is_in(folder: Path) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    if len(names) > 6:
        names[5:] = [f"{len(names) - 5} more"]
    return f"the folder holds {', '.join(names) or 'nothing'}"


def rows(file: Path, split: str) -> Iterator[Row | SkipSample]:
    """Yield the records of a file."""
    records = read_records(file)
    first = next(records, None)
    if first is None:
        raise UserError(f"{file}: the file has no records; expected such as {EXPECTED}")
    yield first
    yield from records


# ------------------------------------------------------------------------------------------------------ records


def to_sample(row: Row, path: Path, *, image_folder: str | None = None) -> Sample:
    """Return one conversation or document. `image_folder` holds the images where that is not the data's own folder; it
    is relative to that one, or absolute."""
    here = _folder_of(path) / row["__from__"]
    if any(row.get(key) for key in ("videos", "audios", "tools")):
        raise SkipSample("record has videos, audio or tools")
    listed = _listed_images(row)
    turns = [_turn(message, has_images=bool(listed)) for message in _messages(row, here)]
    _check_roles([role for role, _ in turns])
    _check_markers([item for _, items in turns for item in items].count(_Place()), len(listed))
    remaining, folder = iter(listed), _images_of(path, image_folder)

    def fill(item: str | _Place) -> str | ImageRef:
        if isinstance(item, str):
            return item
        return _image(folder, next(remaining) if item.image is None else item.image)

    messages = tuple(Message(role=role, content=tuple(map(fill, items))) for role, items in turns)
    return Sample(key=f"messages/{row['__from__']}", messages=messages)


def _messages(row: Row, here: Path) -> list[Any]:
    """Return the record's list of messages, in whichever form."""
    messages = row.get("messages") or row.get("conversations")
    others = [f"`{key}`" for key in OTHER_FORMS if key in row]
    if others and "messages" not in row and "conversations" not in row:
        raise UserError(f"{here}: found {', '.join(others)} in place of `messages`; expected {EXPECTED}")
    if not isinstance(messages, list) or not (messages := without_empty_system(messages)):
        raise SkipSample("no messages")
    system, first = row.get("system"), messages[0]
    if isinstance(system, str) and system.strip() and not (isinstance(first, dict) and _role(first) == "system"):
        return [{"role": "system", "content": system}, *messages]
    return messages


def _role(message: dict[str, Any]) -> Role | None:
    name = message.get("role") or message.get("from")
    return ROLES.get(name) if isinstance(name, str) else None


def _check_roles(roles: list[Role]) -> None:
    if set(roles) == {"document"}:
        return
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or spoken[-1] != "assistant":
        raise SkipSample("last message is not the assistant's")
    if spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise SkipSample("user and assistant do not alternate")


def _turn(message: Any, *, has_images: bool) -> tuple[Role, list[str | _Place]]:
    role = _role(message) if isinstance(message, dict) else None
    if role is None:
        raise SkipSample("unknown role")
    content = message.get("value") if message.get("content") is None else message["content"]
    items = [item for item in _items(content, has_images) if item != ""]
    if all(isinstance(item, str) and not item.strip() for item in items):
        raise SkipSample("empty message")
    return role, items


def _items(content: Any, has_images: bool) -> Iterator[str | _Place]:
    if isinstance(content, str):
        for number, text in enumerate(content.split(MARKER) if has_images else [content]):
            if number:
                yield _Place()
            yield text.strip()
    elif isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image":
                yield _Place(part.get("image"))
            elif kind == "text" and isinstance(part.get("text"), str):
                yield part["text"]
            else:
                raise SkipSample("unknown content part")
    else:
        raise SkipSample("content is neither text nor a list of parts")


def _check_markers(num_markers: int, num_images: int) -> None:
    """Raise SkipSample where markers and images differ in number; its detail says how to mend the record."""
    if num_markers != num_images:
        raise SkipSample(
            "markers and images differ in number",
            detail=f"{num_markers} {MARKER} marker{'s' * (num_markers != 1)} but {num_images}"
            f' image{"s" * (num_images != 1)}; write {MARKER} in a string, or {{"type": "image"}} among parts,'
            " once for each image, where it stands",
        )


def _listed_images(row: Row) -> list[Any]:
    images = row.get("images") or row.get("image") or []
    if isinstance(images, str | bytes | dict):
        return [images]
    if not isinstance(images, list):
        raise SkipSample("images is not a list")
    return images


def _image(folder: Path, given: Any) -> ImageRef:
    if isinstance(given, dict):
        given = given.get("path") if given.get("bytes") is None else given["bytes"]
    if isinstance(given, bytes):
        return ImageRef(source=given)
    if isinstance(given, str) and given.startswith("data:image/"):
        return base64_image(given.partition(",")[2])
    image = local_image(folder, given)
    try:
        is_there = isinstance(image.source, Path) and image.source.is_file()
    except OSError as error:  # a name too long
        raise SkipSample("image is not a local path", detail=repr(given)[:200]) from error
    if not is_there:
        raise SkipSample("image file missing", detail=str(image.source))
    return image
