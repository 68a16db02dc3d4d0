"""Turns in the forms in which others write them -> messages, with images where their markers or parts stand.

A turn is {"role" or "from", "content" or "value"}; content is a string or a list of parts. docs/data.md has a table.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_args

from sft.core.errors import nearest
from sft.core.images import base64_image
from sft.core.sample import ImageRef, Message, Role, SkipSample
from sft.data.datasets._meaning import FLAGS, Keys, image_mark, is_image_key, is_image_like, is_trained, shown
from sft.data.formats import Row

MARKER = "<image>"
ROLES: dict[str, Role] = {role: role for role in get_args(Role)} | {"developer": "system", "human": "user"}
ROLES |= dict.fromkeys(("gpt", "chatgpt", "model", "bot"), "assistant")
ASKING = ("system", "user", "document")
SYSTEMS = ("system", "system_prompt", "system_message")
TEXTS, IMAGES = ("text", "input_text", "output_text"), ("image", "image_url", "input_image")
SOURCES = ("bytes", "base64", "data", "image", "image_url", "path", "url", "value", "source")
"""Keys under which a part or an object holds its image, the likeliest to be whole first."""
TURN_KEYS = " ".join(("role", "from", "content", "value", *FLAGS))
PART_KEYS = " ".join(("type", "text", "index", "image_index", "detail", *SOURCES))
LLAVA = Keys.of(" ".join(("image images conversations model", *SYSTEMS)), turn=TURN_KEYS, part=PART_KEYS)

_MARKS = re.compile(r"<image>|<ImageHere>|<img>([^<>\n]+)</img>")

Find = Callable[[Any], ImageRef]  # returns the image file with a name, or raises SkipSample
_ENCODED = re.compile("(?i:data:)[^,]*,|(?=(iVBORw0KGgo|/9j/|R0lGOD|UklGR)[A-Za-z0-9+/]{24})")  # PNG, JPEG, GIF, WebP


class _Place(NamedTuple):
    """Where an image stands: one that its part brings along, one of the record's list, or the next one of the list."""

    image: Any = None
    number: int | None = None


class _Turn(NamedTuple):
    role: Role
    items: list[str | _Place]
    is_trained: bool


def to_messages(
    row: Row, turns: object, images: Sequence[Any], find: Find, *, is_marked: bool = True, trims: bool = False
) -> tuple[Message, ...]:
    """Return turns as messages, after the system text that stands beside them. Without any marker images stand first.
    `is_marked` says whether `<image>` in a string is a marker, and not a word. `trims` leaves out an answer before the
    first question and a question behind the last answer, as LLaVA does. Raise SkipSample where the turns are not a
    conversation, or do not match the images."""
    if not isinstance(turns, list):
        raise no_messages(row, ("conversations",) if trims else ("messages", "conversations"))
    system = [{"role": "system", "content": row[name]} for name in SYSTEMS if row.get(name)]
    read = [
        turn for turn in (_turn(turn, is_marked) for turn in (*system, *turns)) if turn.items or turn.role != "system"
    ]
    if read and read[:1] == read[1:2] and read[0].role == "system":
        del read[0]  # it is said beside the turns and among them
    read = _checked(_trimmed(read) if trims else read)
    if empty := [turn.role for turn in read if not turn.items]:
        raise SkipSample("empty message", detail=f"of {empty[0]}")
    if trims and any(isinstance(item, _Place) for turn in read for item in turn.items if turn.role == "assistant"):
        raise SkipSample("image marker in an answer")
    own = [item.image for turn in read for item in turn.items if isinstance(item, _Place) and item.image is not None]
    if len(own) == len(images) and [_image(image, find) for image in own] == [_image(image, find) for image in images]:
        images = ()  # parts bring them, and the list says them again
    remaining = iter(_unnamed_images(row, read, images))

    def fill(item: str | _Place) -> str | ImageRef:
        if isinstance(item, str):
            return item
        if item.number is not None:
            return _image(images[item.number], find)
        return _image(next(remaining) if item.image is None else item.image, find)

    return tuple(Message(role=t.role, content=tuple(map(fill, t.items)), is_trained=t.is_trained) for t in read)


