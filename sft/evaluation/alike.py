"""Shots whose images are most alike to the item's, as Flamingo and the model card chose them (RICES).

    images of items and of support ─features─> a unit vector each ─nearest─> for each item its support items, most alike

Images are compared by the mean of the states that a model's own tower gives them, or by CLIP. The lists are made once
and kept in a file, so that all checkpoints of a run and all processes have the same.

Shape letters: N images, E size of a vector, Q items, S support items, K nearest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sft.batches.collate import Shown
from sft.batches.image_source import OpenedImages
from sft.core.distributed import all_gather_dict, all_or_none, assign, from_main
from sft.core.errors import UserError
from sft.core.files import whole_file
from sft.core.images import decode_rgb, read_bytes
from sft.core.parallel import prefetch
from sft.core.precision import device
from sft.core.sample import ImageRef, SkipSample
from sft.core.shipped import is_local, resolve, user_cache
from sft.evaluation.prompts import TaskItem
from sft.evaluation.shots import AlikeShots
from sft.models import read_config
from sft.models.base_model import find_prepared_base
from sft.models.loaded_model import Load, Loaded, load_for_inference
from sft.runs.checkpoint import weights_hash
from sft.runs.names import recipe_of_model

NEAREST = 32
"""Support items that are kept for each item: the most shots of the model card. Fewer are the first of them."""

BATCH = 32
_ROWS = 64
"""Items that are compared with all support items at once."""

Floats = NDArray[np.float32]


class Features(Protocol):
    """Turns images into vectors, in two steps that may run side by side."""

    def open(self, images: Sequence[ImageRef]) -> Any:
        """Decode images.

        Raises:
            SkipSample: one does not decode.
        """

    def encode(self, opened: Any) -> Tensor:
        """Return a vector (N, E) of each."""


class Tower:
    """The mean of the states that the tower of a model gives an image."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded

    def open(self, images: Sequence[ImageRef]) -> tuple[Shown, tuple[Tensor, ...]]:
        """Return the images, numbered, and their tiles."""
        source = OpenedImages(images, self._loaded.images)
        shown = Shown.of(range(len(images)), source)
        return shown, shown.lay_tiles({number: source.tiles(number) for number in shown.numbers}, shown.numbers)

    def encode(self, opened: tuple[Shown, tuple[Tensor, ...]]) -> Tensor:
        """Return the mean state of each image."""
        (shown, tiles), model = opened, self._loaded.model
        with torch.autocast(device().type, torch.bfloat16, enabled=self._loaded.autocast):
            states_RE = model.encode_images([tile.to(device()) for tile in tiles], [*shown.tilings.values()])
        parts = states_RE.float().split([*shown.num_states.values()])
        return torch.stack([parts[shown.numbers[number]].mean(0) for number in range(len(parts))])


class Clip:
    """The image embeddings of CLIP, by its own processor."""

    def __init__(self, name: str) -> None:
        """
        Raises:
            UserError: there is no model of CLIP.
        """
        from transformers import CLIPModel, CLIPVisionModelWithProjection
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        path = resolve(name) if is_local(name) else name
        kinds = {"clip": CLIPModel, "clip_vision_model": CLIPVisionModelWithProjection}
        if (kind := str(read_config(path).get("model_type"))) not in kinds:
            raise UserError(f"shots.features: {name}: model_type is {kind!r}; expected {' or '.join(kinds)}")
        try:
            self._model = kinds[kind].from_pretrained(path).to(device()).eval()
            self._processor = CLIPImageProcessorPil.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise UserError(f"shots.features: {name}: {str(error).splitlines()[0]}") from error

    def open(self, images: Sequence[ImageRef]) -> Tensor:
        """Return the pixels (N, C, H, W)."""
        decoded = [decode_rgb(read_bytes(image), image.decoding) for image in images]
        return torch.as_tensor(self._processor(decoded, return_tensors="pt")["pixel_values"])

    def encode(self, opened: Tensor) -> Tensor:
        """Return the embeddings."""
        if hasattr(self._model, "get_image_features"):
            return torch.as_tensor(self._model.get_image_features(opened.to(device())).pooler_output)
        return torch.as_tensor(self._model(opened.to(device())).image_embeds)


def find_alike(
    shots: AlikeShots,
    items: Sequence[TaskItem],
    path: str | Path,
    run_dir: Path | None,
    load: Load,
    on_progress: Callable[[int, int], None],
) -> None:
    """Give shots the lists of the items of a task. They are read back where they were made before: from the run, or
    from the user's cache. The tower is that of the run's prepared base, so that its checkpoints have the same shots;
    without a run that of the model at `path`. All processes share in it.

    Raises:
        UserError: there is no such model.
    """
    by = from_main(lambda: shots.features or str(_base_of(run_dir) or path))
    num_nearest = max(NEAREST, shots.number)
    name = from_main(lambda: _name_of(items, shots.support, weights_hash(resolve(by)) or by, num_nearest))
    file = (run_dir / "evaluations" if run_dir else user_cache()) / "rices" / f"{name}.npy"
    nearest_QK = from_main(lambda: np.load(file) if file.is_file() else None)
    if nearest_QK is None:
        with all_or_none():
            features: Features
            features = Clip(by) if shots.features else Tower((load if by == str(path) else load_for_inference)(by))
        images = list(dict.fromkeys(image for item in (*items, *shots.support) for image in item.images))
        vectors = vectors_of(images, features, on_progress)
        nearest_QK = from_main(lambda: _write(file, nearest(items, shots.support, vectors, num_nearest)))
    shots.set_nearest(items, nearest_QK, f"{Path(by).name} ({name[:8]})")


