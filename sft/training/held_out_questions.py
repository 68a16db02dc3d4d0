"""The fixed held-out questions that are answered at every checkpoint."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Iterator
from itertools import islice, zip_longest
from typing import NamedTuple

from sft.core.images import decode_rgb, read_bytes
from sft.core.sample import ImageRef, Message
from sft.evaluation.held_out_loss import HeldOutPacks
from sft.models.chat_template import ChatTemplate
from sft.training.metrics import Line

NUM_ANSWERS = 4
THUMBNAIL = 320
"""Pixels of the longer side of an image in before.json."""


class HeldOutQuestion(NamedTuple):
    """The beginning of a held-out sample, up to its first answer."""

    key: str
    prompt: tuple[Message, ...]
    answer: str
    """The answer in the data."""

    @property
    def text(self) -> str:
        """The text of the prompt, with `<image>` for an image."""
        return "\n".join(map(_text_of, self.prompt))

    @property
    def shown(self) -> Line:
        """What a report shows with the answers: the answer in the data, and the images, small, as base64 of JPEGs."""
        images = [item for message in self.prompt for item in message.content if isinstance(item, ImageRef)]
        return {"expected": self.answer, "images": [_thumbnail(image) for image in images]}


def _text_of(message: Message) -> str:
    return "".join(item if isinstance(item, str) else "<image>" for item in message.content)


def _thumbnail(image: ImageRef) -> str:
    file = io.BytesIO()
    small = decode_rgb(read_bytes(image), image.decoding)
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(file, "JPEG", quality=88)
    return b64encode(file.getvalue()).decode()


def held_out_questions(
    packs: HeldOutPacks, template: ChatTemplate, *, room: int, number: int = NUM_ANSWERS
) -> list[HeldOutQuestion]:
    """Return the first questions of the packs, from one source after another. Documents give none. `room` is the number
    of tokens that a question may have."""
    by_source = [_questions_of(packs, source, template, room) for source in range(len(packs.sources.sources))]
    in_turn = (question for one_each in zip_longest(*by_source) for question in one_each if question)
    return list(islice(in_turn, number))


def _questions_of(packs: HeldOutPacks, source: int, template: ChatTemplate, room: int) -> Iterator[HeldOutQuestion]:
    seen: set[str] = set()
    for item in (item for pack in packs.packs for item in pack if item.source == source):
        place = packs.sources.locate(item)
        part = packs.sources.parts[place.source][place.part]
        sample = part.store.sample(int(part.encoded.samples[place.row]))
        roles = [message.role for message in sample.messages]
        prompt = sample.messages[: roles.index("assistant")] if "assistant" in roles else ()
        if sample.key in seen or not prompt or prompt[-1].role != "user":
            continue
        seen.add(sample.key)
        if len(template.encode_prompt(prompt).input_ids) <= room:
            yield HeldOutQuestion(sample.key, prompt, _text_of(sample.messages[len(prompt)]))
