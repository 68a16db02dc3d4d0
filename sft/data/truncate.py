"""What does not fit a pack: shortened, split or left out, and counted. Nothing is cut inside a turn, a paragraph or an
image.

A conversation keeps its first turns (`prefix`), or becomes several (`split`), each of which opens with the system text
and with the images shown before, or is left out (`drop`). A document is always split, between paragraphs or before an
image; only its first piece has the `<s>`, only its last the `</s>`.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise, takewhile
from math import ceil
from typing import NamedTuple

from sft.core.sample import EncodedSample, ImageRef, Message, Policy, Sample
from sft.models.chat_template import ChatTemplate

Items = Sequence[str | ImageRef]


_Border = tuple[int, int]
"""A place between two items of a document, or inside a text: the number of the item, and of its character."""


class Limits(NamedTuple):
    """The longest sample."""

    tokens: int
    image_weight: int  # sum over its distinct images of what each weighs (`sft.core.sample.Caps`)
    long_conversations: Policy = "prefix"


class Piece(NamedTuple):
    """A sample, or a part of one, that fits."""

    encoded: EncodedSample
    image_rows: tuple[int, ...]  # of each image shown, in reading order

    @property
    def image_weight(self) -> int:
        """What its distinct images weigh together."""
        return sum(dict(zip(self.image_rows, self.encoded.image_weights, strict=True)).values())


_Encode = Callable[[Sequence[Message]], Piece]

SHORTENED = "conversation keeps its first turns"
SPLIT = "conversation split"
DROPPED = "conversation left out"
TURN_DROPPED = "turn left out"
DOCUMENT_SPLIT = "document split"
DOCUMENT_DROPPED = "document left out"
PARAGRAPH_DROPPED = "paragraph left out"
NOTHING_TRAINED = "conversation or part left out: no answer in it is to be learned"
LEFT_OUT = (DROPPED, DOCUMENT_DROPPED)
TOO_LONG, TOO_MANY_IMAGES = "too long", "over data.max_images_per_pack"


class Truncation:
    """Encodes samples into pieces within `limits`, and counts what became of those that are not."""

    def __init__(self, template: ChatTemplate, limits: Limits | None) -> None:
        """Without limits everything fits."""
        self.template = template
        self.limits = limits or Limits(sys.maxsize, sys.maxsize)
        self.changes: Counter[str] = Counter()  # how many, by what was done

    def pieces(self, sample: Sample, image_rows: Sequence[int]) -> list[Piece]:
        """Return the pieces that a sample becomes. Images of other `image_rows` are other objects."""
        whole = Piece(self.template.encode(sample), tuple(image_rows))
        pieces = [whole] if self._fits(whole) else self._fitting(sample, image_rows, whole)
        trained = [p for p in pieces if p.encoded.trained_spans or not p.encoded.withheld_spans]
        if len(trained) < len(pieces):
            self.changes[NOTHING_TRAINED] += len(pieces) - len(trained)
        return trained

    def _fitting(self, sample: Sample, image_rows: Sequence[int], whole: Piece) -> list[Piece]:
        """Return the pieces of a sample that does not fit."""
        rows = {id(image): row for image, row in zip(sample.images, image_rows, strict=True)}

        def encode(messages: Sequence[Message]) -> Piece:
            part = replace(sample, messages=tuple(messages))
            return Piece(self.template.encode(part), tuple(rows[id(image)] for image in part.images))

        if len(sample.messages) == 1 and sample.messages[0].role == "document":
            return self._split_document(sample.messages[0].content, encode, whole)
        if self.limits.long_conversations == "drop":
            pieces = []
        elif self.limits.long_conversations == "prefix":
            pieces = self._first_turns(sample, encode, whole)
        else:
            pieces = self._split_conversation(sample, encode, rows)
        done = SPLIT if self.limits.long_conversations == "split" else SHORTENED
        self._count(done if pieces else DROPPED, whole)
        return pieces

    def _count(self, what: str, piece: Piece) -> None:
        """Count what was done, and for want of what: tokens, if these alone would not have fitted."""
        is_too_long = len(piece.encoded.input_ids) > self.limits.tokens
        self.changes[f"{what}: {TOO_LONG if is_too_long else TOO_MANY_IMAGES}"] += 1

    def _fits(self, piece: Piece) -> bool:
        return len(piece.encoded.input_ids) <= self.limits.tokens and piece.image_weight <= self.limits.image_weight

    def _first_turns(self, sample: Sample, encode: _Encode, whole: Piece) -> list[Piece]:
        turns = _turns(sample.messages)
        # An answer's trained span ends where a conversation that ends with it has its `</s>`: a guess from above.
        answers = (*whole.encoded.trained_spans, *whole.encoded.withheld_spans)
        number = sum(end < self.limits.tokens for _, end in answers)
        for last in range(min(number, len(turns) - 1), 0, -1):
            piece = encode([message for turn in turns[:last] for message in turn])
            if self._fits(piece):
                return [piece]
        return []

    def _split_conversation(self, sample: Sample, encode: _Encode, rows: dict[int, int]) -> list[Piece]:
        turns = _turns(sample.messages)
        system = [message for message in turns[0] if message.role == "system"]
        turns[0] = [message for message in turns[0] if message.role != "system"]
        pieces: list[Piece] = []
        start = 0
        while start < len(turns):
            before = {rows[id(image)]: image for turn in turns[:start] for image in _images(turn)}
            shown = [image for row, image in before.items() if row not in {rows[id(i)] for i in _images(turns[start])}]
            alone = encode([*system, *turns[start]])
            while shown and not self._fits(encode([*system, *_with_images(shown, turns[start : start + 1])])):
                shown = shown[1:]  # the last images stay, where the turn leaves no room for all
            longer_and_longer = (
                encode([*system, *_with_images(shown, turns[start:stop])]) for stop in range(start + 1, len(turns) + 1)
            )
            fitting = list(takewhile(self._fits, longer_and_longer))
            if fitting:
                pieces.append(fitting[-1])
            else:
                self._count(TURN_DROPPED, alone)
            start += max(len(fitting), 1)
        return pieces

    def _split_document(self, content: Items, encode: _Encode, whole: Piece) -> list[Piece]:
        borders = _paragraph_borders(content)
        end = len(borders) - 1

        def split(first: int, last: int) -> Iterator[Piece]:
            part = Message(role="document", content=_slice(content, borders[first], borders[last]))
            piece = _without_ends(encode([part]), is_continued=first > 0, continues=last < end)
            if self._fits(piece):
                yield piece
            elif last - first == 1:
                self._count(PARAGRAPH_DROPPED, piece)
            else:
                parts = [_slice(content, start, stop) for start, stop in pairwise(borders[first : last + 1])]
                too_long = len(piece.encoded.input_ids) / self.limits.tokens
                too_many_images = piece.image_weight / self.limits.image_weight
                kind = str if too_long > too_many_images else ImageRef
                number = max(ceil(max(too_long, too_many_images)), 2)
                for start, stop in pairwise(_even([1e-3 + _amount(part, kind) for part in parts], number)):
                    yield from split(first + start, first + stop)

        pieces = list(split(0, end))
        self._count(DOCUMENT_SPLIT if pieces else DOCUMENT_DROPPED, whole)
        return pieces


def _turns(messages: Sequence[Message]) -> list[list[Message]]:
    """Return the turns of a conversation: messages up to and with an answer. A question without one is a turn too."""
    turns: list[list[Message]] = [[]]
    for message in messages:
        turns[-1].append(message)
        if message.role == "assistant":
            turns.append([])
    return [turn for turn in turns if turn]


def _with_images(images: Sequence[ImageRef], turns: Sequence[Sequence[Message]]) -> list[Message]:
    """Return the messages of some turns, the first of which opens with images."""
    first, *others = [message for turn in turns for message in turn]
    return [replace(first, content=(*images, *first.content)), *others]


def _images(messages: Sequence[Message]) -> list[ImageRef]:
    return [item for message in messages for item in message.content if isinstance(item, ImageRef)]


def _paragraph_borders(content: Items) -> list[_Border]:
    """Return where a document may be parted, and its ends: after a paragraph, else a line, never behind an image."""
    borders = [(0, 0)]
    for index, item in enumerate(content):
        if isinstance(item, str):
            ends = [match.end() for match in re.finditer(r"\n\n+" if "\n\n" in item else r"\n", item)]
            borders += [(index, end) for end in ends if end < len(item)]
            borders.append((index + 1, 0))
    return borders if borders[-1] == (len(content), 0) else [*borders, (len(content), 0)]


def _slice(content: Items, start: _Border, stop: _Border) -> tuple[str | ImageRef, ...]:
    """Return the items between two borders."""
    items = []
    for index in range(start[0], stop[0] + (stop[1] > 0)):
        item = content[index]
        if isinstance(item, str):
            item = item[start[1] if index == start[0] else 0 : stop[1] if index == stop[0] else None]
        items.append(item)
    return tuple(items)


def _amount(items: Items, kind: type) -> int:
    """Return the characters of the texts among items, or the number of their images."""
    return sum(len(item) if isinstance(item, str) else 1 for item in items if isinstance(item, kind))


def _even(weights: Sequence[float], number: int) -> list[int]:
    """Return borders of about `number` stretches of equal weight, two or more, of two or more items."""
    ends = [*accumulate(weights)]
    stretches = [int((end - weight / 2) / ends[-1] * number) for end, weight in zip(ends, weights, strict=True)]
    between = [i for i in range(1, len(weights)) if stretches[i] != stretches[i - 1]]
    # The middles of the first item and of the last are half of all or more apart; [1] is for rounding.
    return [0, *(between or [1]), len(weights)]


def _without_ends(piece: Piece, *, is_continued: bool, continues: bool) -> Piece:
    """Return a piece of a document without its `<s>` if another comes before, without its `</s>` if one follows."""
    encoded = piece.encoded
    start, stop = int(is_continued), len(encoded.input_ids) - int(continues)
    spans = ((max(first, start) - start, min(last, stop) - start) for first, last in encoded.trained_spans)
    cut = replace(
        encoded,
        input_ids=encoded.input_ids[start:stop],
        trained_spans=tuple(span for span in spans if span[0] < span[1]),
        image_positions=tuple(position - start for position in encoded.image_positions),
    )
    return Piece(cut, piece.image_rows)
