"""How likely a model finds each of several answers to a prompt.

Prompt and answer are tokenized together and only the answer's own tokens are scored, in float32; what ends a turn is
left out. Nothing is computed twice:

- the answers to one prompt share a segment where their tokens agree up to the last one: all letters of a question, and
  all options of one token, are read from a single position;
- equal segments about the same image, or about none, are computed once, whichever prompts they come from;
- segments are packed without padding up to a fixed number of tokens a forward, those about one image side by side, and
  an image is encoded once a forward.

Shape letters: P scored positions of a forward, V vocabulary, D size of a hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sft import images
from sft.chat_template import ChatTemplate
from sft.collate import Pixels, PlacedSample, collate
from sft.pixels import load_pixels
from sft.sample import EncodedSample, ImageRef, Message

TOKENS_PER_FORWARD = 4096
"""Tokens of one forward. 2,048 to 8,192 are equally fast on two CPU cores with a model of 2.5 M parameters."""


class AnswerRequest(NamedTuple):
    """A prompt and the answers to compare."""

    messages: tuple[Message, ...]
    answers: tuple[str, ...]


class AnswerScore(NamedTuple):
    """What the model gives one answer."""

    log_prob: float
    """Sum over the answer's tokens of the natural logarithm of their probability."""
    num_tokens: int


class _Reading(NamedTuple):
    """An answer's tokens and where in their segment they stand."""

    request: int
    answer: int
    start: int
    token_ids: NDArray[np.int64]


@dataclass(slots=True)
class _Segment:
    """A prompt with an answer, and all answers whose log-probability can be read from it."""

    input_ids: NDArray[np.int64]
    image_positions: tuple[int, ...]
    images: tuple[int, ...]
    readings: list[_Reading] = field(default_factory=list)

    @property
    def scored(self) -> tuple[int, int]:
        """The token range that holds every token to be predicted."""
        return min(reading.start for reading in self.readings), len(self.input_ids)


def score_answers(
    model: nn.Module,
    template: ChatTemplate,
    requests: Sequence[AnswerRequest],
    *,
    image_size: int,
    autocast: bool = False,
    tokens_per_forward: int = TOKENS_PER_FORWARD,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[AnswerScore]]:
    """Log-probability of every answer to every prompt, in the order given.

    `model(batch=Batch)` runs a packed forward whose logits are float32 in evaluation mode. `autocast` lets the rest of
    the model compute in bfloat16. `on_progress` is told (tokens done, tokens in all) after each forward. A segment
    longer than `tokens_per_forward` runs alone.

    Raises:
        SkipSample: an image does not decode.
    """
    segments, refs = _plan(template, requests)
    scores = [[AnswerScore(0.0, 0)] * len(request.answers) for request in requests]
    total, done = sum(len(segment.input_ids) for segment in segments), 0
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(segments, tokens_per_forward):
            log_probs = _score_batch(model, batch, refs, image_size=image_size, autocast=autocast)
            readings = [reading for segment in batch for reading in segment.readings]
            for reading, log_prob in zip(readings, log_probs, strict=True):
                scores[reading.request][reading.answer] = AnswerScore(float(log_prob), len(reading.token_ids))
            done += sum(len(segment.input_ids) for segment in batch)
            if on_progress:
                on_progress(done, total)
    finally:
        model.train(was_training)
    return scores


def _plan(template: ChatTemplate, requests: Sequence[AnswerRequest]) -> tuple[list[_Segment], list[ImageRef]]:
    """The segments that have to be computed, those about one image side by side, and the distinct images."""
    numbers: dict[ImageRef, int] = {}
    segments: dict[tuple[tuple[int, ...], bytes], _Segment] = {}
    for number, request in enumerate(requests):
        refs = [item for message in request.messages for item in message.content if isinstance(item, ImageRef)]
        images_ = tuple(numbers.setdefault(ref, len(numbers)) for ref in refs)
        for segment in _segments(template, number, request, images_):
            # The last token is only predicted, never read: segments that differ in nothing else are one.
            key = (images_, segment.input_ids[:-1].tobytes())
            segments.setdefault(key, segment)
            if segments[key] is not segment:
                segments[key].readings.extend(segment.readings)
    return sorted(segments.values(), key=lambda segment: segment.images), list(numbers)


def _segments(template: ChatTemplate, number: int, request: AnswerRequest, images_: tuple[int, ...]) -> list[_Segment]:
    """The fewest segments from which all answers to one prompt can be read: the longest are made first."""
    encoded = [template.encode_answer(request.messages, answer) for answer in request.answers]
    segments: list[_Segment] = []
    for answer in sorted(range(len(encoded)), key=lambda i: encoded[i][1][1], reverse=True):
        sample, (start, end) = encoded[answer]
        context = sample.input_ids[: end - 1]
        shared = (s for s in segments if np.array_equal(s.input_ids[:-1][: end - 1], context))
        segment = next(shared, None)
        if segment is None:
            segment = _Segment(sample.input_ids[:end], sample.image_positions, images_)
            segments.append(segment)
        segment.readings.append(_Reading(number, answer, start, sample.input_ids[start:end]))
    return segments


def _batches(segments: Sequence[_Segment], tokens_per_forward: int) -> Iterator[list[_Segment]]:
    batch: list[_Segment] = []
    num_tokens = 0
    for segment in segments:
        if batch and num_tokens + len(segment.input_ids) > tokens_per_forward:
            yield batch
            batch, num_tokens = [], 0
        batch.append(segment)
        num_tokens += len(segment.input_ids)
    if batch:
        yield batch


def _score_batch(
    model: nn.Module, segments: Sequence[_Segment], refs: Sequence[ImageRef], *, image_size: int, autocast: bool
) -> NDArray[np.float64]:
    """Log-probability of each reading of these segments, in their order."""

    def load(number: int) -> Pixels:
        return load_pixels(images.read_bytes(refs[number]), image_size)

    placed = [_place(segment) for segment in segments]
    batch = collate([placed], load, train_on="assistant", image_size=image_size, num_trained_tokens=1)
    device = next(model.parameters()).device
    with torch.inference_mode():
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            output = model(batch=batch.to(device))
        log_probs_PV = output.logits_PV.float().log_softmax(-1)
        rows, tokens, owners = _places(segments)
        found = log_probs_PV[torch.from_numpy(rows).to(device), torch.from_numpy(tokens).to(device)]
    return np.bincount(owners, weights=found.double().cpu().numpy()).astype(np.float64)


def _place(segment: _Segment) -> PlacedSample:
    encoded = EncodedSample(
        key="answer",
        input_ids=segment.input_ids,
        trained_spans=(segment.scored,),
        image_positions=segment.image_positions,
    )
    return PlacedSample(encoded, segment.images, source=0)


def _places(segments: Sequence[_Segment]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """For every token to be scored: its row among the P positions, its id, and the number of its reading."""
    rows, tokens, sizes = [], [], []
    first_row = 0
    for segment in segments:
        first, last = segment.scored
        for reading in segment.readings:
            rows.append(first_row + reading.start - first + np.arange(len(reading.token_ids)))
            tokens.append(reading.token_ids)
            sizes.append(len(reading.token_ids))
        first_row += last - first
    return np.concatenate(rows), np.concatenate(tokens), np.repeat(np.arange(len(sizes)), sizes)
