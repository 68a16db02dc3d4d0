"""How likely a model finds each of several answers to a prompt.

Prompt and answer are tokenized together and only the answer's own tokens are scored, in float32; what ends a turn is
left out. Nothing is computed twice within a forward:

- sequences share what they have in common from their beginning, tokens and images: the answers to a prompt share the
  prompt, the rotations of a question what stands before the options, and all prompts the words before the first image;
- the last token of an answer is only predicted, so letters, and all options of one token, are read from the prompt
  itself;
- what asks about the same images goes into one forward, where each image is encoded once; images of several forwards,
  as those of shots, are encoded once in all (`kept_states`);
- forwards are filled to a fixed number of tokens and nothing is padded, but for attention inside groups of similar
  length (`sft.models.grouped_attention`).

Several processes under accelerate share the forwards out; the results are the same to the bit, since a forward holds
the same on any number of them.

Shape letters: T tokens of a forward, P positions that are read, V vocabulary, N images, C, H, W.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sft.batches.collate import Shown
from sft.batches.image_source import OpenedImages
from sft.core.distributed import all_gather_dict, all_or_none, assign
from sft.core.parallel import prefetch
from sft.core.sample import IGNORE_INDEX, Batch, ImageRef
from sft.evaluation.kept_states import KeptStates
from sft.evaluation.task import AnswerScore, Query
from sft.models.chat_template import ChatTemplate
from sft.models.packed_model import PackedModel
from sft.models.shared_beginnings import num_shared, order, share

TOKENS_PER_FORWARD = 4096
"""Distinct tokens of one forward. 2,048 to 8,192 are equally fast on two CPU cores with a model of 2.5 M parameters."""

_SIMILAR = 128
"""Tokens by which the lengths of prompts may differ that are sorted by their beginnings."""

_IMAGE = 1 << 32
"""What looking at the next image adds to a token id."""


class _Path(NamedTuple):
    """A prompt with what of an answer has to be read to predict its last token."""

    request: int
    answer: int
    tokens: NDArray[np.int64]
    """For each token its id and the image it looks at in one number: where two paths have agreed so far, hidden states
    are the same."""
    start: int
    """Where the answer's first token is predicted."""
    token_ids: NDArray[np.int64]
    """The answer's tokens."""
    states: NDArray[np.int64]
    """For each of `tokens` which state of its image stands in its place; -1 for the token itself."""


class _Forward(NamedTuple):
    """Paths laid into one row of tokens, shared beginnings once."""

    paths: list[_Path]
    tokens_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    states_T: NDArray[np.int64]
    places: list[NDArray[np.int64]]
    """Where the tokens of each path stand in the row."""
    sequences: tuple[Tensor, ...]
    """The same for those paths that are not the beginning of another."""


def score_answers(
    model: PackedModel,
    template: ChatTemplate,
    requests: Sequence[Query],
    *,
    autocast: bool = False,
    tokens_per_forward: int = TOKENS_PER_FORWARD,
    max_positions: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[AnswerScore] | None]:
    """Return the log-probability of every option of every query, in the order given; None for a query that has a
    sequence of more than `max_positions` tokens.

    `model(batch=Batch, read_P=positions)` returns float32 logits in evaluation mode. `autocast` lets the rest of the
    model compute in bfloat16. `on_progress` is called with (tokens done, tokens in all) after each forward. Prompts
    about the same images that have more than `tokens_per_forward` tokens are cut into several forwards.

    Under several processes each gets all scores, and each runs the same number of forwards.

    Raises:
        SkipSample: an image does not decode.
    """
    paths, refs, too_long = _plan(template, requests, max_positions)
    source = OpenedImages(refs, template.images)
    forwards = list(_forwards(paths, tokens_per_forward))
    kept = KeptStates(map(_images_of, forwards))
    rounds = assign(forwards)
    total, done = sum(len(forward.tokens_T) for forward in forwards), 0
    found: dict[tuple[int, int], AnswerScore] = {}
    was_training = model.training
    model.eval()
    try:
        with all_or_none():
            batches = prefetch(_batch(own, source, kept) for own, _ in rounds)
            for (own, turn), laid in zip(rounds, batches, strict=True):
                log_probs = _log_probs(model, own, laid, kept, autocast=autocast)
                for path, log_prob in zip(own.paths, log_probs, strict=True):
                    found[path.request, path.answer] = AnswerScore(float(log_prob), len(path.token_ids))
                done += sum(len(forward.tokens_T) for forward in turn)
                if on_progress:
                    on_progress(done, total)
    finally:
        model.train(was_training)
    found = all_gather_dict(found)
    return [
        None if number in too_long else [found[number, answer] for answer in range(len(request.options))]
        for number, request in enumerate(requests)
    ]


