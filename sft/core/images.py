"""Opening images that nobody vouches for, and making pixels of them.

Limits are checked after the header and before decoding: a 76 KiB PNG can decode to 231 MiB without a warning.

Sizes and pixels are of the image as it is seen: turned as its EXIF says, unless `Decoding` says otherwise.
"""

import io
import os
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pybase64
from PIL import Image

from sft.core.image_formats import END, JPEG, can_read_heic, is_heic, lacks_only_its_end, orientation_of, turned
from sft.core.sample import AS_SHOWN, Decoding, ImageRef, SkipSample

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
MAX_BYTES = 32 * 1024 * 1024
MAX_ASPECT_RATIO = 50
MAX_DECODED_PIXELS = 25_000_000
"""A JPEG of more pixels is decoded at a half, a quarter or an eighth of its size: in 75 MB, as large as it may be."""

READ = "JPEG, PNG, WEBP, GIF, BMP, AVIF or HEIC"
MISSING = "image file missing"
DOES_NOT_DECODE = "image does not decode"
TOO_MANY_BYTES = f"image too many bytes (over {MAX_BYTES // 2**20} MiB)"
TOO_MANY_PIXELS = "image too many pixels"
NEEDS_HEIC = "image is HEIC, which needs pillow-heif; pip install 'idefics-sft[heic]'"
TOO_NARROW = f"image too narrow (over {MAX_ASPECT_RATIO} times as long as wide)"
"""Reasons to skip a record."""


def local_image(folder: Path, name: object) -> ImageRef:
    """Return the image file below `folder` that a path or a URL file:// names; it is looked for when it is read. Raise
    SkipSample for what is no path or leads out of the folder: a URL, `..`, an absolute path, a symbolic link."""
    name = name.removeprefix("file://") if isinstance(name, str) else name
    if not isinstance(name, str) or not name.strip() or "://" in name or "\0" in name:
        hint = " is a URL, and none is fetched" if "://" in str(name) else ""
        found = f"{repr(name)[:200]}{hint}; expected a path below the images' folder"
        raise SkipSample("image is not a local path", detail=found)
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
    """Return whether a path stays in a folder when all links are followed. This takes 20 us, so that it is kept."""
    root = os.path.realpath(folder)
    return os.path.join(os.path.realpath(path), "").startswith(os.path.join(root, ""))


def _way_out(folder: Path, name: str) -> str:
    """Return how a path leads out of the folder of the images, and what would be right."""
    parts = Path(name).parts
    how = "is absolute" if os.path.isabs(name) else "has .." if ".." in parts else "follows a symbolic link"
    return f"{how}; the images' folder is {folder.absolute()} (option image_folder names another)"


def base64_image(encoded: object) -> ImageRef:
    """Return the image of base64, plain or URL-safe, padded or not, or of a list of one; else raise SkipSample."""
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
    """Return the encoded bytes of an image; raise SkipSample where its file is not readable, or over MAX_BYTES."""
    source = image.source
    try:
        if isinstance(source, Path) and not source.is_file():
            raise SkipSample(MISSING, detail=str(source))
        if (source.stat().st_size if isinstance(source, Path) else len(source)) > MAX_BYTES:
            raise SkipSample(TOO_MANY_BYTES)
        return source.read_bytes() if isinstance(source, Path) else source
    except OSError as error:  # no permission, a name too long
        raise SkipSample("image file unreadable", detail=str(source)) from error


