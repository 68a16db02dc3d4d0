"""Opening images that nobody vouches for, and making pixels of them.

Limits are checked after the header and before decoding: a 76 KiB PNG can decode to 231 MiB without a warning.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import pybase64
from PIL import Image

from sft.core.sample import ImageRef, SkipSample

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 25_000_000
MAX_BYTES = 32 * 1024 * 1024
MAX_ASPECT_RATIO = 50

READ = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
MISSING = "image file missing"
DOES_NOT_DECODE = "image does not decode"
TOO_MANY_BYTES = f"image too many bytes (over {MAX_BYTES // 2**20} MiB)"
TOO_MANY_PIXELS = f"image too many pixels (over {MAX_PIXELS:,})"
TOO_NARROW = f"image too narrow (over {MAX_ASPECT_RATIO} times as long as wide)"
"""Reasons to skip a record."""


def local_image(folder: Path, name: object) -> ImageRef:
    """Return the image file that a record names, below `folder`; whether it is there is seen when it is read.

    Raises:
        SkipSample: not a path, or one that leads out of the folder: a URL, `..`, an absolute path, a symbolic link.
    """
    if not isinstance(name, str) or not name.strip() or "://" in name or "\0" in name:
        kind = "a file:// URL" if str(name).startswith("file:") else "a URL, and none is fetched"
        hint = f" is {kind}; expected a path below the images' folder" if "://" in str(name) else ""
        raise SkipSample("image is not a local path", detail=repr(name)[:200] + hint)
    file = os.path.join(folder, name)
    parent, base = os.path.split(file)
    is_link = base in ("", ".", "..")
    try:
        is_link = is_link or stat.S_ISLNK(os.lstat(file).st_mode)
    except FileNotFoundError as error:
        if "\\" in name or name != name.strip():
            found = f"{name[:200]!r} has backslashes, as Windows writes paths, or blanks around it; expected a/b.jpg"
            raise SkipSample(MISSING, detail=found) from error
    except OSError:
        pass  # it is missed when it is read
    except ValueError as error:  # half a letter
        raise SkipSample("image is not a local path", detail=repr(name)[:200]) from error
    if not _is_below(parent, str(folder)) or (is_link and not _is_below.__wrapped__(file, str(folder))):
        raise SkipSample("image path leaves the folder", detail=f"{name[:200]!r} {_way_out(folder, name)}")
    return ImageRef(source=folder / name)


@lru_cache(maxsize=4096)
def _is_below(path: str, folder: str) -> bool:
    """Return whether a path stays in a folder when all links are followed. This takes 20 us, so that the folders of
    images are looked at once."""
    root = os.path.realpath(folder)
    return os.path.join(os.path.realpath(path), "").startswith(os.path.join(root, ""))


def _way_out(folder: Path, name: str) -> str:
    """Return how a path leads out of the folder of the images, and what would be right."""
    parts = Path(name).parts
    how = "is absolute" if os.path.isabs(name) else "has .." if ".." in parts else "follows a symbolic link"
    return f"{how}; the images' folder is {folder.absolute()} (option image_folder names another)"


def base64_image(encoded: object) -> ImageRef:
    """Return the image that a record holds as base64, or as a list of one such string: of the plain or the URL-safe
    alphabet, padded or not.

    Raises:
        SkipSample: not base64.
    """
    if isinstance(encoded, list) and len(encoded) == 1:
        encoded = encoded[0]
    if not isinstance(encoded, str | bytes) or not encoded:
        raise SkipSample("image is not base64")
    if len(encoded) > MAX_BYTES * 4 // 3 + 4:
        raise SkipSample(TOO_MANY_BYTES)
    try:
        content: bytes = pybase64.b64decode(encoded, validate=True)  # 50 times as fast as the standard library
    except ValueError:
        content = _decode_unusual_base64(encoded)
    return ImageRef(source=content)


def _decode_unusual_base64(encoded: str | bytes) -> bytes:
    """Decode base64 that is URL-safe, unpadded or broken into lines."""
    text = encoded.encode("ascii", "replace") if isinstance(encoded, str) else encoded
    text = b"".join(text.split()).rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    try:
        content: bytes = pybase64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
        return content
    except ValueError as error:
        raise SkipSample("image is not base64") from error


def read_bytes(image: ImageRef) -> bytes:
    """Return the encoded bytes of an image.

    Raises:
        SkipSample: the file is missing or cannot be read, or it is larger than MAX_BYTES.
    """
    if isinstance(image.source, bytes):
        content = image.source
    else:
        try:
            if not image.source.is_file():
                raise SkipSample(MISSING, detail=str(image.source))
            if image.source.stat().st_size > MAX_BYTES:
                raise SkipSample(TOO_MANY_BYTES)
            content = image.source.read_bytes()
        except OSError as error:  # no permission, a name too long
            raise SkipSample("image file unreadable", detail=str(image.source)) from error
    if len(content) > MAX_BYTES:
        raise SkipSample(TOO_MANY_BYTES)
    return content


def decode_rgb(content: bytes) -> Image.Image:
    """Decode an image to RGB; transparency is laid over white, as IDEFICS was trained (m4, build_image_transform).

    Raises:
        SkipSample: not an image of a known format, over the limits, or it does not decode.
    """
    with _as_skips():
        image = _open(content)
        image.load()
        if image.mode == "RGB":
            return image
        if image.mode.startswith("I;16"):
            return _eight_bits(image).convert("RGB")
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")


def open_checked(content: bytes) -> Image.Image:
    """Return an image whose header was read and is within the limits; nothing is decoded yet.

    Raises:
        SkipSample: as `decode_rgb`, for what the header says.
    """
    with _as_skips():
        return _open(content)


def size_of(content: bytes) -> tuple[int, int]:
    """Return width and height by the header alone: a body that does not decode is not noticed.

    Raises:
        SkipSample: as `decode_rgb`, for what the header says.
    """
    return open_checked(content).size


def verified_size(content: bytes) -> tuple[int, int]:
    """Return width and height of an image that decodes.

    A JPEG is decoded at an eighth of its size: the whole of its data is read and checked, in a third of the time.

    Raises:
        SkipSample: as `decode_rgb`.
    """
    with _as_skips():
        image = _open(content)
        size = image.size
        image.draft("RGB", (1, 1))
        image.load()
        return size


def _open(content: bytes) -> Image.Image:
    if other := _unread_format(content):
        raise SkipSample(f"image is {other}, which is not read; expected {READ}")
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    _check_size(image.size)
    return image


def _unread_format(content: bytes) -> str | None:
    """Return the name of a format that is not read, by its first bytes: TIFF (TIFF 6.0), and HEIC and AVIF (HEIF,
    ISO/IEC 23008-12), as telephones write. Pillow is not let near them."""
    if content[:4] in (b"II*\0", b"MM\0*"):
        return "TIFF"
    is_heif = content[4:8] == b"ftyp" and content[8:12] in (b"heic", b"heix", b"mif1", b"avif")
    return "HEIC or AVIF" if is_heif else None


@contextmanager
def _as_skips() -> Iterator[None]:
    """Turn whatever Pillow finds wrong into a reason to skip; what it only warns of, broken EXIF for instance, is not
    wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Image.DecompressionBombError as error:
        raise SkipSample(TOO_MANY_PIXELS) from error
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise SkipSample(DOES_NOT_DECODE) from error


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise SkipSample(TOO_MANY_PIXELS)
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise SkipSample(TOO_NARROW)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return grey of 16 bits as 8; Pillow's own conversion makes everything over 255 white."""
    return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))


def open_image(path: Path) -> Image.Image:
    """Return an image file as RGB.

    Raises:
        SkipSample: see `read_bytes` and `decode_rgb`.
    """
    return decode_rgb(read_bytes(ImageRef(source=path)))