def no_messages(row: Row, names: Sequence[str], pairs: Sequence[str] = ()) -> SkipSample:
    """Return the reason to skip a record without turns under the names; `pairs` name a question and an answer."""
    found = [key for key in row if not key.startswith("__")]
    empty = [f"{name} is {'empty' if not row[name] else type(row[name]).__name__}" for name in names if name in row]
    others = [key.strip().lower() for key in found if not is_image_key(key) and key not in names]
    near = next(filter(None, (nearest(key, names) for key in others if key != "caption")), "")
    near = near or "".join(f"; did you mean {key!r}?" for key in others if key in pairs and key not in found)
    asked = "; or a question and its answer, of any name by the option columns" if pairs else ""
    detail = f"found {', '.join(found) or 'nothing'}{''.join(f'; {one}' for one in empty)}{near}"
    return SkipSample("no messages", detail=f"{detail}; expected {' or '.join(names)}, a list of turns{asked}")


def two_forms(found: Sequence[str]) -> SkipSample:
    """Return the reason to skip a record or a turn that says two things under the names."""
    return SkipSample("two forms of a conversation", detail=f"{' and '.join(found)}; expected one of them")


def listed_images(row: Row) -> list[Any]:
    """Return the images of a record, which stand under `images` or `image`: one, or a list of them."""
    images, *others = [row[name] for name in ("images", "image") if row.get(name)] or [[]]
    if others not in ([], [images], images):
        raise SkipSample("images and image differ", detail="expected one of these keys")
    if isinstance(images, str | bytes | dict | ImageRef):
        return [images]
    if not isinstance(images, list):
        raise SkipSample("images is not a list", detail=type(images).__name__)
    return images


def _turn(turn: Any, is_marked: bool) -> _Turn:
    """Return a turn; one that says nothing has no items."""
    if isinstance(turn, dict):
        for pair in (("role", "from"), ("content", "value")):
            if all(turn.get(key) for key in pair) and turn[pair[0]] != turn[pair[1]]:
                raise two_forms(pair)
    name = str(turn.get("role") or turn.get("from")) if isinstance(turn, dict) else repr(turn)[:100]
    if not isinstance(turn, dict) or name.lower() not in ROLES:
        known, has = ", ".join(ROLES), "role" in turn or "from" in turn if isinstance(turn, dict) else True
        what = f"{name[:100]!r}{nearest(name.lower(), ROLES)}" if has else f"no role or from; found {', '.join(turn)}"
        raise SkipSample("unknown role", detail=f"{what[:200]} (known: {known})")
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    items = [item for item in _items(content, is_marked) if item != ""]
    is_empty = all(isinstance(item, str) and not item.strip() for item in items)
    if "content" not in turn and "value" not in turn:
        raise SkipSample("empty message", detail=f"of {name}; found {', '.join(turn)[:100]}; expected content or value")
    return _Turn(ROLES[name.lower()], [] if is_empty else items, is_trained(turn))


def _trimmed(turns: list[_Turn]) -> list[_Turn]:
    start = int(bool(turns) and turns[0].role == "system")
    if [turn.role for turn in turns[start : start + 1]] == ["assistant"]:
        turns = [*turns[:start], *turns[start + 1 :]]
    return turns[:-1] if turns and turns[-1].role == "user" else turns


def _checked(turns: list[_Turn]) -> list[_Turn]:
    """Return turns whose roles are those of a conversation or of a document."""
    roles = [turn.role for turn in turns]
    if set(roles) == {"document"}:
        return turns
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if "system" in spoken:
        found = f"found {roles.count('system')}; expected one, before the first question"
        raise SkipSample("system text is not first", detail=found)
    if "assistant" not in spoken:
        raise SkipSample("no question with an answer", detail=f"roles {', '.join(roles) or 'none'}")
    if spoken[-1] != "assistant":
        raise SkipSample("last message is not the assistant's", detail=f"of {spoken[-1]}")
    if spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise SkipSample("user and assistant do not alternate", detail=", ".join(spoken)[:100])
    return turns


