"""Sources by declared sizes instead of data: what a mixture would be, before anything is downloaded.

`CARD` are the sources of the idefics-9b-instruct model card. Numbers of samples are the card's own and, for the replay,
those of OBELICS' and LAION's pages. Of the lengths two are published: UltraChat's mean, 1,467 tokens, and OBELICS' 115
billion tokens and 353 million images in 141 million documents. The others are estimates from the form of the data, a
question and its answer in the template: they give the order of a figure, not the figure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sft.core.errors import UserError, nearest
from sft.data.orders import ImageGroups, Ints, ShownImages, mix64
from sft.recipe import DataConfig, SourceConfig

SHORTEST = 12
"""Tokens of the template around the shortest question and answer."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Lengths are log-normal: their median, and the standard deviation of their logarithm."""

    samples: int
    median_tokens: float
    spread: float
    trained_share: float
    """Of the tokens, under answers-only training."""
    images_per_sample: float = 1.0
    """A whole number, or the mean of one to many (geometric)."""
    distinct_images: int = 0
    bytes_per_image: int = 110_000
    """As JPEG of about 640 x 480."""


CARD = {
    "m3it": Sizes(samples=1_500_000, median_tokens=65, spread=0.6, trained_share=0.25, distinct_images=1_000_000),
    "lrv_instruction": Sizes(samples=155_000, median_tokens=50, spread=0.4, trained_share=0.4, distinct_images=35_000),
    "llava_instruct": Sizes(samples=158_000, median_tokens=300, spread=0.5, trained_share=0.7, distinct_images=81_000),
    "llavar": Sizes(samples=15_500, median_tokens=200, spread=0.5, trained_share=0.5, distinct_images=15_500),
    "svit": Sizes(samples=3_200_000, median_tokens=65, spread=0.4, trained_share=0.4, distinct_images=108_077),
    "scene_difference": Sizes(
        samples=158_000, median_tokens=60, spread=0.3, trained_share=0.5, images_per_sample=2, distinct_images=144_000
    ),
    "ultrachat": Sizes(samples=1_468_348, median_tokens=1350, spread=0.4, trained_share=0.85, images_per_sample=0),
    "image_text_pairs": Sizes(
        samples=400_000_000,
        median_tokens=28,
        spread=0.4,
        trained_share=0.8,
        distinct_images=400_000_000,
        bytes_per_image=40_000,
    ),
    "obelics": Sizes(
        samples=141_047_697,
        median_tokens=560,
        spread=0.9,
        trained_share=0.98,
        images_per_sample=2.5,
        distinct_images=353_000_000,
    ),
}


class DeclaredSource:
    """What `sft.batches.mixture` asks of a source, by formula: a function of the row, in no memory."""

    groups: ImageGroups | None = None

    def __init__(self, source: SourceConfig, share: float, declared: Sizes, data: DataConfig, index: int) -> None:
        self.name, self.share, self.declared = source.name, share, declared
        self.max_epochs, self.when_exhausted = source.max_epochs, source.when_exhausted
        self.longest = data.sequence_length
        self.train_on = data.train_on
        self.seed = index + 1

    def __len__(self) -> int:
        return self.declared.samples

    def num_bytes(self, num_tokens: int, num_images: int) -> int:
        """Return the bytes of some of its texts and images, about four a token."""
        return 4 * num_tokens + self.declared.bytes_per_image * num_images

    def num_tokens(self, rows: Ints) -> Ints:
        """Return the tokens of each sample; what is longer than a pack counts as cut to it."""
        radius = np.sqrt(-2 * np.log(self._uniform(rows, 1)))
        normal = radius * np.cos(2 * np.pi * self._uniform(rows, 2))  # Box and Muller
        lengths = self.declared.median_tokens * np.exp(self.declared.spread * normal)
        return np.asarray(np.clip(lengths, SHORTEST, self.longest), dtype=np.int64)

    def num_trained(self, rows: Ints) -> Ints:
        """Return the trained tokens of each sample."""
        share = 1.0 if self.train_on == "all" else self.declared.trained_share
        return np.asarray(np.maximum(np.floor(share * self.num_tokens(rows)), 1), dtype=np.int64)

    def images(self, rows: Ints) -> ShownImages:
        """Return the distinct images of each sample: in turn, or drawn where samples differ in how many they have."""
        mean = self.declared.images_per_sample
        if mean == int(mean):
            numbers = np.full(len(rows), int(mean))
        else:
            numbers = np.ceil(np.log(self._uniform(rows, 3)) / np.log(1 - 1 / mean)).clip(1, 24).astype(np.int64)
        of = np.repeat(rows, numbers)
        place = np.arange(len(of)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
        turns = of * int(mean) + place if mean == int(mean) else mix64(of * 64 + place, self.seed) >> np.uint64(1)
        keys = turns.astype(np.int64) % max(self.declared.distinct_images, 1)
        return ShownImages(keys + self.seed * 2**40, np.ones_like(keys), numbers)

    def _uniform(self, rows: Ints, number: int) -> NDArray[np.float64]:
        """Return a number between 0 and 1, without 0, for each row."""
        return (mix64(rows, 64 * self.seed + number).astype(np.float64) + 1) / 2.0**64


def declared_sources(data: DataConfig) -> list[DeclaredSource]:
    """Return the sources of a recipe by the sizes declared for their names.

    Raises:
        UserError: no sizes are declared for a source.
    """
    for source in data.mixture:
        if source.name not in CARD:
            raise UserError(
                f"source {source.name!r}: no sizes are declared for it{nearest(source.name, CARD)}"
                f" (declared: {', '.join(CARD)})"
            )
    return [
        DeclaredSource(source, share, CARD[source.name], data, index)
        for index, (source, share) in enumerate(zip(data.mixture, data.shares, strict=True))
    ]
