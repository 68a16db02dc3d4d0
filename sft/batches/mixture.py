"""Exact mixtures: how much each source has given is steered by a target, not by dice.

Every source has a target that grows by its share, and gives whole samples up to the one that comes nearest to it. So at
any time it is at most half a sample from its share. Sources repeat independently, each epoch in a seeded order of its
own. Where samples share images, those about the same images stand together, so that packing can let them share one
encoding. An order is computed, not stored: a source of 141 million samples takes no more memory than one of ten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sft.core.errors import UserError
from sft.core.sample import Caps
from sft.data.orders import Cursor, Groups, Ints, Order, Taken, mix64

Unit = Literal["tokens", "trained_tokens", "samples"]

CHUNK_SAMPLES = 2048
"""Samples of a source that are looked ahead at once."""


class SourceSizes(Protocol):
    """What the planner needs to know of a source: numbers, by row, and no samples."""

    name: str
    share: float
    """Fraction of the mixture."""
    max_epochs: float | None
    """The source gives no more than this."""
    when_exhausted: Literal["stop", "reweight"]

    def __len__(self) -> int:
        """Number of samples."""

    def num_tokens(self, rows: Ints) -> Ints:
        """Tokens of each of some samples."""

    def num_trained(self, rows: Ints) -> Ints:
        """Trained tokens of each."""

    def images(self, rows: Ints) -> tuple[Ints, Ints]:
        """Numbers of the distinct images of each, one sample after another, and how many each has. Equal numbers are
        equal images, across sources too."""

    @property
    def groups(self) -> Groups | None:
        """Samples about the same images; None where no two are."""


# ------------------------------------------------------------------------------------------------------- sources


class Draw(NamedTuple):
    """Samples of one source, in the order in which they were drawn."""

    rows: Ints
    num_tokens: Ints
    images: Ints
    num_images: Ints
    groups: Ints
    """Equal for samples about the same images."""


@dataclass(kw_only=True)
class Given:
    """What a source has given so far."""

    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    dropped: int = 0
    """Samples that no pack can hold: gone by, and not counted otherwise."""


class _Chunk(NamedTuple):
    """Samples looked ahead at; arrays of `before` and `totals` have one number more than there are samples."""

    draw: Draw
    taken: Taken
    trained: Ints
    fits: NDArray[np.bool_]
    totals: NDArray[np.float64]
    """What the source has given in the mixture's unit, before the first sample and after each."""
    middles: NDArray[np.float64]
    """Half way through each sample: where the nearest whole number of samples changes."""
    tokens_before: Ints
    images_before: Ints
    encodes: Ints
    """The images that will have to be placed: those of the first of every few samples that share theirs."""
    encodes_before: Ints


class Coming(NamedTuple):
    """Samples that may be drawn next, in their order."""

    middles: NDArray[np.float64]
    """What the target of the source has to reach for each to be drawn."""
    tokens: Ints
    encodes: Ints
    """The images to be placed for them, one sample after another."""
    num_encodes: Ints


