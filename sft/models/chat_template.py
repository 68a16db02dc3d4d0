"""Sample -> token ids, with what is trained and where images stand.

Text is never trusted. The template is rendered once per *shape* of a conversation (its roles, and which items are text
or image) with a random nonce where each text belongs, and split on the nonces into pieces. Special tokens found in
template pieces become ids; every maximal run between two of them, template words and inserted text together, is
tokenized in one call with special tokens split, so that `<image>` in somebody's text stays seven characters.
One call per run, because encoding word pieces apart changes the ids of a SentencePiece vocabulary. Where the template
prints `<image>`, the family's tokens of that image are put (`Images.token_ids`).

Tokens, trained spans and image positions come out of the same pass: they cannot disagree.

Of a message that is not to be learned (`Message.is_trained`) the text is withheld, and with an answer all that would be
trained with it: the end of its turn, and the `</s>` after it.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from sft.core.sample import EncodedSample, ImageRef, Message, Sample
from sft.models.image_transform import tiling_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from sft.models.family import Images

IMAGE = "<image>"
"""What a template prints for an image, in every family."""

Shape = tuple[tuple[str, tuple[bool, ...], bool], ...]
"""A conversation without its words: of each message its role, which items are images, and whether it is trained."""


class _Piece(NamedTuple):
    """A stretch of the rendered template: its own text, a special token, or the place of the next text item."""

    text: str
    is_special: bool
    is_slot: bool
    is_trained: bool | None
    """None: withheld, of a message that is not to be learned."""


class ChatTemplate:
    """One jinja template and one tokenizer: everything that turns messages into token ids."""

    def __init__(self, template: str, tokenizer: PreTrainedTokenizerFast, images: Images) -> None:
        """
        Raises:
            ValueError: the template prints a special token that the tokenizer does not know as special.
        """
        self.template = template
        self.tokenizer = tokenizer
        self.images = images
        self._special_ids: dict[str, int] = {
            str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._ends = frozenset(self._special_ids.values())  # an answer holds none of them: its text is never special
        self._special_pattern = re.compile("|".join(re.escape(token) for token in self._special_ids))
        self._pieces = lru_cache(maxsize=4096)(self._render_pieces)
        self._image_ids = lru_cache(maxsize=4096)(partial(images.token_ids, tokenizer))
        code = re.sub(r"\{#.*?#\}", "", template, flags=re.DOTALL)  # without comments
        if unknown := {*re.findall(r"</?[a-z_]+>|<\|[a-z_]+\|>", code)} - self._special_ids.keys():
            raise ValueError(f"chat template prints {sorted(unknown)}, which the tokenizer has no special token for")

    def __reduce__(self) -> tuple[object, ...]:
        return ChatTemplate, (self.template, self.tokenizer, self.images)

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same sample could encode to other ids."""
        parts = [self.template, self.tokenizer.backend_tokenizer.to_str()]
        if settings := self.images.settings():
            parts.append(json.dumps(settings, sort_keys=True))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def encode(self, sample: Sample) -> EncodedSample:
        """Encode a sample for training: from `<s>` through `</s>`."""
        return self._encode(sample.key, sample.messages)

    def encode_prompt(self, messages: Sequence[Message], *, key: str = "prompt") -> EncodedSample:
        """Encode what the model is to answer, from `<s>` through `Assistant:`, or a document through its last text."""
        if messages[-1].role == "document":
            return self._encode(key, messages, answer="")
        return self._encode(key, messages, add_generation_prompt=True)

    def encode_answer(self, messages: Sequence[Message], answer: str) -> tuple[EncodedSample, tuple[int, int]]:
        """Encode a prompt and an answer to it together, and say where the answer's own tokens stand.

        The half-open range leaves out what ends the turn and the text after the answer. A document goes on with the
        answer, whose first token may begin before it where both share one: ` dog` after `Answer:`.
        """
        if messages[-1].role == "document":
            encoded = self._encode("answer", messages, answer=answer)
            return encoded, encoded.trained_spans[-1]
        turns = (*messages, Message(role="assistant", content=(answer,)))
        encoded = self._encode("answer", turns)
        start, end = encoded.trained_spans[-1]
        while end > start and int(encoded.input_ids[end - 1]) in self._ends:
            end -= 1
        return encoded, (start, end)

    def text(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Return the rendered text, for people to read. A text that holds a special token is tokenized otherwise."""
        pieces = self._pieces(_shape(messages), add_generation_prompt)
        texts = iter(_texts(messages))
        return "".join(next(texts) if piece.is_slot else piece.text for piece in pieces)

    def _encode(
        self, key: str, messages: Sequence[Message], *, add_generation_prompt: bool = False, answer: str | None = None
    ) -> EncodedSample:
        pieces = self._pieces(_shape(messages), add_generation_prompt)
        if answer is not None:  # of a document: it follows the last text, and nothing else counts as trained
            last = max(number for number, piece in enumerate(pieces) if piece.is_slot)
            pieces = tuple(piece._replace(is_trained=False) for piece in pieces[: last + 1])
            pieces += (_Piece("", is_special=False, is_slot=True, is_trained=True),)
        texts, images = iter([*_texts(messages), answer or ""]), _images(messages)
        tilings = [tiling_of(image, self.images) for image in images]
        to_come = iter(tilings)
        positions: list[int] = []
        input_ids: list[int] = []
        trained: list[bool | None] = []
        run: list[tuple[str, bool | None]] = []  # (text, is trained)

        def close_run() -> None:
            ids, flags = self._encode_run(run)
            input_ids.extend(ids)
            trained.extend(flags)
            run.clear()

        for piece in pieces:
            if piece.is_special:
                close_run()
                ids = [self._special_ids[piece.text]]
                if piece.text == IMAGE:
                    positions.append(len(input_ids))
                    ids = self._image_ids(next(to_come))
                    ids = ids[self.images.shares_border and input_ids[-1:] == ids[:1] :]
                input_ids.extend(ids)
                trained.extend([piece.is_trained] * len(ids))
            else:
                run.append((next(texts) if piece.is_slot else piece.text, piece.is_trained))
        close_run()
        return EncodedSample(
            key=key,
            input_ids=np.array(input_ids, dtype=np.int64),
            trained_spans=_spans([flag is True for flag in trained]),
            image_positions=tuple(positions),
            image_weights=tuple(map(self.images.weight, tilings)),
            withheld_spans=_spans([flag is None for flag in trained]),
        )

    def _encode_run(self, run: list[tuple[str, bool | None]]) -> tuple[list[int], list[bool | None]]:
        """Token ids of one run between special tokens, and whether each is trained."""
        text = "".join(part for part, _ in run)
        if not text:
            return [], []
        encoding = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        offsets = encoding["offset_mapping"]
        flags: list[bool | None] = []
        border = 0
        for part, is_trained in run:
            border += len(part)
            end = len(offsets) if border == len(text) else bisect_left(offsets, border, lo=len(flags), key=_character)
            flags += [is_trained] * (end - len(flags))
        return encoding["input_ids"], flags

    def _render_pieces(self, shape: Shape, add_generation_prompt: bool) -> tuple[_Piece, ...]:
        nonce = secrets.token_hex(16)
        messages: list[dict[str, Any]] = [
            {
                "role": role,
                "content": [{"type": "image"} if is_image else {"type": "text", "text": nonce} for is_image in items],
            }
            for role, items, _ in shape
        ]
        (rendered,), (generated,) = render_jinja_template(
            [messages],
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=add_generation_prompt,
        )
        borders = sorted({0, len(rendered), *(border for span in generated for border in span)})
        learned_items = iter([is_learned for _, items, is_learned in shape for _ in items])
        is_learned = True  # whether the message that is being printed is to be learned
        pieces: list[_Piece] = []
        for start, end in pairwise(borders):
            is_answer = any(first <= start and end <= last for first, last in generated)
            texts = [t for t in re.split(f"({nonce}|{self._special_pattern.pattern})", rendered[start:end]) if t]
            of_items = [next(learned_items) for text in texts if text in (nonce, IMAGE)]
            if is_answer and of_items:
                is_learned = of_items[0]  # also for the blank before its text
            for text in texts:
                if text in (nonce, IMAGE):
                    is_learned = of_items.pop(0)
                is_withheld = not is_learned and (is_answer or text == nonce)
                is_trained = None if is_withheld else is_answer
                pieces.append(_Piece(text, text in self._special_ids, is_slot=text == nonce, is_trained=is_trained))
        return tuple(pieces)


def _character(offset: tuple[int, int]) -> int:
    """Return the character that a token goes with, its last one. The "▁" that a LLaMA tokenizer puts before a run
    covers none of its own and goes with the one it precedes."""
    start, end = offset
    return max(end - 1, start)


def load_chat_template(path: Path) -> str:
    """Return the jinja source of a template file."""
    return path.read_text(encoding="utf-8")


def _shape(messages: Sequence[Message]) -> Shape:
    return tuple((m.role, tuple(isinstance(item, ImageRef) for item in m.content), m.is_trained) for m in messages)


def _images(messages: Sequence[Message]) -> list[ImageRef]:
    return [item for message in messages for item in message.content if isinstance(item, ImageRef)]


def _texts(messages: Sequence[Message]) -> list[str]:
    return [item for message in messages for item in message.content if isinstance(item, str)]


def _spans(flags: list[bool]) -> tuple[tuple[int, int], ...]:
    """Half-open ranges of consecutive True."""
    padded = np.concatenate(([False], flags, [False]))
    borders = np.flatnonzero(padded[1:] != padded[:-1]).tolist()
    return tuple(zip(borders[::2], borders[1::2], strict=True))
