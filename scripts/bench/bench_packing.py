#!/usr/bin/env python3
"""How full and how even the packs of families are whose images are tokens of the text. No data and no model is needed.

scripts/bench/bench_packing.py [--fast] [--by-size] [--json] [--family 256M] [--mix instruct] [--tokens 8192]

Samples are models of data: log-normal lengths, sizes of images as in COCO, scans and web pages; tokens and tiles of an
image are exact. Three mixes: instruct (shares of tokens, with a third of text), cauldron (shares of samples, mostly
images) and coco (an image a sample, of COCO's sizes: the hardest). After 4 windows of 64 packs:

fill      of real tokens, %
cv        coefficient of variation of what packs cost: their tokens, and the work of their images in tokens, %
error     the largest error of a share at the end of a window, in packs
weight    of the images of a pack: mean, 95th percentile, most; tiles, or patches in Idefics2
no fit    samples that no pack can hold, %
idle      of ranks that wait for each other at every micro-step (ZeRO-3, FSDP2) | once a step (DDP), %, by ranks x packs
ms        CPU milliseconds that a window takes, by share unit: tokens, trained_tokens, samples

Behind a figure stands what it is to be at least, or at most. The exit status is 1 where one is not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
from measuring import print_figures
from numpy.typing import NDArray

from sft.batches.pack_stream import Planner
from sft.batches.source_stream import sums_before
from sft.batches.steps import assign_packs
from sft.core.sample import Pack
from sft.data.orders import ImageGroups, Ints, ShownImages
from sft.models.idefics3.tilings import TileSettings
from sft.recipe import DataConfig

# -------------------------------------------------------------------------------------------- what an image costs


class Image(NamedTuple):
    """What an image takes of a pack."""

    tokens: int
    weight: int


@dataclass(frozen=True, kw_only=True)
class Tiled:
    """Images of Idefics3 and SmolVLM."""

    states: int
    tag: int
    """Tokens of `<row_1_col_1>`."""
    whole_tag: int
    """Tokens of `<global-img>`."""
    settings: TileSettings
    cost: float
    """Text tokens that a tile is worth: 1/13 of what a 640 x 480 image is."""

    def image(self, width: int, height: int) -> Image:
        """Return what an image takes."""
        rows, columns, *_ = self.settings.tiling(width, height)
        tiles = rows * columns * (1 + self.tag + self.states) + rows  # a line break after each row, the last one double
        return Image(tiles + 1 + self.whole_tag + self.states + 1, rows * columns + 1)

    def most_weight(self, tokens: int) -> int:
        """Return a cap on the weight of a pack that its tokens never reach."""
        return tokens


@dataclass(frozen=True, kw_only=True)
class Patches:
    """Images of Idefics2: 64 states however large they are, and as many patches as they have."""

    is_split: bool
    cost: float = 118 / 1530
    """Text tokens that a patch is worth: a 640 x 480 image has 1,530."""

    def image(self, width: int, height: int) -> Image:
        """Return what an image takes, with its quarters where it is split."""
        whole = _patches(width, height)
        if not self.is_split:
            return Image(66, whole)
        return Image(326, whole + 4 * _patches(width // 2, height // 2))

    def most_weight(self, tokens: int) -> int:
        """Return a cap on the weight of a pack that its tokens never reach."""
        return tokens * 4900


def _patches(width: float, height: float) -> int:
    scale = min(1.0, 980 / max(width, height))
    return int(max(width * scale, 378) // 14) * int(max(height * scale, 378) // 14)


def _tiled(tile: int, edge: int, is_split: bool, **tokens: int) -> dict[str, Any]:
    return {"settings": TileSettings(edge, tile, is_split), **tokens}


def _families() -> dict[str, Tiled | Patches]:
    small = {"states": 64, "tag": 1, "whole_tag": 1}
    large = {"tag": 8, "whole_tag": 4}
    found: dict[str, Tiled | Patches] = {}
    for name, tile, edge, tokens, cost in (
        ("256M", 512, 2048, small, 10717),
        ("500M", 512, 2048, small, 3630),
        ("2.2B", 384, 1536, large | {"states": 81}, 2435),
        ("Idefics3-8B", 364, 1456, large | {"states": 169}, 524),
    ):
        others = ((" halved", edge // 2, True), (" unsplit", edge, False)) if name != "500M" else ()  # as the 256M
        for kind, longest, is_split in (("", edge, True), *others):
            own = _tiled(tile, longest, is_split, **tokens)
            found[name + kind] = Tiled(cost=cost / 13, **own)
    return found | {"Idefics2": Patches(is_split=False), "Idefics2 split": Patches(is_split=True)}


FAMILIES = _families()

# ----------------------------------------------------------------------------------------------------- the samples

Size = tuple[int, int]
COCO = ((0.55, 640, 480), (0.80, 480, 640), (0.84, 640, 427), (0.86, 427, 640), (0.88, 500, 375), (0.98, 640, 640))
SCANS = ((0.35, 1700, 2200), (0.55, 1654, 2339), (0.75, 333, 500), (0.85, 1000, 3000), (0.95, 762, 1000))


def coco(u: float, v: float) -> Size:
    """Return a size as in COCO."""
    return next(((w, h) for most, w, h in COCO if u < most), (1500, 260))


def scan(u: float, v: float) -> Size:
    """Return the size of a page or a receipt."""
    return next(((w, h) for most, w, h in SCANS if u < most), (2200, 1700))


def web(u: float, v: float) -> Size:
    """Return a size as on web pages: as in COCO, an icon, a screen, or any."""
    if u < 0.4:
        return coco(v, v)
    if u < 0.6:
        return 64 + int(v * 160), 64 + int(v * 997 % 1 * 160)
    return (1920, 1080) if u < 0.8 else (300 + int(v * 1500), 300 + int(v * 991 % 1 * 1500))


@dataclass(frozen=True)
class Kind:
    """Samples alike: how many images, the 5th and 95th percentile of the tokens of their text, sizes of images."""

    images: tuple[int, int]
    text: tuple[int, int]
    size: Any = coco


KINDS = {
    "captions": Kind((1, 1), (20, 60)),
    "vqa": Kind((1, 1), (30, 200)),
    "dialogues": Kind((1, 1), (100, 600)),
    "two images": Kind((2, 2), (40, 100)),
    "scans": Kind((1, 1), (30, 300), scan),
    "web images": Kind((1, 1), (30, 200), web),
    "text": Kind((0, 0), (200, 2000)),
    "interleaved": Kind((1, 8), (300, 1500), web),  # 2.5 images on average, geometric
}
MIXES = {
    "instruct": (
        "tokens",
        {"captions": 5, "vqa": 27, "dialogues": 12, "two images": 2, "scans": 6, "text": 30, "interleaved": 18},
    ),
    "cauldron": (
        "samples",
        {
            "captions": 10,
            "vqa": 40,
            "dialogues": 10,
            "scans": 15,
            "web images": 13,
            "two images": 4,
            "interleaved": 3,
            "text": 5,
        },
    ),
    "coco": ("samples", {"captions": 25, "vqa": 55, "dialogues": 20}),
}
SAMPLES = 60_000


class Source:
    """A source of samples of a kind, in arrays."""

    groups: ImageGroups | None = None
    max_epochs: float | None = None
    when_exhausted = "reweight"

    def __init__(self, name: str, share: float, family: Tiled | Patches, number: int) -> None:
        self.name, self.share, kind = name, share, KINDS[name]
        rng = np.random.default_rng(number + 100)
        fewest, most = kind.images
        self.numbers = np.full(SAMPLES, fewest)
        if most > fewest:
            self.numbers = np.minimum(rng.geometric(1 / 2.5, SAMPLES), most)
        low, high = np.log(kind.text)
        lengths = np.exp(rng.normal((low + high) / 2, (high - low) / 2 / 1.645, SAMPLES))
        self.tokens = np.clip(lengths, kind.text[0] / 2, kind.text[1] * 1.5).astype(np.int64)
        self.text = self.tokens.copy()
        self.starts = sums_before(self.numbers)
        self.weights = np.zeros(0, np.int64)
        self.base = (number + 1) << 40
        if total := int(self.starts[-1]):
            sizes = [kind.size(*place) for place in rng.random((total, 2)).tolist()]
            known = {size: family.image(*size) for size in set(sizes)}
            tokens, self.weights = np.array([known[size] for size in sizes]).T
            self.tokens += np.bincount(np.repeat(np.arange(SAMPLES), self.numbers), tokens, SAMPLES).astype(np.int64)

    def __len__(self) -> int:
        return SAMPLES

    def num_tokens(self, rows: Ints) -> Ints:
        """Return the tokens of samples."""
        return self.tokens[rows]

    def num_trained(self, rows: Ints) -> Ints:
        """Return the trained tokens of samples: a third of their text."""
        return np.maximum(self.text[rows] // 3, 1)

    def images(self, rows: Ints) -> ShownImages:
        """Return the images of samples, each of which is shown once."""
        numbers = self.numbers[rows]
        starts = np.repeat(self.starts[rows] - sums_before(numbers)[:-1], numbers)
        images = starts + np.arange(int(numbers.sum()))
        return ShownImages(self.base + images, self.weights[images], numbers)


def sources_of(family: str, mix: str) -> list[Source]:
    """Return the sources of a mix."""
    shares = MIXES[mix][1]
    return [
        Source(name, share / sum(shares.values()), FAMILIES[family], number)
        for number, (name, share) in enumerate(shares.items())
    ]


# ------------------------------------------------------------------------------------------------------- measuring

WARM_UP = 4
RANKS = tuple((ranks, packs) for packs in (1, 4) for ranks in (2, 8, 32))


def planner_of(
    family: str, mix: str, sources: Sequence[Source], tokens: int, *, unit: str = "", step: int = 64, even: bool = True
) -> Planner:
    """Return the planner of a mix at a length of packs."""
    data = DataConfig.model_validate(
        {
            "mixture": [{"name": s.name, "share": s.share, "datasets": [{"dataset": "-"}]} for s in sources],
            "share_unit": unit or MIXES[mix][0],
            "sequence_length": tokens,
            "max_images_per_pack": FAMILIES[family].most_weight(tokens),
            "max_samples_per_image_per_pack": 1,
            "even_packs": even,
        }
    )
    return Planner(sources, data, packs_per_step=step, seed=0)


def measured(family: str, mix: str, sources: Sequence[Source], tokens: int, windows: int, even: bool) -> dict[str, Any]:
    """Plan windows; return what their packs are like."""
    planner = planner_of(family, mix, sources, tokens, even=even)
    packs: list[list[Pack]] = []
    errors, seconds = [], []
    for number, window in enumerate(_timed(planner, WARM_UP + windows, seconds)):
        if number >= WARM_UP:
            packs.append(window)
            errors.append(_share_error(planner, mix, (number + 1) * len(window)))
    filled, weights = _sizes([pack for window in packs for pack in window], sources)
    costs = filled + weights * FAMILIES[family].cost
    return {
        "fill": 100 * float(filled.mean()) / tokens,
        "cv": 100 * float(costs.std() / costs.mean()),
        "error": max(errors),
        "weight": [float(weights.mean()), float(np.percentile(weights, 95)), float(weights.max())],
        "no fit": 100 * _no_fit(sources, mix, tokens),
        "costs": costs,
        "ms": 1000 * statistics.median(seconds[WARM_UP:]),
    }


def _timed(planner: Planner, number: int, seconds: list[float]) -> Iterator[list[Pack]]:
    windows = planner.windows()
    for _ in range(number):
        started = time.process_time()
        window = next(windows)
        seconds.append(time.process_time() - started)
        yield window


def _sizes(packs: Sequence[Pack], sources: Sequence[Source]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the tokens of packs and the weights of their images, none of which two samples share."""
    tokens, weights = np.zeros(len(packs)), np.zeros(len(packs))
    for number, pack in enumerate(packs):
        for source, row in pack.items:
            own = sources[source]
            tokens[number] += own.tokens[row]
            weights[number] += own.weights[own.starts[row] : own.starts[row + 1]].sum()
    return tokens, weights


