#!/usr/bin/env python
"""Draw docs/images/packing.svg: the mixture of the idefics-9b-instruct card, its first packs, and who sees whom in one.

    scripts/draw_packing.py

Packs are those that the planner makes of sources by declared sizes (sft/batches/declared_sizes.py); nothing is drawn
by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sft.batches.declared_sizes import declared_sources
from sft.batches.pack_stream import Planner
from sft.batches.source_stream import SourceSizes
from sft.core.sample import Pack
from sft.core.shipped import recipe_path
from sft.recipe import Recipe, load_recipe

FILE = Path(__file__).parent.parent / "docs" / "images" / "packing.svg"
COLOURS = ("#4e79a7", "#9c755f", "#59a14f", "#edc948", "#76b7b2", "#b07aa1", "#f28e2b", "#ff9da7", "#e15759")
LEFT, WIDTH, ROW, GAP = 16, 560, 26, 16
MAP = 250
"""Side of the picture of attention."""
NUM_PACKS = 6
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f } .small { font-size: 11px } .note { fill: #57606a }
.frame { fill: none; stroke: #8c959f } .image { fill: #24292f }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .note { fill: #9198a1 } .frame { stroke: #6e7681 } .image { fill: #0d1117 }
}
"""


def picture(recipe: Recipe, sizes: Sequence[SourceSizes], packs: Sequence[Pack]) -> str:
    """The whole SVG."""
    tokens = recipe.data.sequence_length
    shown = some(packs)
    bottom = 78 + len(shown) * (ROW + 6)
    height = bottom + 46
    parts = [
        text(LEFT, 18, "The mixture: shares of tokens, as asked"),
        *mixture(recipe),
        text(
            LEFT,
            72,
            f"{len(shown)} of the {len(packs)} packs of its first window, {tokens:,} tokens each; a dot is an image",
        ),
    ]
    for number, pack in enumerate(shown):
        parts += row(pack, sizes, tokens, 80 + number * (ROW + 6))
    parts += legend(recipe, bottom + 18)
    x = LEFT + WIDTH + 34
    parts += [
        text(x, 18, "The last of them: each token sees"),
        text(x, 34, "the shaded ones, of its own sample"),
        *attention(shown[-1], sizes, tokens, x, 44),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {x + MAP + 16} {height}" role="img" '
        f'aria-label="Sources, packs and attention"><style>{STYLE}</style>{"".join(parts)}</svg>\n'
    )


def some(packs: Sequence[Pack]) -> list[Pack]:
    """Packs of all kinds: from the one with fewest samples to the one with most, evenly."""
    by_samples = sorted(packs, key=lambda pack: len(pack.items))
    return [by_samples[round(place)] for place in np.linspace(0, len(packs) - 1, NUM_PACKS)]


def mixture(recipe: Recipe) -> Iterator[str]:
    """The shares, side by side."""
    x = float(LEFT)
    for share, colour in zip(recipe.data.shares, COLOURS, strict=True):
        yield rectangle(x, 26, share * WIDTH, 24, colour)
        if share > 0.06:
            yield text(x + 4, 42, f"{share * 100:.1f} %", "small")
        x += share * WIDTH


def row(pack: Pack, sizes: Sequence[SourceSizes], tokens: int, y: float) -> Iterator[str]:
    """One pack: its samples by length and source, their images as dots."""
    x = float(LEFT)
    for source, length, images in samples(pack, sizes):
        width = length / tokens * WIDTH
        yield rectangle(x, y, width, ROW, COLOURS[source])
        for number in range(images):
            yield f'<circle class="image" cx="{x + width * (number + 0.5) / images:.1f}" cy="{y + ROW - 6}" r="2.2"/>'
        x += width
    yield f'<rect class="frame" x="{LEFT}" y="{y}" width="{WIDTH}" height="{ROW}"/>'


def attention(pack: Pack, sizes: Sequence[SourceSizes], tokens: int, x: float, y: float) -> Iterator[str]:
    """Rows look at columns: a triangle for each sample, nothing between two."""
    at = 0.0
    for source, length, _ in samples(pack, sizes):
        side = length / tokens * MAP
        corners = f"{x + at:.1f},{y + at:.1f} {x + at:.1f},{y + at + side:.1f} {x + at + side:.1f},{y + at + side:.1f}"
        yield f'<polygon points="{corners}" fill="{COLOURS[source]}"/>'
        at += side
    yield f'<rect class="frame" x="{x}" y="{y}" width="{MAP}" height="{MAP}"/>'


def samples(pack: Pack, sizes: Sequence[SourceSizes]) -> Iterator[tuple[int, int, int]]:
    """Source, tokens and images of each sample of a pack."""
    for item in pack.items:
        sample = np.array([item.sample])
        yield item.source, int(sizes[item.source].num_tokens(sample)[0]), int(sizes[item.source].images(sample)[1][0])


def legend(recipe: Recipe, y: float) -> Iterator[str]:
    """Names of the sources, in two lines."""
    for number, (source, colour) in enumerate(zip(recipe.data.mixture, COLOURS, strict=True)):
        x, line = LEFT + number % 5 * 114, y + number // 5 * 18
        yield rectangle(x, line - 9, 10, 10, colour)
        yield text(x + 14, line, source.name, "small note")


def rectangle(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y}" width="{max(width - 0.8, 0.4):.1f}" height="{height}" fill="{colour}"/>'


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y}" class="{kind}">{words}</text>'


def main() -> None:
    recipe = load_recipe(recipe_path("idefics-9b-instruct"))
    sizes = declared_sources(recipe.data)
    planner = Planner(sizes, recipe.data, packs_per_step=recipe.packs_per_step, seed=recipe.seed)
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(picture(recipe, sizes, next(planner.windows())), encoding="utf-8")
    print(FILE)


if __name__ == "__main__":
    main()
