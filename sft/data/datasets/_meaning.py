"""What the keys of a record say: which are read, and which make it another thing than a conversation to be learned."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain, islice
from typing import Any, NamedTuple

from sft.core.sample import Sample, SkipSample
from sft.data.formats import Row

TURNS = ("messages", "conversations", "turns", "texts", "prompt", "completion")
"""Keys under which a record holds its turns, as objects; `content` or `value` of a turn holds parts."""

FLAGS = frozenset(("weight", "loss", "loss_weight", "loss_scale", "train"))
"""Keys by which others say whether a turn is to be learned: OpenAI, ms-swift, LLaMA-Factory, axolotl."""

NOT_LEARNED = "record or turn is marked as not to be learned"
_REASONS = {
    "record has video or audio": "(input_)?(video|audio|wav|mp[34])s?(_?(path|url|uri|file|clip|bytes|base64|b64|data|"
    "list|name|frame)s?)*",
    "record has tools or calls": "((tool|function)(_?(call|use|result|response|id))*|observation)s?",
    "record is of preferences": r"(rejected|chosen|(non_|dis)?preferred)(_\w+)?|\w+_(rejected|chosen)|rejects?",
    "record has boxes": "objects?|b?box(es)?|ref[-_]objects?",
}
"""Reasons to skip a record: the keys, roles and types of parts."""
_PLACEHOLDERS = {
    "placeholder of an image that is not read": r"<\|?/?((start|end|begin)_of_)?(image|img|vision|picture|pic|photo)"
    r"[-_ \w]{0,20}/?\|?>|\[/?(image|img)[-_]?\d*\]|!\[[^\]\n]{0,99}\]\([^():\s]{1,99}\.\w{3,4}\)",
    "record has video or audio": r"<\|?/?(video|audio|speech|sound)[-_ \w]{0,20}/?\|?>|\[(video|audio)\]",
    "record has boxes": r"<\|?/?(ref(-object)?|b?box|quad|object_ref)(_(start|end))?\|?>|<loc_?\d+>",
}
"""Reasons to skip a record: what stands for an image and the like in the texts of other toolkits."""
_NAMED = re.compile(r"<(video|audio)>[^<>\s]+\.\w{2,4}</\1>")
_NUMBERS = dict.fromkeys(("true", "yes", "on", "none", "null", ""), 1.0)
_NUMBERS |= dict.fromkeys(("false", "no", "off", "bad", "rejected", "undesirable"), 0.0)
_LABEL = re.compile("(label|kto_(tag|label)|(is_)?(desirable|accepted)|is_(chosen|preferred))s?", re.IGNORECASE)
_IMAGE_KEY = re.compile(
    r"(.*_)?(image|img|picture|photo|pic|frame|screenshot)s?(_?(path|file|name|url|uri|data|bytes|base64|b64|list|id)s?)*"
    "|file_?(name|path)s?",
    re.IGNORECASE,
)
_IMAGE_NAME = re.compile(r"\[?(\{'\w+': )?'[^:\n]+\.(jpe?g|png|webp|gif|bmp)'.*", re.IGNORECASE)
_FIRST_RECORDS = 32


class Keys(NamedTuple):
    """The keys that an adapter reads, or knows and need not read. `prepare` counts all others."""

    record: frozenset[str]
    turn: frozenset[str]
    part: frozenset[str]
    rounds: frozenset[str]  # of records without turns, and of `texts`
    is_conversation: bool

    @classmethod
    def of(cls, record: str, turn: str = "", part: str = "", rounds: str = "", *, is_conversation: bool = True) -> Keys:
        """Return keys, given as words, with those that change nothing and of which nobody need hear."""
        words = (f"{record} id idx uuid key source dataset", turn, part, rounds)
        return cls._make([*(frozenset(some.split()) for some in words), is_conversation])

    def not_read(self, row: Row, sample: Sample | None = None) -> Iterator[tuple[str, Any]]:
        """Yield the other keys of a record, its turns and its parts that hold something, and what they hold; and what
        stands for images and the like in the texts of its sample."""
        yield from {f"{mark} as text": text for _, mark, text in _placeholders(sample)}.items() if sample else ()
        for level, holder, known in self._holders(row):
            for key, value in holder.items():
                if key not in known and not _is_empty(value) and not key.startswith("__"):
                    yield f"{level}{key}", value
                elif key in FLAGS and _number(value) not in (0, 1):
                    yield f"{level}{key} other than 0 and 1", value
        if "__images__" in row and not self.shows_images(row):  # as others of the file do
            yield from ((f"empty {key}", row[key]) for key in row if key in self.record and is_image_key(key))

    def check_meaning(self, row: Row) -> None:
        """Raise SkipSample where a key that is not read, a role or a type of part changes what a record means."""
        for level, holder, known in self._holders(row):
            for key, value in holder.items():
                if key not in known and (reason := _meaning(key, value)):
                    raise SkipSample(reason, detail=f"{level}{key}", filtered=reason == NOT_LEARNED)
                if level == "turns: " and key not in known and is_image_key(key) and not _is_empty(value):
                    raise SkipSample("turn has images", detail=f"{key}; expected images beside the turns, or in parts")
                if level and key in ("role", "from", "type") and (reason := _reason(str(value))):
                    raise SkipSample(reason, detail=f"{level}{key} {value!r}")

    def check_texts(self, row: Row, sample: Sample) -> None:
        """Raise SkipSample where a text stands for an image, video or box, and the record or its file has such."""
        has_media = (
            "__images__" in row
            or sample.images
            or any(is_image_key(key) or _reason(key) in _PLACEHOLDERS for key in row)
        )
        for reason, mark, text in _placeholders(sample):
            is_literal = mark == "<image>" and "text" in self.part  # a part of type text may say it
            if (has_media and not is_literal) or _NAMED.search(text):
                raise SkipSample(reason, detail=f"{mark} in {text[:60]!r}")

    def shows_images(self, row: Row | SkipSample) -> bool:
        """Return whether a record has images, or videos and the like."""
        return isinstance(row, dict) and any(
            (not _is_empty(value) and (is_image_key(key) or _reason(key) in _PLACEHOLDERS))
            or (key == "type" and re.search("image|video|audio", str(value)) is not None)
            or (level == "" and key not in known and key not in TURNS and is_image_like(key, shown(value)))
            for level, holder, known in self._holders(row)
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


def noting_images(rows: Iterable[Row | SkipSample]) -> Iterator[Row | SkipSample]:
    """Yield records, each with a note, as `__images__`, whether one before it, or of the first ones of the file, has
    images: `<image>` in it is a marker then, and not a word."""
    keys, records = Keys.of(""), iter(rows)
    first = list(islice(records, _FIRST_RECORDS))
    found = any(map(keys.shows_images, first))
    for record in chain(first, records):
        found = found or keys.shows_images(record)
        if found and isinstance(record, dict):
            record["__images__"] = True
        yield record


def image_mark(texts: Iterable[str]) -> str:
    """Return the first of what stands for an image in texts, or nothing."""
    found = (re.search(next(iter(_PLACEHOLDERS.values())), text, re.IGNORECASE) for text in texts)
    return next((mark[0] for mark in found if mark), "")


def _placeholders(sample: Sample) -> Iterator[tuple[str, str, str]]:
    """Yield what stands for images and the like in texts that are not answers: the reason, the mark, the text."""
    for text in (item for m in sample.messages if m.role != "assistant" for item in m.content if isinstance(item, str)):
        if "<" not in text and "[" not in text:  # all begin so; three searches of a question take longer than its turns
            continue
        for reason, marks in _PLACEHOLDERS.items():
            if mark := re.search(marks, text, re.IGNORECASE):
                yield reason, re.sub(r"\d+", "0", mark[0][:30]), text


def _meaning(key: str, value: Any) -> str | None:
    """Return what another key makes of a record."""
    if key in FLAGS:
        return NOT_LEARNED if _is_no(value) else None
    if _LABEL.fullmatch(key):
        labels = value if isinstance(value, list) else [value]
        return "answer is labelled as bad" if any(map(_is_no, labels)) else None
    if key.lower() in ("object", "function", "tool") and isinstance(value, str) and value.strip()[:1] not in ("[", "{"):
        return None  # the name of a kind, such as chat.completion
    reason = _reason(key)
    return None if reason is None or _is_empty(value) or _is_no(value) else reason


def shown(value: Any) -> str:
    """Return how Python shows the begin of a value."""
    return repr(value[:200] if isinstance(value, str | bytes) else value[:1] if isinstance(value, list) else value)


def _objects(values: Any) -> list[Row]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


@lru_cache(maxsize=1024)
def _reason(name: str) -> str | None:
    return next((reason for reason, names in _REASONS.items() if re.fullmatch(names, name, re.IGNORECASE)), None)


def _number(value: Any) -> float | None:
    """Return the number that a mark stands for, also in words; None if it is none."""
    said = str(value)[:100].strip().lower()
    try:
        return _NUMBERS[said] if said in _NUMBERS else float(said)
    except ValueError:
        return None


def _is_no(value: Any) -> bool:
    number = _number(value)
    return number is not None and number <= 0


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("", "[]", "{}", "null", "none")
    if isinstance(value, dict):
        return all(map(_is_empty, value.values()))
    return value in (None, b"", []) or (isinstance(value, list) and all(item in (None, "", []) for item in value))