def _plan(
    template: ChatTemplate, requests: Sequence[Query], max_positions: int | None
) -> tuple[list[_Path], list[ImageRef], set[int]]:
    """Return the paths to compute, the distinct images by number, and the requests that are too long."""
    numbers: dict[ImageRef, int] = {}
    paths: list[_Path] = []
    too_long: set[int] = set()
    for number, request in enumerate(requests):
        image_numbers = [numbers.setdefault(image, len(numbers)) for image in request.sample.images]
        own = [_path(template, number, answer, request, image_numbers) for answer in range(len(request.options))]
        if max_positions is not None and max(path.start + len(path.token_ids) for path in own) >= max_positions:
            too_long.add(number)
        else:
            paths += own
    return paths, list(numbers), too_long


def _path(template: ChatTemplate, number: int, answer: int, request: Query, image_numbers: Sequence[int]) -> _Path:
    encoded, (start, end) = template.encode_answer(request.sample.messages, request.options[answer])
    image_ids, states = np.full(end - 1, -1), np.full(end - 1, -1)
    for image, position in zip(image_numbers, encoded.image_positions, strict=True):
        image_ids[position:] = image
        (places,) = np.nonzero(encoded.input_ids[position : end - 1] == template.images.state_token_id)
        states[position + places] = np.arange(len(places))
    tokens = encoded.input_ids[: end - 1] + (image_ids + 1) * _IMAGE
    return _Path(number, answer, tokens, start - 1, encoded.input_ids[start:end], states)