def _share_error(planner: Planner, mix: str, packs: int) -> float:
    """Return how many packs the source that is furthest from its share is off, by what is packed."""
    unit = MIXES[mix][0]
    given = np.array([getattr(stream.counters, unit) for stream in planner.mixture.streams], float)
    for bundle in planner.carry:
        given[bundle.items[0].source] -= bundle.num_tokens if unit == "tokens" else len(bundle.items)
    off = np.abs(given - given.sum() * np.array([size.share for size in planner.sizes])).max()
    return float(off / (planner.caps.tokens if unit == "tokens" else given.sum() / packs))


def _no_fit(sources: Sequence[Source], mix: str, tokens: int) -> float:
    of_unit = [source.share / (source.tokens.mean() if MIXES[mix][0] == "tokens" else 1) for source in sources]
    return float(np.average([(source.tokens > tokens).mean() for source in sources], weights=of_unit))


def idle(costs: NDArray[np.float64], ranks: int, packs: int) -> list[float]:
    """Return the share of the time, in %, by which the dearest rank is over the mean: at every micro-step, and once a
    step."""
    found = []
    for start, stop in pairwise(range(0, len(costs) + 1, ranks * packs)):
        own = costs[start:stop].tolist()
        loads = np.array([[own[pack] for (pack,) in rank] for rank in assign_packs(own, ranks, 1)])
        found.append([loads.max(0).sum() / loads.sum() * ranks - 1, loads.sum(1).max() / loads.sum() * ranks - 1])
    return (100 * np.mean(found, axis=0)).tolist()


