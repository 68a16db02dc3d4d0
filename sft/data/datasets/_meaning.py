"""What the keys of a record say: which are read, and which make it another thing than a conversation to be learned."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from sft.core.sample import SkipSample
from sft.data.formats import Row

TURNS = ("messages", "conversations", "turns", "texts", "prompt", "completion")
"""Keys under which a record holds its turns, as objects; `content` or `value` of a turn holds parts."""

FLAGS = frozenset(("weight", "loss", "loss_weight", "loss_scale", "train"))
"""Keys by which others say whether a turn is to be learned: OpenAI, ms-swift, LLaMA-Factory, axolotl."""

NOT_LEARNED = "record or turn is marked as not to be learned"
_REASONS = {
    "record has video or audio": ("(input_)?(video|audio)(_?(path|url|file|clip))?s?", "<video>|<audio>"),
    "record has tools or calls": ("((tool|function)(_?(call|use|result|response|id))*|observation)s?", "(?!)"),
    "record is of preferences": (r"(rejected|chosen|(non_|dis)?preferred)(_\w+)?", "(?!)"),
    "record has boxes": ("objects?|b?box(es)?|ref[-_]objects?", "<ref-object>|<bbox>"),
}
"""Reasons to skip a record: the keys, roles and types of parts; what stands for such a thing in a text."""
_LABEL = re.compile("(label|kto_(tag|label))s?", re.IGNORECASE)
_IMAGE_KEY = re.compile(
    r"(.*_)?(image|img|picture|photo|pic|frame|screenshot)s?(_?(path|file|name|url|uri|data|bytes|base64|b64|list|id)s?)*"
    "|file_?(name|path)s?",
    re.IGNORECASE,
)
_IMAGE_NAME = re.compile(r"\[?'[^:\n]+\.(jpe?g|png|webp|gif|bmp)'.*", re.IGNORECASE)


class Keys(NamedTuple):
    """The keys that an adapter reads, or knows and need not read. `prepare` counts all others."""

    record: frozenset[str]
    turn: frozenset[str]
    part: frozenset[str]
    rounds: frozenset[str]
    """Of records without turns, and of `texts`."""
    is_conversation: bool

    @classmethod
    def of(cls, record: str, turn: str = "", part: str = "", rounds: str = "", *, is_conversation: bool = True) -> Keys:
        """Return keys, given as words, with those that change nothing and of which nobody need hear."""
        words = (f"{record} id idx uuid key source dataset", turn, part, rounds)
        return cls._make([*(frozenset(some.split()) for some in words), is_conversation])

    def not_read(self, row: Row) -> Iterator[tuple[str, Any]]:
        """Yield the other keys of a record, its turns and its parts that hold something, and what they hold."""
        for level, holder, known in self._holders(row):
            for key, value in holder.items():
                if key not in known and not _is_empty(value) and not key.startswith("__"):
                    yield f"{level}{key}", value
                elif key in FLAGS and isinstance(value, int | float) and value not in (0, 1):
                    yield f"{level}{key} other than 0 and 1", value
        if "__images__" in row and not self.shows_images(row):  # as others of the file do
            yield from ((f"empty {key}", row[key]) for key in row if key in self.record and is_image_key(key))

    def check_meaning(self, row: Row) -> None:
        """
        Raises:
            SkipSample: another key, a role or a type of part changes what the record means.
        """
        for level, holder, known in self._holders(row):
            for key, value in holder.items():
                if key not in known and (reason := self._meaning(row, key, value)):
                    raise SkipSample(reason, detail=f"{level}{key}", filtered=reason == NOT_LEARNED)
                if level and key in ("role", "from", "type") and (reason := _reason(str(value))):
                    raise SkipSample(reason, detail=f"{level}{key} {value!r}")

    def _meaning(self, row: Row, key: str, value: Any) -> str | None:
        """Return what another key makes of a record; an empty one if a text has a marker for what is not there."""
        if key in FLAGS:
            return NOT_LEARNED if _is_no(value) else None
        if _LABEL.fullmatch(key):
            labels = value if isinstance(value, list) else [value]
            return "answer is labelled as bad" if any(map(_is_no, labels)) else None
        if (reason := _reason(key)) is None or not _is_empty(value):
            return reason
        texts = (text for _, holder, _ in self._holders(row) for text in holder.values() if isinstance(text, str))
        return reason if any(re.search(_REASONS[reason][1], text) for text in texts) else None

    def shows_images(self, row: Row | SkipSample) -> bool:
        """Return whether a record has images."""
        return isinstance(row, dict) and any(
            (is_image_key(key) and not _is_empty(value)) or (key == "type" and "image" in str(value))
            for _, holder, _ in self._holders(row)
            for key, value in holder.items()
        )

    def _holders(self, row: Row) -> Iterator[tuple[str, Row, frozenset[str]]]:
        """Yield a record, its turns and their parts, each between the name of its kind and the keys that are read."""
        yield "", row, self.record if row.get("messages") or row.get("conversations") else self.record | self.rounds
        for name in TURNS:
            for turn in _objects(row.get(name)):
                yield "turns: ", turn, self.turn if name != "texts" else self.rounds | self.turn | {"source"}
                for part in _objects(turn.get("content") or turn.get("value")):
                    yield "parts: ", part, self.part


def is_trained(turn: Row) -> bool:
    """Return whether a turn is to be learned: no key says that it is not."""
    return FLAGS.isdisjoint(turn) or not any(_is_no(turn.get(key)) for key in FLAGS)


@lru_cache(maxsize=1024)
def is_image_key(key: str) -> bool:
    """Return whether a key sounds as if it held images."""
    return _IMAGE_KEY.fullmatch(key) is not None


def is_image_like(key: str, value: str) -> bool:
    """Return whether a key that is not read seems to hold images, by its name or by how Python shows its value."""
    return is_image_key(key) or _IMAGE_NAME.fullmatch(value) is not None


def _objects(values: Any) -> list[Row]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


@lru_cache(maxsize=1024)
def _reason(name: str) -> str | None:
    return next((reason for reason, (names, _) in _REASONS.items() if re.fullmatch(names, name, re.IGNORECASE)), None)


def _is_no(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("false", "0", "0.0")
    return isinstance(value, int | float) and value == 0


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, dict):
        return all(map(_is_empty, value.values()))
    return value in (None, b"", []) or (isinstance(value, list) and all(item in (None, "") for item in value))
