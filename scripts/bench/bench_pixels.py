#!/usr/bin/env python3
"""How fast encoded images become a batch on the device, and how close they are to transformers' pixels.

    scripts/bench/bench_pixels.py [--json] [--alternatives] [--images 16] [--rounds 15]

Both sides start from the same JPEG bytes and end with normalised float32 (N, 3, 224, 224): ours by `load_tiles`, a
stack of uint8 and the model's own `normalise`, the other by `transformers.IdeficsImageProcessor`. One thread; sides
alternate; a ratio is of medians of CPU seconds of this process, larger is better for us.

    ratios       photographs of waves and noise, by size: evaluation, and `crop`, with the training crop
    difference   mean absolute difference from the processor's resized pixels, of 255, by kind of picture
    tiles        photographs of eight shapes, cut into tiles for SmolVLM-256M and Idefics3-8B: the ratio to their
                 processor from JPEG bytes (`jpeg`) and from decoded pixels (`pixels`), and the largest and the mean
                 difference of 255. Only these with --tiles

--alternatives prints, for other ways to decode and resize, CPU milliseconds from the bytes of a 640x480 photograph to
uint8, and differences by kind of picture. On x86-64 with Pillow 13.0, simplejpeg 1.9 and torch 2.13:

                                         ms     photo   texture      text  gradient
    ours                               1.82     0.004     0.004     0.005     0.002
    Pillow, resized by Pillow          4.51     0.000     0.000     0.000     0.000
    Pillow, resized by torch           2.46     0.004     0.004     0.005     0.002
    simplejpeg, resized by Pillow      4.29     0.000     0.000     0.000     0.000
    Pillow draft, resized by Pillow    2.28     1.276     3.695     7.151     0.195
    Pillow draft, resized by torch     1.65     1.276     3.695     7.152     0.192
    simplejpeg scaled, resized by ...  1.34     1.276     3.695     7.152     0.192

`draft` and `scaled` decode to 320x240. That is out: letters and fine texture would differ by more than 2 of 255.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import simplejpeg
import torch
from measuring import cpu_medians
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from transformers import Idefics3Config
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from sft.core.images import decode_rgb
from sft.models.idefics.images import IdeficsImages, normalise
from sft.models.idefics3 import images as tiled
from sft.models.image_transform import load_tiles, training_crop
from sft.models.inline_model import normalise as normalise_tiles

SIZE = 224
SQUARE = IdeficsImages.of_size(SIZE)
SIZES = ((640, 480), (224, 224))
TILED = {"SmolVLM-256M": (2048, 512), "Idefics3-8B": (1456, 364)}
"""Longest edge and tile of a model, in pixels."""
TILED_SHAPES = ((640, 480), (480, 640), (64, 64), (1920, 1080), (3000, 500), (500, 3000), (200, 3000), (60, 900))
LETTERS = tuple("abcdefghij klmnop qrstu vwxyz")

Pixels = NDArray[np.uint8]


# ----------------------------------------------------------------------------------------------------- pictures


def photo(rng: np.random.Generator, width: int, height: int) -> NDArray[Any]:
    """Waves and noise: about 100 KB at 640 x 480, as photographs have."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 100 * np.sin(x / rng.uniform(5, 90) + y / rng.uniform(5, 90)) for _ in range(3)]
    return np.stack(waves, axis=-1) + rng.normal(0, 12, (height, width, 3))


def texture(rng: np.random.Generator, width: int, height: int) -> NDArray[Any]:
    """Detail at every scale with the spectrum of natural pictures (1/f)."""
    frequency = np.hypot(np.fft.fftfreq(width)[None], np.fft.fftfreq(height)[:, None])
    frequency[0, 0] = 1
    noise = rng.normal(size=(3, height, width)) + 1j * rng.normal(size=(3, height, width))
    bands = np.fft.ifft2(noise / frequency).real
    return np.moveaxis(128 + 45 * bands / bands.std(), 0, -1)


