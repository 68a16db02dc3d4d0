"""Keys of images: 63 bits of their hash, so that equal images have equal numbers in every store.

image_keys.bin   the key of each row of images/, int64
image_order.bin  the rows in the order of their keys, int64: from a key to its row
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

KEYS, ORDER = "image_keys.bin", "image_order.bin"
NUM_KEYS = 2**63


def image_key(sha256: str) -> int:
    """Return the key of an image by its sha256, in hexadecimal."""
    return int.from_bytes(bytes.fromhex(sha256[:16]), "little") >> 1


def write_image_keys(folder: Path, keys: NDArray[np.int64]) -> None:
    """Write the keys of the images of a store, in row order."""
    keys.tofile(folder / KEYS)
    np.argsort(keys, kind="stable").astype(np.int64).tofile(folder / ORDER)
