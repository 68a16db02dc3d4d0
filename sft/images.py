"""Opening images that nobody vouches for, and making pixels of them.

Limits are checked after the header and before decoding: a 76 KiB PNG can decode to 231 MiB without a warning.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sft.sample import ImageRef, SkipSample

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 25_000_000
MAX_BYTES = 32 * 1024 * 1024
MAX_ASPECT_RATIO = 50


def read_bytes(image: ImageRef) -> bytes:
    """The encoded bytes of an image.

    Raises:
        SkipSample: the file is missing or cannot be read, or it is larger than MAX_BYTES.
    """
    if isinstance(image.source, bytes):
        content = image.source
    else:
        try:
            if not image.source.is_file():
                raise SkipSample("image file missing")
            if image.source.stat().st_size > MAX_BYTES:
                raise SkipSample("image too many bytes")
            content = image.source.read_bytes()
        except OSError as error:  # no permission, a name too long
            raise SkipSample("image file unreadable") from error
    if len(content) > MAX_BYTES:
        raise SkipSample("image too many bytes")
    return content


def decode_rgb(content: bytes) -> Image.Image:
    """Decode to RGB; transparency is laid over white, as IDEFICS was trained (m4, build_image_transform).

    Raises:
        SkipSample: not an image of a known format, over the limits, or it does not decode.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        _check_size(image.size)
        image.load()
        if image.mode == "RGB":
            return image
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    except Image.DecompressionBombError as error:
        raise SkipSample("image too many pixels") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise SkipSample("image does not decode") from error


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise SkipSample("image too many pixels")
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise SkipSample("image too narrow")


def to_pixels(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Squash to size x size with bicubic interpolation, as IDEFICS evaluates; uint8 (C, H, W)."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)


def open_image(path: Path) -> Image.Image:
    """An image file as RGB.

    Raises:
        SkipSample: see `read_bytes` and `decode_rgb`.
    """
    return decode_rgb(read_bytes(ImageRef(source=path)))