# ------------------------------------------------------------------------------------------------------------ aims

TOKENS = (2048, 4096, 8192, 16384)
SMALL = ("256M", "500M", "2.2B", "Idefics3-8B")
IDLE = "idle 8 x 4"
_TILED_AIMS = {  # fill instruct, cauldron, coco; cv; idle at every micro-step
    "256M": (99.5, 97.5, 97, 8, 5),
    "500M": (99.5, 97.5, 97, 8, 5),
    "2.2B": (99.5, 96.5, 96, 6, 4),
    "Idefics3-8B": (99.5, 94, 91, 5, 2),
}


def aims_of(family: str, mix: str, tokens: int) -> dict[str, tuple[str, float]]:
    """Return what figures are to be: at least or at most so much."""
    if family in _TILED_AIMS and tokens == 8192:
        *fills, cv, waiting = _TILED_AIMS[family]
        fill = dict(zip(("instruct", "cauldron", "coco"), fills, strict=True))[mix]
        error = 4 if family == "Idefics3-8B" and mix != "instruct" else 3
        even = {} if mix == "coco" else {"cv": ("<=", cv), IDLE: ("<=", waiting)}
        return {"fill": (">=", fill), **even, "error": ("<=", error), "ms": ("<=", 10)}
    if mix == "coco":
        return {}
    if (family, tokens) in (("Idefics2 split", 8192), ("Idefics2", 4096)):
        cv, waiting = (10, 5) if "split" in family else (7, 3)
        return {"fill": (">=", 99 if mix == "instruct" else 98), "cv": ("<=", cv), IDLE: ("<=", waiting)}
    if tokens == 4096 and family.endswith(("halved", "unsplit")):
        return {"fill": (">=", 99 if mix == "instruct" else 97.5)}
    return {}


