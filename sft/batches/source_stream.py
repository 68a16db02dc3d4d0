"""One source of a mixture: the order of its samples, where it stands, and what it gives next.

SourceSizes  what is known of a source before a sample is read
Draw         samples in the order in which they are drawn
Lookahead    the next samples of a source, measured
Stream       a source: its counters, and its look-ahead
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sft.core.errors import UserError
from sft.core.sample import Caps
from sft.data.orders import Cursor, ImageGroups, Ints, Order, Ordered, ShownImages

Unit = Literal["tokens", "trained_tokens", "samples"]
Floats = NDArray[np.float64]

CHUNK_SAMPLES = 2048
"""By how many samples at least a look-ahead grows."""


class SourceSizes(Protocol):
    """What the planner needs to know of a source: numbers, by row, and no samples."""

    name: str
    share: float
    """Fraction of the mixture."""
    max_epochs: float | None
    """The source gives no more than this."""
    when_exhausted: Literal["stop", "reweight"]

    def __len__(self) -> int:
        """Return the number of samples."""

    def num_tokens(self, rows: Ints) -> Ints:
        """Return the tokens of each of some samples."""

    def num_trained(self, rows: Ints) -> Ints:
        """Return the trained tokens of each."""

    def images(self, rows: Ints) -> ShownImages:
        """Return the distinct images of each."""

    @property
    def groups(self) -> ImageGroups | None:
        """Samples about the same images; None where no two are."""


class Draw(NamedTuple):
    """Samples in the order in which they are drawn: one number each, and the numbers of their images."""

    rows: Ints
    groups: Ints
    """Equal for samples about the same images."""
    places: Ints
    """How many samples about the same images come before it without a break."""
    thresholds: Floats
    """The target at which each is drawn: the one that is half way through it."""
    num_tokens: Ints
    num_trained: Ints
    num_images: Ints
    images: Ints
    """Keys of the distinct images, one sample after another."""
    weights: Ints
    """What each of these images weighs."""

    def part(self, samples: slice | NDArray[np.bool_], images: slice | NDArray[np.bool_]) -> Draw:
        """Return some of the samples, with their images."""
        return Draw._make([*(array[samples] for array in self[:-2]), self.images[images], self.weights[images]])

    @staticmethod
    def joined(draws: Sequence[Draw]) -> Draw:
        """Return several draws end to end."""
        return Draw(*map(np.concatenate, zip(*draws, strict=True)))

    def encoded_images(self, samples_per_image: int) -> ShownImages:
        """Return the images to be encoded: of every few samples that share their images, those of the first."""
        is_first = self.places % samples_per_image == 0
        chosen = np.repeat(is_first, self.num_images)
        return ShownImages(self.images[chosen], self.weights[chosen], np.where(is_first, self.num_images, 0))


@dataclass(kw_only=True)
class Counters:
    """What a source has given so far."""

    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    dropped: int = 0
    """Samples that no pack can hold: passed over, and not counted otherwise."""


class Lookahead(NamedTuple):
    """The next samples of a source, measured. What ends in `_before` has one number more: the last is the whole."""

    ordered: Ordered
    draw: Draw
    """Those that a pack can hold."""
    fitting_before: Ints
    """How many samples that a pack can hold come before each."""
    images_before: Ints
    """How many images come before each sample of `draw`."""
    given_before: Floats
    """What the source has given in the unit of the shares before each sample."""
    thresholds: Floats

    @staticmethod
    def measured(
        ordered: Ordered, sizes: SourceSizes, unit: Unit, caps: Caps, *, places: Ints, given: float
    ) -> Lookahead:
        """Measure samples before which a source has `given` so much."""
        rows = ordered.rows
        num_tokens, num_trained = sizes.num_tokens(rows), sizes.num_trained(rows)
        images = sizes.images(rows)
        fits = (num_tokens <= caps.tokens) & (images.weight_of_samples() <= caps.image_weight)
        counted = {"tokens": num_tokens, "trained_tokens": num_trained, "samples": np.ones_like(rows)}[unit]
        given_before = sums_before(np.where(fits, counted, 0)).astype(np.float64) + given
        thresholds = (given_before[:-1] + given_before[1:]) / 2
        everything = Draw(
            rows,
            ordered.groups,
            places,
            thresholds,
            num_tokens,
            num_trained,
            images.numbers,
            images.keys,
            images.weights,
        )
        draw = everything.part(fits, np.repeat(fits, images.numbers))
        images_before = sums_before(draw.num_images)
        return Lookahead(ordered, draw, sums_before(fits), images_before, given_before, thresholds)

    def between(self, start: int, stop: int) -> Draw:
        """Return the samples from `start` on, before `stop`, that a pack can hold."""
        first, last = self.fitting_before[start], self.fitting_before[stop]
        return self.draw.part(slice(first, last), slice(self.images_before[first], self.images_before[last]))


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
        self.counters = Counters()
        self.passed = 0  # samples passed, drawn or not, over all epochs
        self.target = 0.0
        self._cursor = Cursor()  # where the look-ahead begins
        self._lookahead: Lookahead | None = None
        self._start = 0  # the first sample of the look-ahead that is not passed
        first = self._reaching(1.0)
        if self.limit is not None and first.given_before[self.limit : self.limit + 1].tolist() == [0.0]:
            raise UserError(self._nothing_counts(first))  # it would be over at once, and give nothing
        self.tokens_per_unit = float(first.draw.num_tokens.sum() / first.given_before[-1])

    @property
    def is_exhausted(self) -> bool:
        """Return whether the source has come to the end of its last epoch."""
        return self.limit is not None and self.passed >= self.limit

    @property
    def epochs(self) -> float:
        """Return how many epochs are drawn."""
        return self.passed / len(self.sizes)

    def rise_to_end(self, share: float) -> float:
        """Return by how much the level rises until the source comes to the end at which everything is to stop, as far
        as its look-ahead knows: infinite where that is not near."""
        ahead, last = self._lookahead, self._start + (self.limit or 0) - self.passed
        if self.limit is None or ahead is None or self.sizes.when_exhausted != "stop" or last > len(ahead.ordered.rows):
            return math.inf
        return (float(ahead.given_before[last]) + 0.25 - self.target) / share  # units are whole numbers: 0.25 is none

    def lookahead(self, target: float) -> Draw:
        """Return the samples that bring the source nearest to a target, without drawing them."""
        ahead = self._reaching(target)
        return ahead.between(self._start, self._stop(ahead, target))

    def draw(self, target: float) -> Draw:
        """Draw the samples that bring the source nearest to a target; what no pack can hold is dropped and counted."""
        ahead = self._reaching(target)
        start, stop = self._start, self._stop(ahead, target)
        drawn = ahead.between(start, stop)
        self.counters.samples += len(drawn.rows)
        self.counters.tokens += int(drawn.num_tokens.sum())
        self.counters.trained_tokens += int(drawn.num_trained.sum())
        self.counters.dropped += stop - start - len(drawn.rows)
        self.passed += stop - start
        self.target, self._start = target, stop
        return drawn

    def state(self) -> list[float]:
        """Return all that restoring needs, as JSON: short, since there may be 1,000 sources."""
        unit, offset = self._place()
        given = self.counters
        tokens = given.tokens - round(self.target)  # mostly a small number
        state = [self.passed, self.target, tokens, given.trained_tokens, given.dropped, self.passed - unit, offset]
        while state and not state[-1]:
            state.pop()
        return state

    def restore(self, state: list[Any]) -> None:
        """Go on where `state` was taken."""
        self.passed, self.target, tokens, trained, dropped, behind, offset = state + [0] * (7 - len(state))
        self._cursor, self._start, self._lookahead = Cursor(self.passed - behind, offset), 0, None
        samples, tokens = self.passed - dropped, tokens + round(self.target)
        self.counters = Counters(samples=samples, tokens=tokens, trained_tokens=trained, dropped=dropped)

    def _reaching(self, target: float) -> Lookahead:
        """Return a look-ahead long enough for a target, or for what is left of the source."""
        while True:
            ahead = self._lookahead
            if ahead is not None:
                number = len(ahead.ordered.rows) - self._start
                if ahead.given_before[-1] > target or (self.limit is not None and number >= self.limit - self.passed):
                    return ahead
                given = ahead.given_before[-1] - ahead.given_before[self._start]
                if number > len(self.sizes) + CHUNK_SAMPLES and not given:
                    raise UserError(self._nothing_counts(ahead))
            self._lookahead, self._cursor, self._start = self._longer(ahead), self._place(), 0

    def _longer(self, ahead: Lookahead | None) -> Lookahead:
        """Return the look-ahead without what is passed, and with more samples at its end."""
        if ahead is None:
            ordered = self.order.take(self._cursor, CHUNK_SAMPLES)
        else:
            left = ahead.ordered.after(self._start)
            ordered = left.followed_by(self.order.take(self._end(ahead), max(CHUNK_SAMPLES, len(left.rows))))
        # With one group only, the samples of an epoch go on the row of the last one.
        is_one_row = self.order.num_units == 1
        places = self.passed + np.arange(len(ordered.rows)) if is_one_row else ordered.offsets
        given = float(getattr(self.counters, self.unit))
        return Lookahead.measured(ordered, self.sizes, self.unit, self.caps, places=places, given=given)

    def _stop(self, ahead: Lookahead, target: float) -> int:
        """Return where in the look-ahead what is given is nearest to the target."""
        stop = max(int(np.searchsorted(ahead.thresholds, target, side="right")), self._start)
        return stop if self.limit is None else min(stop, self._start + self.limit - self.passed)

    def _place(self) -> Cursor:
        """Return the place of the next sample."""
        ahead = self._lookahead
        if ahead is None:
            return self._cursor
        if self._start == len(ahead.ordered.rows):
            return self._end(ahead)
        return Cursor(int(ahead.ordered.units[self._start]), int(ahead.ordered.offsets[self._start]))

    def _end(self, ahead: Lookahead) -> Cursor:
        """Return the place after the last sample of a look-ahead, which may be in the middle of a group."""
        unit, offset = int(ahead.ordered.units[-1]), int(ahead.ordered.offsets[-1])
        return Cursor(unit + 1) if self.order.groups is None else Cursor(unit, offset + 1)

    def _nothing_counts(self, ahead: Lookahead) -> str:
        if len(ahead.draw.rows):
            return f"source {self.sizes.name!r}: none of its samples has trained tokens, which the shares count"
        return (
            f"source {self.sizes.name!r}: no sample fits a pack of {self.caps.tokens} tokens (data.sequence_length) "
            f"and {self.caps.image_weight} images (data.max_images_per_pack); its shortest has "
            f"{self.sizes.num_tokens(ahead.ordered.rows).min()}"
        )


def sums_before(numbers: NDArray[Any]) -> Ints:
    """Return the sum of the numbers before each, and of all."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(numbers)))