def _base_of(run_dir: Path | None) -> Path | None:
    recipe = recipe_of_model(str(run_dir)) if run_dir else None
    return find_prepared_base(recipe) if recipe else None


def _name_of(items: Sequence[TaskItem], support: Sequence[TaskItem], weights: str, num_nearest: int) -> str:
    """Return a name that changes with the images, their clusters, the weights that compare them, and the number."""
    digest = hashlib.sha256(f"{weights} {num_nearest} {len(items)}".encode())
    for item in (*items, *support):
        digest.update(f"{item.cluster} {[_stamp(image) for image in item.images]}\n".encode())
    return digest.hexdigest()[:32]


def _stamp(image: ImageRef) -> tuple[str, int, int]:
    if isinstance(image.source, bytes):
        return hashlib.sha256(image.source).hexdigest(), len(image.source), 0
    found = image.source.stat()
    return image.source.name, found.st_size, found.st_mtime_ns


def _write(file: Path, nearest_QK: NDArray[np.int32]) -> NDArray[np.int32]:
    with whole_file(file) as staging:
        np.save(staging, nearest_QK)
    return nearest_QK


def vectors_of(
    images: Sequence[ImageRef], features: Features, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[ImageRef, Floats]:
    """Return the unit vector of each image, without those that do not decode."""
    rounds = assign([images[first : first + BATCH] for first in range(0, len(images), BATCH)])
    found: dict[ImageRef, Floats] = {}
    done = 0
    with all_or_none(), torch.inference_mode():
        opened = prefetch(_opened(own, features) for own, _ in rounds)
        for (_, turn), parts in zip(rounds, opened, strict=True):
            for own, content in parts:
                vectors_NE = torch.nn.functional.normalize(features.encode(content).float(), dim=-1)
                found |= zip(own, vectors_NE.cpu().numpy(), strict=True)
            done += sum(map(len, turn))
            on_progress(done, len(images))
    return all_gather_dict(found)


def _opened(images: Sequence[ImageRef], features: Features) -> list[tuple[Sequence[ImageRef], Any]]:
    """Return a batch with what was decoded of it; where an image does not decode, each one by itself."""
    with suppress(SkipSample):
        return [(images, features.open(images))]
    parts: list[tuple[Sequence[ImageRef], Any]] = []
    for image in images:
        with suppress(SkipSample):
            parts.append(([image], features.open([image])))
    return parts


def nearest(
    items: Sequence[TaskItem], support: Sequence[TaskItem], vectors: dict[ImageRef, Floats], number: int
) -> NDArray[np.int32]:
    """Return for each item the numbers (Q, K) of the support items that are most alike by the dot product of unit
    vectors, the most alike first and of equals the first; -1 where there are no more. None is of the item's own
    cluster. Items of several images have the mean of their vectors."""
    found_QK = np.full((len(items), number), -1, np.int32)
    places = {images: place for place, images in enumerate({one.images: 0 for one in (*items, *support)})}
    nothing = np.zeros_like(next(iter(vectors.values()), np.zeros(1, np.float32)))
    vectors_PE = np.stack([_mean([vectors.get(image, nothing) for image in images] or [nothing]) for images in places])
    is_known_P = vectors_PE.any(1)
    clusters = {cluster: number for number, cluster in enumerate({one.cluster: 0 for one in (*items, *support)})}
    places_S, clusters_S = np.array([(places[one.images], clusters[one.cluster]) for one in support]).T
    asked: dict[tuple[int, int], list[int]] = {}
    for row, one in enumerate(items):
        if is_known_P[places[one.images]]:
            asked.setdefault((places[one.images], clusters[one.cluster]), []).append(row)
    keys = list(asked)
    for some in (keys[first : first + _ROWS] for first in range(0, len(keys), _ROWS)):
        alike_RS = (vectors_PE[[place for place, _ in some]] @ vectors_PE.T)[:, places_S]
        own_R1 = np.array([[cluster] for _, cluster in some])
        alike_RS[(clusters_S == own_R1) | ~is_known_P[places_S]] = -np.inf
        for key, alike_S in zip(some, alike_RS, strict=True):
            best = _best(alike_S, number)
            found_QK[asked[key], : len(best)] = best
    return found_QK


def _mean(vectors: Sequence[Floats]) -> Floats:
    """Return the direction of the mean of unit vectors."""
    total: Floats = np.sum(vectors, axis=0)
    return total / max(float(np.linalg.norm(total)), 1e-12)


def _best(alike_S: Floats, number: int) -> NDArray[np.int64]:
    """Return the places of the largest values that are finite, the largest first and of equals the first."""
    least = np.partition(alike_S, -number)[-number] if number < len(alike_S) else -np.inf
    found = np.flatnonzero((alike_S >= least) & np.isfinite(alike_S))
    return found[np.argsort(-alike_S[found], kind="stable")][:number]
