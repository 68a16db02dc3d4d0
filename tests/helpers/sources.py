"""Prepared sources of a few samples."""

import hashlib
from pathlib import Path

from conftest import IMAGE_SIZE
from helpers.stores import Toys, encoded

from sft.core.sample import Sample
from sft.data.encoded_arrays import encode_samples
from sft.data.prepared_source import PreparedDataset
from sft.data.store import Settings, prepare_store
from sft.data.store.image_keys import image_key
from sft.data.truncate import Limits
from sft.models.chat_template import ChatTemplate

RED, BLUE, GREEN = (encoded(colour, size=(IMAGE_SIZE, IMAGE_SIZE)) for colour in ("red", "blue", "lime"))


def part(path: Path, template: ChatTemplate, *samples: Sample, limits: Limits | None = None) -> PreparedDataset:
    """Prepare and encode samples in the folder `path`."""
    store = prepare_store(Toys(*samples), path, asked={}, settings=Settings(max_skip_share=0))
    return PreparedDataset(store, encode_samples(store, template, path / "encoded" / "toy", limits=limits))


def key_of(content: bytes) -> int:
    """Return the key by which stores know an encoded image."""
    return image_key(hashlib.sha256(content).hexdigest())
