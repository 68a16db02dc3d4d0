"""Exact mixtures: the next sample comes from the source furthest below its share. No dice.

Sources repeat independently, each in a seeded order of its own that is drawn anew every epoch. Samples about one image
stand together in it, so that packing can let them share one encoding of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.sample import PackItem


@dataclass(frozen=True, kw_only=True)
class SourceSizes:
    """What the planner needs to know of a source: numbers, no samples."""

    name: str
    share: float
    """Fraction of the mixture."""
    num_tokens: NDArray[np.int64]
    num_trained: NDArray[np.int64]
    images: tuple[tuple[int, ...], ...]
    """Numbers of each sample's images; equal numbers are the same image, across sources too."""


@dataclass(kw_only=True)
class Drawn:
    """What was taken from a source so far."""

    position: int = 0
    """Samples of all epochs."""
    samples: int = 0
    """Those of them that count: not given back."""
    tokens: int = 0
    trained_tokens: int = 0


class Mixture:
    """An endless stream of samples with exact shares: no source is ever ahead, in the chosen unit, by more than one of
    its own samples."""

    def __init__(self, sources: Sequence[SourceSizes], *, unit: str, seed: int) -> None:
        self.sources = sources
        self.unit = unit
        self.seed = seed
        self.drawn = [Drawn() for _ in sources]
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}
        self._groups = [_image_groups(source.images) for source in sources]

    def draw(self) -> PackItem:
        """The next sample."""
        consumed = [self._consumed(drawn) for drawn in self.drawn]
        total = sum(consumed)
        behind = [source.share * total - own for source, own in zip(self.sources, consumed, strict=True)]
        index = behind.index(max(behind))
        source, drawn = self.sources[index], self.drawn[index]
        epoch, place = divmod(drawn.position, len(source.num_tokens))
        sample = int(self._order(index, epoch)[place])
        drawn.position += 1
        drawn.samples += 1
        drawn.tokens += int(source.num_tokens[sample])
        drawn.trained_tokens += int(source.num_trained[sample])
        return PackItem(index, sample)

    def give_back(self, item: PackItem) -> None:
        """Not to count the sample just drawn, which cannot be used; it is not drawn again in this epoch."""
        source, drawn = self.sources[item.source], self.drawn[item.source]
        drawn.samples -= 1
        drawn.tokens -= int(source.num_tokens[item.sample])
        drawn.trained_tokens -= int(source.num_trained[item.sample])

    def epochs(self, index: int) -> float:
        """How often a source has been gone through."""
        return self.drawn[index].position / len(self.sources[index].num_tokens)

    def state(self) -> list[dict[str, Any]]:
        """The counters, as JSON: all that restoring needs."""
        return [vars(drawn).copy() for drawn in self.drawn]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Go on where `state` was taken."""
        self.drawn = [Drawn(**drawn) for drawn in state]

    def _consumed(self, drawn: Drawn) -> int:
        return {"tokens": drawn.tokens, "trained_tokens": drawn.trained_tokens, "samples": drawn.samples}[self.unit]

    def _order(self, index: int, epoch: int) -> NDArray[np.int64]:
        """The permutation of a source in an epoch: image groups shuffled, and samples shuffled inside each."""
        if self._orders.get(index, (-1,))[0] != epoch:
            groups = self._groups[index]
            rng = np.random.default_rng([self.seed, index, epoch])
            rank_of_group = rng.permutation(int(groups.max()) + 1)
            self._orders[index] = (epoch, np.lexsort((rng.random(len(groups)), rank_of_group[groups])))
        return self._orders[index][1]


def _image_groups(images: Sequence[tuple[int, ...]]) -> NDArray[np.int64]:
    """A number per sample: equal for samples about the same images, its own for a sample without images."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(own or ("text", i), len(numbers)) for i, own in enumerate(images)])