class Header(NamedTuple):
    """An image whose header was read and is within the limits; nothing is decoded yet."""

    image: Image.Image
    stored_size: tuple[int, int]  # width and height
    exif_orientation: int  # 1 to 8; 1 is as it is stored
    orientation: int  # how it is turned to be seen: the same, or 1 where that is ignored
    lacks_end: bool = False  # whether it was decoded and is a JPEG that lacks its end marker alone

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as it is seen."""
        width, height = self.stored_size
        return (height, width) if self.orientation >= 5 else (width, height)

    @property
    def least_size(self) -> tuple[int, int]:
        """The stored width and height that a JPEG is decoded to at least."""
        width, height = self.stored_size
        part = next((part for part in (1, 2, 4) if width * height <= MAX_DECODED_PIXELS * part**2), 8)
        return -(-width // part), -(-height // part)


def decode_rgb(content: bytes, decoding: Decoding = AS_SHOWN) -> Image.Image:
    """Decode an image to RGB; transparency is laid over white, as IDEFICS was trained (m4, build_image_transform). A
    JPEG of more than MAX_DECODED_PIXELS comes smaller than its size. Raise SkipSample where it is not an image of a
    known format, over the limits, or does not decode."""
    header = open_checked(content, decoding)
    with _as_skips():
        rgb = _rgb(_loaded(header.image, header.least_size, content)[0])
    return rgb if header.orientation == 1 else Image.fromarray(turned(np.asarray(rgb), header.orientation))


def open_checked(content: bytes, decoding: Decoding = AS_SHOWN) -> Header:
    """Read the header of an image of a format that is read, or raise SkipSample for what it says as `decode_rgb`."""
    if content[:4] in (b"II*\0", b"MM\0*"):  # TIFF 6.0
        raise SkipSample(f"image is TIFF, which is not read; expected {READ}")
    if (heic := is_heic(content)) and not can_read_heic():
        raise SkipSample(NEEDS_HEIC)
    with _as_skips():
        image = Image.open(io.BytesIO(content), formats=("HEIF",) if heic else FORMATS)
        _check_size(image.size, decoding.max_pixels)
        exif_orientation = orientation_of(image, content)
        orientation = exif_orientation if decoding.orientation == "apply" else 1
        return Header(image, image.size, exif_orientation, orientation)


def size_of(content: bytes, decoding: Decoding = AS_SHOWN) -> tuple[int, int]:
    """Return width and height as `open_checked` finds them: a body that does not decode is not noticed."""
    return open_checked(content, decoding).size


def verified(content: bytes, decoding: Decoding = AS_SHOWN) -> Header:
    """Return the header of an image that decodes, else raise SkipSample as `decode_rgb` does. A JPEG is decoded at an
    eighth of its size: the whole of its data is read and checked, in a third of the time."""
    header = open_checked(content, decoding)
    with _as_skips():
        return header._replace(lacks_end=_loaded(header.image, (1, 1), content)[1])


def _loaded(image: Image.Image, least: tuple[int, int], content: bytes) -> tuple[Image.Image, bool]:
    """Decode an opened image, a JPEG to a size of `least` or more; return it, and whether it lacks its end marker."""
    if image.format in JPEG:  # Pillow's plugin for HEIC would take a thumbnail
        image.draft(None, least)
    try:
        image.load()
        return image, False
    except OSError:
        if image.format not in JPEG or not lacks_only_its_end(content):
            raise
    return _loaded(Image.open(io.BytesIO(content + END), formats=JPEG[:1]), least, b"")[0], True


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):  # Pillow's own conversion makes everything over 255 white
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba)
    return white


@contextmanager
def _as_skips() -> Iterator[None]:
    """Turn what Pillow finds wrong into a reason to skip, but not what it only warns of, broken EXIF for instance."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Image.DecompressionBombError as error:
        raise SkipSample(TOO_MANY_PIXELS, detail=str(error)) from error
    except (OSError, EOFError, SyntaxError, ValueError, RuntimeError, struct.error) as error:
        raise SkipSample(DOES_NOT_DECODE) from error


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    found = f"{size[0]:,} x {size[1]:,}"
    if size[0] * size[1] > max_pixels:
        raise SkipSample(TOO_MANY_PIXELS, detail=f"{found}, over the {max_pixels:,} of data.images.max_pixels")
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise SkipSample(TOO_NARROW, detail=found)


def thumbnail(image: ImageRef, size: int) -> str:
    """Return an image for a page, at most `size` pixels on each side, as base64 of a JPEG; raise SkipSample as
    `read_bytes` and `decode_rgb` do."""
    file, small = io.BytesIO(), decode_rgb(read_bytes(image), image.decoding)
    small.thumbnail((size, size))
    small.save(file, "JPEG", quality=88)
    return str(pybase64.b64encode(file.getvalue()), "ascii")


def open_image(path: Path) -> Image.Image:
    """Return an image file as RGB, or raise SkipSample as `read_bytes` and `decode_rgb` do."""
    return decode_rgb(read_bytes(ImageRef(source=path)))
