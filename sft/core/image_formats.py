"""What Pillow leaves open about encoded images: how they are turned, a JPEG without its end, HEIC."""

import re
import struct
from functools import cache

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

JPEG = ("JPEG", "MPO")
"""Pillow's names of a JPEG, and of one that others follow in the same file, as telephones write it."""
END = b"\xff\xd9"  # the end marker of a JPEG
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
"""The first brand of a file (HEIF, ISO/IEC 23008-12, 10); mif1 and msf1 are AVIF's too."""
_ORIENTATION = [0x0112, 3, 1]  # the tag, its type (16 bits) and how many values it has


def orientation_of(image: Image.Image, content: bytes) -> int:
    """Return the orientation that the EXIF of an opened image gives; 1 where there is none or it is broken."""
    exif: bytes = image.info.get("exif") or b""
    if image.format == "PNG" and not exif:  # it may follow the pixels: ImageMagick writes it there
        exif = content[-128 * 1024 :].rpartition(b"eXIf")[2]
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4) if order else (len(tiff),)
        (number,) = struct.unpack_from(f"{order}H", tiff, start)
        entries = struct.iter_unpack(f"{order}HHIHxx", tiff[start + 2 : start + 2 + 12 * number])
        return next((value for *tag, value in entries if tag == _ORIENTATION and 1 <= value <= 8), 1)
    except struct.error:
        return 1


def turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Return pixels (H, W, 3) turned and mirrored as EXIF 2.3 defines the orientations 1 to 8 (4.6.4)."""
    if orientation == 1:
        return pixels
    whole = pixels.view("V3")[..., 0]  # a pixel is copied at once: half the time of single bytes
    whole = whole.T if orientation >= 5 else whole
    whole = whole[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]
    return np.ascontiguousarray(whole)[..., None].view(np.uint8)


def lacks_only_its_end(content: bytes) -> bool:
    """Return whether the data of a JPEG is complete and only the end marker is not there: all scans are, and libjpeg
    does not warn that a block needs bits which do not come before the marker."""
    if not _has_all_scans(content):
        return False
    try:
        simplejpeg.decode_jpeg(content + END, min_height=1, min_width=1)
    except ValueError:
        return False
    return True


def _has_all_scans(content: bytes) -> bool:
    """Return whether each component of a JPEG has a scan with the last bits of its highest frequency (ITU T.81, B.2.3):
    a progressive JPEG that is cut between two scans is only coarse. No other data has the markers looked for."""
    frame = content[max(content.rfind(marker) for marker in (b"\xff\xc0", b"\xff\xc1", b"\xff\xc2")) :]
    complete: set[int] = set()
    for scan in re.finditer(rb"\xff\xda..(.)", frame, re.DOTALL):
        header = frame[scan.end() : scan.end() + 2 * scan[1][0] + 3]
        if header[-2:-1] == b"\x3f" and not header[-1] & 15:
            complete.update(header[:-3:2])
    return frame[9:10] == bytes([len(complete)])


def is_heic(content: bytes) -> bool:
    """Return whether an encoded image is HEIC rather than AVIF, by its brands."""
    return content[4:8] == b"ftyp" and content[8:12] in _HEIC and b"avif" not in content[16:64]


@cache
def can_read_heic() -> bool:
    """Let Pillow read HEIC, if pillow-heif is installed. It turns images as their containers say."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener(thumbnails=False, decode_threads=1)
    return True
