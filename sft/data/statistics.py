"""What a prepared dataset holds, in numbers."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from sft.data.datasets import read_keys
from sft.data.datasets._meaning import is_image_like
from sft.data.store import Store

_SERIOUS = re.compile(" other than |label|reject|chosen|prefer|negative|weight|loss|score|video|audio|tool|image")
"""Keys that sound as if they changed what a record means; they are named first."""


def store_stats(store: Store) -> dict[str, Any]:
    """Return the samples, images, turns and lengths of a store, and what was left out of it. Lengths are characters of
    text in a sample (`text`) and in an answer (`answer`); a turn is a message of the assistant. Counts of images are of
    images shown; an image that several samples show is one distinct image."""
    parts = list(_batch_stats(store))
    roles: Counter[str] = sum((part["roles"] for part in parts), Counter())
    images_per_sample = _joined(parts, "images")
    sizes = np.array(store.image_sizes, dtype=np.int64).reshape(-1, 2)
    return {
        "path": str(store.path),
        "dataset": store.manifest["adapter"]["name"],
        "licence": store.manifest["licence"],
        "records": store.manifest["records"],
        "samples": len(store),
        "images": int(images_per_sample.sum()),
        "distinct_images": store.num_images,
        "bytes": sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file()),
        "messages": dict(roles),
        "turns": _summary(_joined(parts, "turns")),
        "text": _summary(_joined(parts, "text")),
        "answer": _summary(_joined(parts, "answers")),
        "images_per_sample": {str(n): count for n, count in sorted(Counter(images_per_sample.tolist()).items())},
        "image_width": _summary(sizes[:, 0]),
        "image_height": _summary(sizes[:, 1]),
        "filtered": store.manifest["filtered"],
        "skipped": store.manifest["skipped"],
    }


def not_read(store: Store) -> list[str]:
    """Return in words which keys were not read; first what seems to hold images, and placeholders that are text."""
    counts, records = Counter(store.manifest["not_read"]), f" of {store.manifest['records']:,}"
    texts = [key for key in counts if key.endswith(" as text")]
    lines = [f"warning: {counts.pop(key):,}{records} records have {key}: nothing is shown for it" for key in texts]
    keys = read_keys(store.manifest["adapter"]["name"])
    for key in counts:
        value, name = store.manifest["examples"][f"not read: {key}"], key.rpartition(": ")[2]
        if is_image_like(name, value):
            names = ("images", "image", "image_id") if name.lower().endswith("s") else ("image", "images", "image_id")
            known = next((f"expected {one!r}" for one in names if one in keys and one != name), "none is expected")
            lines.append(f"warning: {key} seems to hold images ({value[:60]}) and is not read; {known}")
    first = sorted(counts, key=lambda key: (not _SERIOUS.search(key), -counts[key]))[:6]
    shown = [f"{key} ({counts[key]:,}{'' if ': ' in key else records})" for key in first]
    more = f", … and {len(counts) - 6} more" if len(counts) > 6 else ""
    return [*lines[:12], f"not read: {', '.join(shown)}{more}"] if counts else lines


def _batch_stats(store: Store) -> Iterator[dict[str, Any]]:
    """Yield, for each batch of samples, numbers for each sample and the characters of every answer."""
    for batch in store.sample_batches():
        messages = batch.column("messages")
        content = messages.values.field("content")
        roles = messages.values.field("role")
        items = content.values
        is_answer = pc.equal(roles, "assistant").to_numpy(zero_copy_only=False)
        is_image = pc.equal(items.field("type"), "image").to_numpy(zero_copy_only=False)
        characters = pc.utf8_length(items.field("text")).fill_null(0).to_numpy()
        message_borders, item_borders = messages.offsets.to_numpy(), content.offsets.to_numpy()
        yield {
            "roles": Counter(roles.to_pylist()),
            "turns": _sums(is_answer, message_borders),
            "text": _sums(characters, item_borders[message_borders]),
            "answers": _sums(characters, item_borders)[is_answer],
            "images": _sums(is_image, item_borders[message_borders]),
        }


def _sums(values: NDArray[Any], borders: NDArray[Any]) -> NDArray[np.int64]:
    """Return the sum of values between each two borders."""
    return np.asarray(np.diff(np.concatenate(([0], np.cumsum(values)))[borders]), dtype=np.int64)


def _joined(parts: list[dict[str, Any]], name: str) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, np.int64), *(part[name] for part in parts)])


def _summary(values: NDArray[np.int64]) -> dict[str, float]:
    """Return total, mean, median, 95th percentile and largest; zeros for none."""
    values = values if len(values) else np.zeros(1, np.int64)
    median, p95 = np.percentile(values, (50, 95)).tolist()
    return {
        "total": int(values.sum()),
        "mean": float(values.mean()),
        "median": median,
        "p95": p95,
        "max": int(values.max()),
    }
