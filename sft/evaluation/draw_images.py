"""Draws that depend on the content of images and a seed alone, so that they are the same on any machine and order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from sft.evaluation.task import Item

ItemT = TypeVar("ItemT", bound="Item")


def in_random_order(images: Sequence[str], seed: int) -> list[str]:
    """Return the distinct images in a seeded order."""
    return sorted(set(images), key=lambda image: (_draw(image, seed), image))


def choose_part(items: Sequence[ItemT], max_items: int | None, seed: int) -> list[ItemT]:
    """Return at most `max_items`: all items of images taken in random order, and at least those of one image.

    The order of the items is kept. The draw depends on image content and seed, so a longer part begins with a shorter.
    """
    if max_items is None:
        return list(items)
    by_image: dict[str, list[ItemT]] = {}
    for item in items:
        by_image.setdefault(item.cluster, []).append(item)
    chosen: set[str] = set()
    num_items = 0
    for image in in_random_order(list(by_image), seed):
        num_items += len(by_image[image])
        if chosen and num_items > max_items:
            break
        chosen.add(image)
    return [item for item in items if item.cluster in chosen]


def _draw(image: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"order {seed} {image}".encode()).digest()[:8], "big")