def rows(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the figures of each setting."""
    windows = 6 if args.fast else 12
    for family in (args.family,) if args.family else ("256M", "Idefics3-8B") if args.fast else FAMILIES:
        for mix in (args.mix,) if args.mix else MIXES:
            if mix == "coco" and family not in SMALL:
                continue
            sources = sources_of(family, mix)
            for tokens in (args.tokens,) if args.tokens else (8192,) if args.fast else TOKENS:
                is_shown = family in SMALL and family != "500M" and mix != "coco"
                if args.tokens or is_shown or aims_of(family, mix, tokens):
                    yield f"{family}, {mix}, {tokens:,}", _row(family, mix, sources, tokens, windows, not args.by_size)


def _row(family: str, mix: str, sources: Sequence[Source], tokens: int, windows: int, even: bool) -> dict[str, Any]:
    found = measured(family, mix, sources, tokens, windows, even)
    costs = found.pop("costs")
    found[IDLE] = idle(costs, 8, 4)[0]
    found["ms"] = {MIXES[mix][0]: found["ms"]}
    if tokens == 8192 and family in SMALL and mix != "coco":
        found["idle"] = {f"{ranks} x {packs}": idle(costs, ranks, packs) for ranks, packs in RANKS[:-1]}
        large = planner_of(family, mix, sources, tokens, step=128, even=even)
        more = [pack for window in islice(large.windows(), 1, 1 + windows // 2) for pack in window]
        filled, weights = _sizes(more, sources)
        found["idle"]["32 x 4"] = idle(filled + weights * FAMILIES[family].cost, 32, 4)
    if tokens == 8192 and family != "500M":
        for unit in {"tokens", "trained_tokens", "samples"} - found["ms"].keys():
            seconds: list[float] = []
            for _ in _timed(planner_of(family, mix, sources, tokens, unit=unit, even=even), WARM_UP + 3, seconds):
                pass
            found["ms"][unit] = 1000 * statistics.median(seconds[WARM_UP:])
    return found


def main() -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="two families, packs of 8,192 tokens")
    parser.add_argument("--by-size", action="store_true", help="packs by size alone, as for IDEFICS-1")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--family", choices=FAMILIES)
    parser.add_argument("--mix", choices=MIXES)
    parser.add_argument("--tokens", type=int)
    args = parser.parse_args()
    ratios: dict[str, float] = {}
    found = {}
    missed = []
    for name, figures in rows(args):
        found[name] = figures
        family, mix, tokens = name.split(", ")
        for key, (sign, aim) in aims_of(family, mix, int(tokens.replace(",", ""))).items():
            figure = max(figures[key].values()) if key == "ms" else figures[key]
            ratios[f"{name}: {key} {sign} {aim:g}"] = figure / aim
            if figure < aim if sign == ">=" else figure > aim:
                missed.append(f"{name}: {key} {figure:.2f} {sign} {aim:g}")
        if not args.json:
            print(_line(name, figures, aims_of(family, mix, int(tokens.replace(",", "")))), flush=True)
    if args.json:
        print(json.dumps({"ratios": ratios, **found}))
    elif missed:
        print_figures({"missed": len(missed)})
        print("\n".join(missed))
    return int(bool(missed))


def _line(name: str, figures: dict[str, Any], aims: dict[str, tuple[str, float]]) -> str:
    """Return the figures of a setting on one line, each with its aim."""

    def shown(key: str, figure: str) -> str:
        return f"{key} {figure}" + (f" ({aims[key][0]} {aims[key][1]:g})" if key in aims else "")

    mean, most_of_95, most = figures["weight"]
    parts = [
        shown("fill", f"{figures['fill']:.2f}"),
        shown("cv", f"{figures['cv']:.1f}"),
        shown("error", f"{figures['error']:.2f}"),
        f"weight {mean:,.0f} / {most_of_95:,.0f} / {most:,.0f}",
        f"no fit {figures['no fit']:.2f}",
        shown(IDLE, f"{figures[IDLE]:.1f}"),
        shown("ms", ", ".join(f"{unit} {ms:.1f}" for unit, ms in figures["ms"].items())),
    ]
    text = f"{name:31} " + "  ".join(parts)
    if "idle" in figures:
        text += "\n    idle " + "  ".join(f"{name}: {a:.1f} | {b:.1f}" for name, (a, b) in figures["idle"].items())
    return text


if __name__ == "__main__":
    sys.exit(main())