def _items(content: Any, is_marked: bool) -> Iterator[str | _Place]:
    """Yield texts and where images stand; a string loses the blanks around it and around markers, parts do not."""
    if isinstance(content, str):
        end = 0
        for mark in _MARKS.finditer(content):
            if is_marked or mark[0] == "<ImageHere>" or re.search("[./]", mark[1] or ""):  # not <img>x</img> as a word
                yield content[end : mark.start()].strip()
                yield _Place(mark[1])
                end = mark.end()
        yield content[end:].strip()
    elif is_texts(content):
        raise SkipSample("several texts in a turn", detail=f"{content!r}"[:100] + "; expected one, or parts")
    elif isinstance(content, list | dict):
        yield from map(_part, content if isinstance(content, list) else [content])
    elif content is not None:
        raise SkipSample("content is neither text nor a list of parts", detail=type(content).__name__)


def is_texts(content: Any) -> bool:
    """Return whether a value is several texts, not parts of one."""
    return isinstance(content, list) and len(content) > 1 and all(isinstance(text, str) for text in content)


def _part(part: Any) -> str | _Place:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind is None:
        kind = next((key for key in (*TEXTS, *IMAGES) if part.get(key) is not None), None)
    if kind in TEXTS:
        text = part.get("value") if part.get("text") is None else part["text"]
        if isinstance(text, str) and not any(part.get(key) for key in IMAGES):
            return text
    elif kind in IMAGES:
        index = part.get("index", part.get("image_index"))
        return _Place(part) if any(part.get(key) for key in SOURCES) else _Place(number=index)
    found = f"type {kind!r}, keys {', '.join(part)}" if isinstance(part, dict) else repr(part)
    near = "" if kind in (*TEXTS, *IMAGES) else nearest(str(kind), (*TEXTS, *IMAGES))
    raise SkipSample("unknown content part", detail=f"{found[:100]}{near}")


def _unnamed_images(row: Row, turns: list[_Turn], images: Sequence[Any]) -> list[Any]:
    """Return the images that markers without a name take in turn; without any marker, put all of them first. Raise
    SkipSample where markers and images differ in number, or an index is none of an image."""
    places = [item for turn in turns for item in turn.items if isinstance(item, _Place)]
    named = [place.number for place in places if place.number is not None]
    if wrong := [index for index in named if type(index) is not int or not 0 <= index < len(images)]:
        expected = f"expected a whole number below {len(images)}, the number of images"
        raise SkipSample("image index out of range", detail=f"index {wrong[0]!r}; {expected}")
    mark = image_mark(item for turn in turns for item in turn.items if isinstance(item, str) and turn.role in ASKING)
    if not places and images and not mark:
        first = next(turn for turn in turns if turn.role != "system")
        first.items[:0] = [_Place()] * len(images)
        return list(images)
    unnamed = [image for number, image in enumerate(images) if number not in named]
    markers = sum(place.image is None and place.number is None for place in places)
    if markers != len(unnamed):
        found = f"{markers} {MARKER} marker{'s' * (markers != 1)} but {len(unnamed)} image{'s' * (len(unnamed) != 1)}"
        found += f"; {mark} is text here" if mark else ""
        own = sum(place.image is not None for place in places)
        found += f"; {own} more by name or in parts" if own else f"; indices name {len(named)} more" if named else ""
        others = [key for key in row if key not in LLAVA.record and row[key] and is_image_like(key, shown(row[key]))]
        found += f"; {', '.join(others)} is not read, expected image or images" if others else ""
        raise SkipSample(
            "markers and images differ in number" if images else "image marker without an image",
            detail=f'{found}; write {MARKER} in a string, or {{"type": "image"}} among parts, once for each image, '
            f"where it stands; a literal {MARKER} goes into a part of type text",
        )
    return unnamed


def _image(given: Any, find: Find) -> ImageRef:
    if isinstance(given, dict):
        key = next((key for key in SOURCES if given.get(key)), None)
        content = given.get(key) if key else None
        content = content[0] if isinstance(content, list) and len(content) == 1 else content
        if key in ("base64", "data") or (key == "bytes" and isinstance(content, str)):
            return base64_image(content.partition(",")[2] or content if isinstance(content, str) else content)
        return _image(content, find) if key else find(given)
    if isinstance(given, ImageRef):
        return given
    if isinstance(given, bytes):
        return ImageRef(source=given)
    if isinstance(given, str) and (start := _ENCODED.match(given)):
        return base64_image(given[start.end() :])
    return find(given)