def _forwards(paths: Iterable[_Path], tokens_per_forward: int) -> Iterator[_Forward]:
    """Yield paths about the same images side by side, the longest first: what does not fit into memory shows at once,
    and lengths inside a forward are similar. Among those of about one length, those with a common beginning, as the
    same shots, stand side by side."""
    bundles: dict[tuple[int, ...], list[_Path]] = defaultdict(list)
    for path in paths:
        bundles[tuple(np.unique(path.tokens // _IMAGE))].append(path)
    filled: list[_Path] = []
    num_tokens = 0
    for bundle in sorted(bundles.values(), key=_length_and_beginning):
        for piece, size in _pieces(bundle, tokens_per_forward):
            new = size - num_shared(filled[-1].tokens, piece[0].tokens) if filled else size
            if filled and num_tokens + new > tokens_per_forward:
                yield _lay(filled)
                filled, num_tokens, new = [], 0, size
            filled += piece
            num_tokens += new
    if filled:
        yield _lay(filled)


def _length_and_beginning(bundle: Sequence[_Path]) -> tuple[int, bytes]:
    longest = max(len(path.tokens) for path in bundle)
    return -(longest // _SIMILAR), min(order(path.tokens) for path in bundle)


def _pieces(paths: Iterable[_Path], tokens_per_forward: int) -> Iterator[tuple[list[_Path], int]]:
    """Yield paths with the number of their distinct tokens, cut where they are more than fit a forward."""
    piece: list[_Path] = []
    num_tokens = 0
    for path in sorted(paths, key=lambda path: order(path.tokens)):
        new = len(path.tokens) - (num_shared(piece[-1].tokens, path.tokens) if piece else 0)
        if piece and num_tokens + new > tokens_per_forward:
            yield piece, num_tokens
            piece, num_tokens, new = [], 0, len(path.tokens)
        piece.append(path)
        num_tokens += new
    yield piece, num_tokens


def _lay(paths: Iterable[_Path]) -> _Forward:
    """Lay paths into one row."""
    laid = sorted(paths, key=lambda path: order(path.tokens))
    places, kept = share([path.tokens for path in laid])
    columns = zip(*((path.tokens, np.arange(len(path.tokens)), path.states) for path in laid), strict=True)
    tokens_T, positions_T, states_T = (np.concatenate(column)[kept] for column in columns)
    afterwards = [*places[1:], places[0][:0]]
    longest = (own for own, after in zip(places, afterwards, strict=True) if num_shared(own, after) < len(own))
    return _Forward(laid, tokens_T, positions_T, states_T, places, tuple(map(torch.from_numpy, longest)))


def _images_of(forward: _Forward) -> list[int]:
    """Return the numbers of the images of a row, rising."""
    refs_T = forward.tokens_T // _IMAGE - 1
    return [int(ref) for ref in np.unique(refs_T[refs_T >= 0])]


class _Laid(NamedTuple):
    """A row as a batch, whose images may still have to be encoded."""

    batch: Batch
    shown: Shown
    opened: dict[int, tuple[Tensor, ...]]
    """The tiles of each image that was opened."""


def _batch(forward: _Forward, source: OpenedImages, kept: KeptStates) -> _Laid:
    """Return a row as a batch; nothing is trained."""
    input_ids_T = torch.from_numpy(forward.tokens_T % _IMAGE)
    refs_T, refs = forward.tokens_T // _IMAGE - 1, _images_of(forward)
    shown = Shown.of(refs, source)
    tiles = {ref: source.tiles(ref) for ref in kept.to_open(shown, source.images.state_size)}
    numbers = np.array([shown.numbers[ref] for ref in refs] + [-1])  # -1: no image
    starts = np.cumsum([0, *shown.num_states.values()])
    image_ids_T = numbers[np.where(refs_T >= 0, np.searchsorted(refs, refs_T), -1)]
    nothing_T = torch.zeros_like(input_ids_T)
    batch = Batch(
        input_ids_T=input_ids_T,
        labels_T=nothing_T + IGNORE_INDEX,
        position_ids_T=torch.from_numpy(forward.positions_T),
        segment_ids_T=nothing_T,
        image_ids_T=torch.from_numpy(image_ids_T),
        source_ids_T=nothing_T,
        state_ids_T=torch.from_numpy(np.where(forward.states_T >= 0, starts[image_ids_T] + forward.states_T, -1)),
        tiles=shown.lay_tiles(tiles, refs),
        num_states=tuple(shown.num_states.values()),
        tilings=tuple(shown.tilings.values()),
        num_trained_tokens=0,
        sequences=forward.sequences,
    )
    return _Laid(batch, shown, {ref: shown.lay_tiles(tiles, [ref]) for ref in tiles})


def _log_probs(
    model: PackedModel, forward: _Forward, laid: _Laid, kept: KeptStates, *, autocast: bool
) -> NDArray[np.float64]:
    """Return the log-probability of the option of each path."""
    sizes = [len(path.token_ids) for path in forward.paths]
    read = [
        place[path.start : path.start + size]
        for path, place, size in zip(forward.paths, forward.places, sizes, strict=True)
    ]
    read_P, rows = np.unique(np.concatenate(read), return_inverse=True)
    token_ids = np.concatenate([path.token_ids for path in forward.paths])
    device = next(model.parameters()).device
    with torch.inference_mode():
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            batch = kept.complete(model, laid.batch.to(device), laid.shown, laid.opened)
            logits_PV = model(batch=batch, read_P=torch.from_numpy(read_P).to(device))
        log_probs_PV = logits_PV.float().log_softmax(-1)
        found = log_probs_PV[torch.from_numpy(rows).to(device), torch.from_numpy(token_ids).to(device)]
    owners = np.repeat(np.arange(len(sizes)), sizes)
    return np.bincount(owners, weights=found.double().cpu().numpy()).astype(np.float64)