class Stream:
    """One source: endless, or up to its last epoch."""

    def __init__(self, sizes: SourceSizes, unit: Unit, key: int, caps: Caps) -> None:
        """
        Raises:
            UserError: the source has no sample that counts and that a pack can hold.
        """
        self.sizes = sizes
        self.unit = unit
        self.order = Order(len(sizes), sizes.groups, key)
        self.caps = caps
        self.limit = None if sizes.max_epochs is None else max(round(sizes.max_epochs * len(sizes)), 1)
        self.given = Given()
        self.passed = 0  # samples gone by, over all epochs
        self.target = 0.0
        self._chunk: _Chunk | None = None
        self._start = 0  # the first sample of the chunk that is not taken
        self._cursor = Cursor()  # where the chunk begins
        chunk = self._reach(1.0)
        if self.limit is not None and chunk.totals[self.limit : self.limit + 1].tolist() == [0.0]:
            raise UserError(self._nothing_fits(chunk))  # it would be gone through at once, and give nothing

    @property
    def is_exhausted(self) -> bool:
        """Whether the source has come to the end of its last epoch."""
        return self.limit is not None and self.passed >= self.limit

    @property
    def epochs(self) -> float:
        """How often the source was gone through."""
        return self.passed / len(self.sizes)

    def upto(self, target: float) -> Coming:
        """The samples that would come nearest to a target."""
        chunk = self._reach(target)
        start, stop = self._start, self._stop(chunk, target)
        encodes, borders = chunk.encodes_before, (chunk.encodes_before[start], chunk.encodes_before[stop])
        return Coming(
            middles=chunk.middles[start:stop],
            tokens=np.diff(chunk.tokens_before[start : stop + 1]),
            encodes=chunk.encodes[borders[0] : borders[1]],
            num_encodes=np.diff(encodes[start : stop + 1]),
        )

    def take(self, target: float) -> Draw:
        """Those samples; what no pack can hold is left out and counted."""
        chunk = self._reach(target)
        start, stop = self._start, self._stop(chunk, target)
        kept = start + np.flatnonzero(chunk.fits[start:stop])
        taken = _select(chunk.draw, chunk.images_before, kept)
        self.given.samples += len(kept)
        self.given.tokens += int(taken.num_tokens.sum())
        self.given.trained_tokens += int(chunk.trained[kept].sum())
        self.given.dropped += stop - start - len(kept)
        self.passed += stop - start
        self.target, self._start = target, stop
        return taken

    def state(self) -> list[float]:
        """All that restoring needs, as JSON: few digits, and no zeros at the end, since there may be 1,000 sources."""
        unit, offset = self._place()
        given = self.given
        tokens = given.tokens - round(self.target)  # mostly a small number
        state = [self.passed, self.target, tokens, given.trained_tokens, given.dropped, self.passed - unit, offset]
        while state and not state[-1]:
            state.pop()
        return state

    def restore(self, state: list[Any]) -> None:
        """Go on where `state` was taken."""
        self.passed, self.target, tokens, trained, dropped, behind, offset = state + [0] * (7 - len(state))
        self._cursor, self._start, self._chunk = Cursor(self.passed - behind, offset), 0, None
        self.given = Given(
            samples=self.passed - dropped,
            tokens=tokens + round(self.target),
            trained_tokens=trained,
            dropped=dropped,
        )

    def _place(self) -> Cursor:
        """The place of the next sample."""
        chunk = self._chunk
        if chunk is None:
            return self._cursor
        if self._start < len(chunk.taken.rows):
            return Cursor(int(chunk.taken.units[self._start]), int(chunk.taken.offsets[self._start]))
        return self._after(chunk)

    def _after(self, chunk: _Chunk) -> Cursor:
        """The place after the last sample of a chunk, which may be in the middle of a group."""
        unit, offset = int(chunk.taken.units[-1]), int(chunk.taken.offsets[-1])
        return Cursor(unit + 1) if self.order.groups is None else Cursor(unit, offset + 1)

    def _stop(self, chunk: _Chunk, target: float) -> int:
        """Where in the chunk what is given is nearest to the target."""
        stop = max(int(np.searchsorted(chunk.middles, target, side="right")), self._start)
        return stop if self.limit is None else min(stop, self._start + self.limit - self.passed)

    def _reach(self, target: float) -> _Chunk:
        """The look-ahead, long enough for a target or for what is left of the source."""
        while True:
            chunk = self._chunk
            if chunk is not None:
                ahead = len(chunk.taken.rows) - self._start
                if chunk.totals[-1] > target or (self.limit is not None and ahead >= self.limit - self.passed):
                    return chunk
                if ahead > len(self.sizes) + CHUNK_SAMPLES and chunk.totals[-1] == chunk.totals[self._start]:
                    raise UserError(self._nothing_fits(chunk))
            self._look_ahead()

    def _look_ahead(self) -> None:
        """Drop what was taken of the chunk, and let it grow."""
        chunk, place = self._chunk, self._place()
        if chunk is None:
            taken = self.order.take(place, CHUNK_SAMPLES)
        else:
            left = chunk.taken.part(self._start)
            taken = left.then(self.order.take(self._after(chunk), max(CHUNK_SAMPLES, len(left.rows))))
        self._chunk, self._start, self._cursor = self._measure(taken), 0, place

    def _measure(self, taken: Taken) -> _Chunk:
        rows, groups = taken.rows, taken.groups
        num_tokens, trained = self.sizes.num_tokens(rows), self.sizes.num_trained(rows)
        images, num_images = self.sizes.images(rows)
        fits = (num_tokens <= self.caps.tokens) & (num_images <= self.caps.images)
        place_in_group = self.passed + np.arange(len(rows)) if self.order.num_units == 1 else taken.offsets
        is_encoded = fits & (place_in_group % self.caps.samples_per_image == 0)
        counted = {"tokens": num_tokens, "trained_tokens": trained, "samples": np.ones_like(rows)}[self.unit]
        totals = _before(np.where(fits, counted, 0)).astype(np.float64) + float(getattr(self.given, self.unit))
        return _Chunk(
            draw=Draw(rows, num_tokens, images, num_images, groups),
            taken=taken,
            trained=trained,
            fits=fits,
            totals=totals,
            middles=(totals[:-1] + totals[1:]) / 2,
            tokens_before=_before(np.where(fits, num_tokens, 0)),
            images_before=_before(num_images),
            encodes=images[np.repeat(is_encoded, num_images)],
            encodes_before=_before(np.where(is_encoded, num_images, 0)),
        )

    def _nothing_fits(self, chunk: _Chunk) -> str:
        if chunk.fits.any():
            return f"source {self.sizes.name!r}: none of its samples has trained tokens, which the shares count"
        return (
            f"source {self.sizes.name!r}: no sample fits a pack of {self.caps.tokens} tokens (data.sequence_length) "
            f"and {self.caps.images} images (data.max_images_per_pack); its shortest has {chunk.draw.num_tokens.min()}"
        )