def text(rng: np.random.Generator, width: int, height: int) -> NDArray[Any]:
    """Lines of small black letters on white."""
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    for y in range(2, height, 18):
        draw.text((4, y), "".join(rng.choice(LETTERS, width // 7)), fill="black", font=font)
    return np.asarray(image)


def gradient(rng: np.random.Generator, width: int, height: int) -> NDArray[Any]:
    """Smooth ramps of colour."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)], axis=-1)


KINDS = {"photo": photo, "texture": texture, "text": text, "gradient": gradient}


def jpegs(kind: str, size: tuple[int, int], number: int) -> list[bytes]:
    """Pictures of a kind as JPEG of quality 88."""
    rng = np.random.default_rng(0)
    contents = []
    for _ in range(number):
        file = io.BytesIO()
        Image.fromarray(KINDS[kind](rng, *size).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
        contents.append(file.getvalue())
    return contents


# -------------------------------------------------------------------------------------------------------- sides


def processor(contents: list[bytes]) -> Any:
    """The reference."""
    images = [Image.open(io.BytesIO(content)) for content in contents]
    return IdeficsImageProcessorPil()(images, return_tensors="pt")


def processor_pixels(contents: list[bytes]) -> NDArray[Any]:
    """What the reference resizes to, before it normalises."""
    images = [Image.open(io.BytesIO(content)) for content in contents]
    pixels = IdeficsImageProcessorPil()(images, return_tensors="pt", do_rescale=False, do_normalize=False)
    return np.asarray(pixels, dtype=np.float64)


def batch(load: Callable[[bytes], Pixels], contents: list[bytes]) -> torch.Tensor:
    """Ours: a stack of uint8, normalised where the model is."""
    return normalise(torch.from_numpy(np.stack([load(content) for content in contents])))


def load(content: bytes) -> Pixels:
    """As in evaluation."""
    return load_tiles(content, SQUARE)[0]


def load_cropped(content: bytes) -> Pixels:
    """As in training."""
    return load_tiles(content, SQUARE, partial(training_crop, seed=0, step=len(content), image_key=0))[0]


def _by_pillow(image: Image.Image) -> Pixels:
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def _by_torch(pixels_HWC: Pixels) -> Pixels:
    pixels = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(pixels, size=(SIZE, SIZE), mode="bicubic", antialias=True)[0].numpy()


def _draft(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.draft("RGB", (SIZE, SIZE))
    image.load()
    return image


def _scaled(content: bytes) -> Pixels:
    return simplejpeg.decode_jpeg(content, min_width=SIZE, min_height=SIZE)


ALTERNATIVES: dict[str, Callable[[bytes], Pixels]] = {
    "ours": load,
    "Pillow, resized by Pillow": lambda content: _by_pillow(decode_rgb(content)),
    "Pillow, resized by torch": lambda content: _by_torch(np.array(decode_rgb(content))),
    "simplejpeg, resized by Pillow": lambda content: _by_pillow(Image.fromarray(simplejpeg.decode_jpeg(content))),
    "Pillow draft, resized by Pillow": lambda content: _by_pillow(_draft(content)),
    "Pillow draft, resized by torch": lambda content: _by_torch(np.array(_draft(content))),
    "simplejpeg scaled, resized by torch": lambda content: _by_torch(_scaled(content)),
}


# ------------------------------------------------------------------------------------------------------ measuring


def ratios(
    loaders: dict[str, Callable[[bytes], Pixels]], size: tuple[int, int], number: int, rounds: int
) -> dict[str, float]:
    """How many times as fast as the processor each loader is."""
    contents = jpegs("photo", size, number)
    sides: dict[str, Callable[[], Any]] = {"processor": lambda: processor(contents)}
    sides |= {name: lambda one=one: batch(one, contents) for name, one in loaders.items()}
    seconds = cpu_medians(sides, rounds)
    return {name: seconds["processor"] / seconds[name] for name in loaders}


def differences(one: Callable[[bytes], Pixels], size: tuple[int, int]) -> dict[str, float]:
    """By kind of picture."""
    result = {}
    for kind in KINDS:
        contents = jpegs(kind, size, 4)
        ours = np.stack([one(content) for content in contents]).astype(np.float64)
        result[kind] = float(np.abs(ours - processor_pixels(contents)).mean())
    return result


def measure(number: int, rounds: int) -> dict[str, Any]:
    """All figures."""
    figures: dict[str, Any] = {"ratios": {}, "difference": {}, "bytes_per_image": {}}
    for size in SIZES:
        name = "{}x{}".format(*size)
        found = ratios({name: load, f"{name} crop": load_cropped}, size, number, rounds)
        figures["ratios"] |= found
        figures["difference"][name] = differences(load, size)
        figures["bytes_per_image"][name] = statistics.mean(map(len, jpegs("photo", size, number)))
    return figures


def tiled_images(longest_edge: int, tile: int) -> tiled.TiledImages:
    """How a model with tiles of this size cuts images."""
    config = Idefics3Config(
        text_config={"model_type": "llama"}, vision_config={"image_size": tile, "patch_size": 16}, scale_factor=4
    )
    config.preprocessor = {"size": {"longest_edge": longest_edge}, "max_image_size": {"longest_edge": tile}}
    return tiled.TiledImages(config)


def tile_figures(longest_edge: int, tile: int, size: tuple[int, int], rounds: int) -> dict[str, float]:
    """Ratios and differences of an image of a size; all sides end with normalised tiles."""
    images, (content,) = tiled_images(longest_edge, tile), jpegs("photo", size, 1)
    processor = Idefics3ImageProcessorPil(size={"longest_edge": longest_edge}, max_image_size={"longest_edge": tile})
    picture = decode_rgb(content)
    pixels = np.array(picture)

    def theirs(picture: Image.Image) -> torch.Tensor:
        return torch.as_tensor(processor([[picture]], return_tensors="pt")["pixel_values"][0])

    def ours() -> torch.Tensor:
        return normalise_tiles(torch.from_numpy(images.cut(pixels, images.tiling(*size))))

    sides: dict[str, Callable[[], Any]] = {
        "processor_jpeg": lambda: theirs(Image.open(io.BytesIO(content)).convert("RGB")),
        "jpeg": lambda: normalise_tiles(torch.from_numpy(load_tiles(content, images))),
        "processor_pixels": lambda: theirs(picture),
        "pixels": ours,
    }
    seconds = cpu_medians(sides, rounds)
    apart = (ours() - theirs(picture)).abs() * 127.5
    ratios = {name: seconds[f"processor_{name}"] / seconds[name] for name in ("jpeg", "pixels")}
    return ratios | {"largest": float(apart.max().round()), "mean": float(apart.mean())}


def tiles(rounds: int) -> dict[str, dict[str, float]]:
    """The figures of all models and shapes."""
    return {
        f"{name} {size[0]}x{size[1]}": tile_figures(*settings, size, rounds)
        for name, settings in TILED.items()
        for size in TILED_SHAPES
    }


def print_alternatives(number: int, rounds: int) -> None:
    """A line each: CPU milliseconds from the bytes to uint8 of an image, and differences."""
    contents = jpegs("photo", SIZES[0], number)
    sides = {name: lambda one=one: [one(content) for content in contents] for name, one in ALTERNATIVES.items()}
    seconds = cpu_medians(sides, rounds)
    print(f"{'':36} {'ms':>6} " + " ".join(f"{kind:>9}" for kind in KINDS))
    for name, one in ALTERNATIVES.items():
        difference = differences(one, SIZES[0])
        milliseconds = seconds[name] / number * 1000
        print(f"{name:36} {milliseconds:6.2f} " + " ".join(f"{difference[kind]:9.3f}" for kind in KINDS))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--alternatives", action="store_true", help="the other decoders and resizers instead")
    parser.add_argument("--tiles", action="store_true", help="only the images that are cut into tiles")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.alternatives:
        print_alternatives(arguments.images, arguments.rounds)
        return
    figures = {} if arguments.tiles else measure(arguments.images, arguments.rounds)
    figures["tiles"] = tiles(min(arguments.rounds, 7))
    if arguments.json:
        json.dump(figures, sys.stdout)
        print()
        return
    for name, ratio in figures.get("ratios", {}).items():
        print(f"{name:18} {ratio:8.2f}")
    for name, difference in [*figures.get("difference", {}).items(), *figures["tiles"].items()]:
        print(f"{name}: " + ", ".join(f"{kind} {value:.3f}" for kind, value in difference.items()))


if __name__ == "__main__":
    main()
