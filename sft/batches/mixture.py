"""Exact mixtures: how much each source has given is steered by a target, not by dice.

Every source has a target that grows by its share, and gives whole samples up to the one that comes nearest to it. So at
any time it is at most half a sample from its share. Sources repeat independently, each epoch in a seeded order of its
own. Where samples share images, those about the same images stand together, so that packing can let them share one
encoding. An order is computed, not stored: a source of 141 million samples takes no more memory than one of ten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sft.batches.source_stream import Draw, SourceSizes, Stream, Unit
from sft.core.sample import Caps
from sft.data.orders import Ints, mix64


class Mixture:
    """All sources, each up to its share of a level that rises window by window."""

    def __init__(self, sources: Sequence[SourceSizes], *, unit: Unit, seed: int, caps: Caps) -> None:
        """
        Raises:
            UserError: nothing of a source can be used.
        """
        self.caps = caps
        self.streams = [
            Stream(source, unit, int(mix64(np.array([index]), seed)[0]) >> 16, caps)
            for index, source in enumerate(sources)
        ]

    def draw(self, num_tokens: int, image_weight: int, most_of_one_image: int) -> list[Draw]:
        """Draw the next samples of every source, all of them about `num_tokens` long.

        There are fewer where their images would weigh more than `image_weight` or one image be needed more than
        `most_of_one_image` times, samples that can share one counted once: what cannot be packed would be left over in
        growing numbers.

        Sources that have come to the end of `max_epochs` give nothing more; those that `reweight` leave their share to
        the others. At the end of one that is to stop everything the others have given no more than their shares.
        """
        shares = self.shares()
        rise = 0.0
        if any(shares):
            tokens_per_unit = sum(s.tokens_per_unit * share for s, share in zip(self.streams, shares, strict=True))
            guess = num_tokens * sum(shares) / tokens_per_unit
            rise = self._largest_rise(shares, guess, num_tokens, image_weight, most_of_one_image)
            rise = min([rise, *(s.rise_to_end(share) for s, share in zip(self.streams, shares, strict=True))])
        return [s.draw(s.target + share * rise) for s, share in zip(self.streams, shares, strict=True)]

    def _largest_rise(
        self, shares: list[float], guess: float, num_tokens: int, image_weight: int, most_of_one_image: int
    ) -> float:
        """Return about the largest rise of the level, in the unit of the shares, that stays within the limits."""
        search = _Search(self.streams, shares, guess, self.caps.samples_per_image)

        def is_too_much(rise: float) -> bool:
            nonlocal search
            if rise > search.longest:
                search = _Search(self.streams, shares, rise, self.caps.samples_per_image)
            tokens, images, weight = search.upto(rise)
            if tokens > num_tokens or weight > image_weight:
                return True
            if len(images) <= most_of_one_image:
                return False
            return int(np.unique(images, return_counts=True)[1].max()) > most_of_one_image

        return _largest(is_too_much, guess)

    def shares(self) -> list[float]:
        """Return the share of each source without those that have come to their end; they sum to 1, or all are 0."""
        shares = [0.0 if stream.is_exhausted else stream.sizes.share for stream in self.streams]
        total = sum(shares)
        return [share / total if total else 0.0 for share in shares]

    def ended(self) -> str | None:
        """Return the name of a source at whose end everything stops, once it is there; of the last, when all are."""
        for stream in self.streams:
            if stream.is_exhausted and stream.sizes.when_exhausted == "stop":
                return stream.sizes.name
        return None if any(self.shares()) else self.streams[-1].sizes.name

    def state(self) -> list[list[float]]:
        """Return all that restoring needs, as JSON."""
        return [stream.state() for stream in self.streams]

    def restore(self, state: list[list[float]]) -> None:
        """Go on where `state` was taken."""
        for stream, own in zip(self.streams, state, strict=True):
            stream.restore(own)


class _Search:
    """The look-ahead of all sources end to end, so that each step of a search is one comparison of arrays."""

    def __init__(self, streams: Sequence[Stream], shares: list[float], longest: float, samples_per_image: int) -> None:
        """Look ahead for rises of the level up to `longest`."""
        self.longest = longest
        draws = [s.lookahead(s.target + share * longest) for s, share in zip(streams, shares, strict=True)]
        numbers = [len(draw.rows) for draw in draws]
        self.targets = np.repeat([stream.target for stream in streams], numbers)
        self.shares = np.repeat(shares, numbers)
        self.draw = Draw.joined(draws)
        self.images = self.draw.encoded_images(samples_per_image)

    def upto(self, rise: float) -> tuple[int, Ints, int]:
        """Return the tokens of the samples up to a rise of the level, their images to encode, and what these weigh."""
        is_drawn = self.draw.thresholds <= self.targets + self.shares * rise
        chosen = np.repeat(is_drawn, self.images.numbers)
        tokens, weight = self.draw.num_tokens[is_drawn].sum(), self.images.weights[chosen].sum()
        return int(tokens), self.images.keys[chosen], int(weight)


_STEPS_OF_SEARCH = 24


def _largest(is_too_much: Callable[[float], bool], guess: float) -> float:
    """Return about the largest number that is not too much, by a condition that once true stays true."""
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