def _before(numbers: Ints) -> Ints:
    """The sum before each number, and of all."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(numbers)))


def _select(draw: Draw, images_before: Ints, kept: Ints) -> Draw:
    """Some of the samples of a draw."""
    num_images = draw.num_images[kept]
    starts = np.repeat(images_before[kept] - _before(num_images)[:-1], num_images)
    images = draw.images[starts + np.arange(len(starts))]
    return Draw(draw.rows[kept], draw.num_tokens[kept], images, num_images, draw.groups[kept])


# ------------------------------------------------------------------------------------------------------- mixture


class Mixture:
    """All sources, each up to its share of a level that rises window by window."""

    def __init__(self, sources: Sequence[SourceSizes], *, unit: Unit, seed: int, caps: Caps) -> None:
        """
        Raises:
            UserError: nothing of a source can be used.
        """
        self.streams = [
            Stream(source, unit, int(mix64(np.array([index]), seed)[0]) >> 16, caps)
            for index, source in enumerate(sources)
        ]

    def draw(self, num_tokens: int, num_images: int, most_of_one_image: int) -> list[Draw]:
        """The next samples of every source, all together about `num_tokens` long.

        Fewer, where they would need more than `num_images` images or one image more than `most_of_one_image` times,
        samples that can share one counted once: what cannot be packed would be left over in growing numbers.

        Sources that have come to the end of `max_epochs` give nothing more; those that `reweight` leave their share to
        the others.
        """
        shares = self.shares()
        if not any(shares):
            return [stream.take(stream.target) for stream in self.streams]

        ahead = _Ahead(self.streams, shares, float(num_tokens))

        def is_too_much(rise: float) -> bool:
            nonlocal ahead
            if rise > ahead.rise:
                ahead = _Ahead(self.streams, shares, rise)
            tokens, images = ahead.upto(rise)
            if tokens > num_tokens:
                return True
            if len(images) <= min(num_images, most_of_one_image):
                return False
            return len(images) > num_images or int(np.unique(images, return_counts=True)[1].max()) > most_of_one_image

        rise = _largest(is_too_much, float(num_tokens))
        return [s.take(s.target + share * rise) for s, share in zip(self.streams, shares, strict=True)]

    def shares(self) -> list[float]:
        """The share of each source, sources that have come to their end left out; they sum to 1, or all are 0."""
        shares = [0.0 if stream.is_exhausted else stream.sizes.share for stream in self.streams]
        total = sum(shares)
        return [share / total if total else 0.0 for share in shares]

    def ended(self) -> str | None:
        """Name of a source at whose end everything is to stop, once it is there; of the last one, when all are."""
        for stream in self.streams:
            if stream.is_exhausted and stream.sizes.when_exhausted == "stop":
                return stream.sizes.name
        return None if any(self.shares()) else self.streams[-1].sizes.name

    def state(self) -> list[list[float]]:
        """As JSON, all that restoring needs."""
        return [stream.state() for stream in self.streams]

    def restore(self, state: list[list[float]]) -> None:
        """Go on where `state` was taken."""
        for stream, own in zip(self.streams, state, strict=True):
            stream.restore(own)


class _Ahead:
    """What all sources would give up to a rise of the level: laid end to end, so that a search asks them at once."""

    def __init__(self, streams: Sequence[Stream], shares: Sequence[float], rise: float) -> None:
        self.rise = rise
        self.targets, self.shares = np.array([stream.target for stream in streams]), np.array(shares)
        coming = [s.upto(s.target + share * rise) for s, share in zip(streams, shares, strict=True)]
        self.numbers = [len(source.middles) for source in coming]
        self.all = Coming(*map(np.concatenate, zip(*coming, strict=True)))

    def upto(self, rise: float) -> tuple[int, Ints]:
        """Tokens of the samples up to a lower rise, and the images to be placed for them."""
        is_drawn = self.all.middles <= np.repeat(self.targets + self.shares * rise, self.numbers)
        images = self.all.encodes[np.repeat(is_drawn, self.all.num_encodes)]
        return int(self.all.tokens[is_drawn].sum()), images


_STEPS_OF_SEARCH = 24


def _largest(is_too_much: Callable[[float], bool], guess: float) -> float:
    """About the largest number that is not too much, of a condition that once true stays true."""
    low, high = 0.0, guess
    for _ in range(_STEPS_OF_SEARCH):
        if is_too_much(high):
            break
        low, high = high, high * 2
    else:
        return low
    if not low and not is_too_much(high * 0.97):  # a guess is mostly a little too much
        low = high * 0.97
    for _ in range(_STEPS_OF_SEARCH):
        middle = (low + high) / 2
        if middle in (low, high) or high - low <= high * 1e-3:
            break
        low, high = (low, middle) if is_too_much(middle) else (middle, high)
    return low
