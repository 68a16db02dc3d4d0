"""Encoded images -> uint8 tiles as a model takes them: one path for training, evaluation and chat.

Images are decoded here and resized by `resize`; how they are cut is the family's (`Images.cut`). Training may crop,
evaluation does not. torchvision is not used, there or not. Images are turned as their EXIF says. m4 did not, nor does
IDEFICS's processor in transformers; but a user, an annotator and transformers' `load_image` see them so.

JPEG is decoded by simplejpeg (libjpeg-turbo, from memory straight into an array), the rest by Pillow. Everything is
resized by torch's integer kernel: vectorised, as Pillow's is not, with the same result on every instruction set. JPEGs
are decoded whole up to MAX_DECODED_PIXELS. Decoding all to a half, a quarter or an eighth (Pillow's `draft`) would save
a tenth to a quarter of the time, but letters come out by 7/255 differently and fine texture by 4/255;
scripts/bench/bench_pixels.py --alternatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import count
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from sft.core.image_formats import JPEG, turned
from sft.core.images import Header, decode_rgb, open_checked, read_bytes, size_of
from sft.core.sample import AS_SHOWN, Decoding, ImageRef, Tiling
from sft.models.family import Images, Pixels, Tiles

CROP_AREA = (0.9, 1.0)
"""Share of the image that a training crop keeps (m4)."""
CROP_ASPECT = (3 / 4, 4 / 3)
"""Width / height of a training crop: torchvision's default, which m4 left alone."""
CROP_TRIES = 10
_LOG_ASPECT = (math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1]))


class Crop(NamedTuple):
    """A box in pixels of the decoded image; right and bottom are the first pixels outside."""

    left: int
    top: int
    right: int
    bottom: int


def load_tiles(
    content: bytes, images: Images, crop: Callable[[int, int], Crop] | None = None, decoding: Decoding = AS_SHOWN
) -> Tiles:
    """Return the tiles of an encoded image, or of the box that `crop` gives for its decoded width and height;
    transparency over white. This is the one way from an image file to what a model sees.

    Raises:
        SkipSample: as `sft.core.images.decode_rgb`.
    """
    pixels_HWC, size = _decode(content, decoding)
    if crop is not None:
        height, width, _ = pixels_HWC.shape
        box = crop(width, height)
        if not (0 <= box.left < box.right <= width and 0 <= box.top < box.bottom <= height):
            raise ValueError(f"{box} is not inside an image of {width} x {height}")
        pixels_HWC = pixels_HWC[box.top : box.bottom, box.left : box.right]
        size = (box.right - box.left, box.bottom - box.top)
    return images.cut(pixels_HWC, images.tiling(*size))


def tiling_of(image: ImageRef, images: Images) -> Tiling:
    """Return how an image is cut. Its header is read only where that depends on a size that nobody has noted.

    Raises:
        SkipSample: the image cannot be read.
    """
    if not images.depends_on_size:
        return images.one_tile
    return images.tiling(*(image.size or size_of(read_bytes(image), image.decoding)))


def resize(pixels: Pixels, height: int, width: int, mode: str) -> NDArray[np.uint8]:
    """Return an image (H, W, C) resized with antialiasing, as (C, height, width). `mode`: see torch's `interpolate`."""
    pixels_1CHW = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized_1CHW = interpolate(pixels_1CHW, size=(height, width), mode=mode, antialias=True)
    return resized_1CHW[0].numpy()


def resize_in_order(image_1CHW: Tensor, height: int, width: int, mode: str) -> Tensor:
    """Return an image (1, C, H, W) resized with antialiasing within 2 / 255 of Pillow. torch resizes columns before
    rows; Pillow since 13.0 begins with rows where many more of them go (Pillow#9549), which changes pixels by up to
    60 / 255."""
    old_height, old_width = image_1CHW.shape[2:]
    is_rows_first = 0 < old_height - height > 2 * (old_width - width)
    for size in ((height, old_width), (height, width))[not is_rows_first :]:
        image_1CHW = interpolate(image_1CHW, size=size, mode=mode, antialias=True)
    return image_1CHW


def training_crop(width: int, height: int, *, seed: int, step: int, image_key: int) -> Crop:
    """Return the crop that an image (see `sft.data.store.image_keys`) gets in an optimizer step: the same on every rank
    and in every pack of the step.

    torchvision's RandomResizedCrop: ten tries to place a box of a random area and aspect, else the largest central box
    of an allowed aspect. An image of 3:2 or wider has no allowed box of 0.9 of its area: it always gets the central
    one, as it did in 2023.
    """
    random = _uniforms(seed, step, int(image_key))
    for _ in range(CROP_TRIES):
        area = width * height * _between(CROP_AREA, next(random))
        aspect = math.exp(_between(_LOG_ASPECT, next(random)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return _box(math.floor(next(random) * (width - w + 1)), math.floor(next(random) * (height - h + 1)), w, h)
    narrowest, widest = CROP_ASPECT
    w = min(width, round(height * widest))
    h = min(height, round(width / narrowest))
    return _box((width - w) // 2, (height - h) // 2, w, h)


def _box(left: int, top: int, width: int, height: int) -> Crop:
    return Crop(left, top, left + width, top + height)


def _between(borders: tuple[float, float], share: float) -> float:
    low, high = borders
    return low + (high - low) * share


def _uniforms(*key: object) -> Iterator[float]:
    """Random numbers in [0, 1) that depend on the key alone: no state, and the same with every version of numpy."""
    for number in count():
        digest = blake2b(repr((*key, number)).encode(), digest_size=8).digest()
        yield (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _decode(content: bytes, decoding: Decoding) -> tuple[Pixels, tuple[int, int]]:
    """Return RGB (H, W, 3), writable, and the image's full width and height, with the limits of `sft.core.images`
    checked before anything is decoded."""
    header = open_checked(content, decoding)
    pixels_HWC = _decode_jpeg(content, header)
    return np.array(decode_rgb(content, decoding)) if pixels_HWC is None else pixels_HWC, header.size


def _decode_jpeg(content: bytes, header: Header) -> Pixels | None:
    """Return the pixels of a sound JPEG that is not CMYK, None of anything else."""
    if header.image.format not in JPEG or header.image.mode not in ("RGB", "L"):  # Pillow knows how Adobe writes CMYK
        return None
    try:
        if simplejpeg.decode_jpeg_header(content)[1::-1] != header.stored_size:
            return None
        width, height = header.least_size
        pixels_HWC: Pixels = simplejpeg.decode_jpeg(content, min_width=width, min_height=height)
        return turned(pixels_HWC, header.orientation)
    except ValueError:
        return None  # damaged a little or a lot: what is readable is for Pillow to say, as when the store was made
