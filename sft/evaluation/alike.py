"""Shots whose images are most alike to the item's, as Flamingo and the model card chose them (RICES).

Images are compared by the mean of the states that a model's own tower gives them, or by CLIP. The lists are made once
and kept in a file, so that all checkpoints of a run and all processes have the same.

Shape letters: P sets of images that items show, E size of a vector, Q items, S support items, K nearest.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sft.batches.collate import Shown
from sft.batches.image_source import OpenedImages
from sft.core.distributed import all_gather_dict, all_or_none, assign, from_main, is_main_process
from sft.core.errors import UserError
from sft.core.files import whole_file
from sft.core.images import decode_rgb, read_bytes
from sft.core.precision import device
from sft.core.sample import ImageRef, SkipSample
from sft.core.shipped import is_local, resolve, user_cache
from sft.evaluation.prompts import TaskItem
from sft.evaluation.questions import Questions
from sft.models import read_config
from sft.models.base_model import find_prepared_base
from sft.models.loaded_model import Load, Loaded, find_family, load_for_inference, load_template
from sft.runs.checkpoint import weights_hash
from sft.runs.names import recipe_of_model

NEAREST, BATCH, ROWS = 32, 32, 64
"""Support items that are kept for each item, the most shots of the model card; images that are encoded at once; items
that are compared at once."""

Vectors = dict[ImageRef, NDArray[np.float32]]
Encode = Callable[[Sequence[ImageRef]], Tensor]
"""Returns a vector for each image, (N, E). Raises SkipSample where one does not decode."""


def find_alike(
    task: Questions, path: str | Path, run_dir: Path | None, load: Load, on_progress: Callable[[int, int], None]
) -> None:
    """Give the shots of a task the lists of its items: those of the run or of the user's cache, if they were made
    before. The tower is that of the run's prepared base, without a run that of the model at `path`, which is loaded by
    `load`. All processes share in it.

    Raises:
        UserError: there is no such model, or it takes no conversation.
    """

    def what() -> tuple[str, str]:
        load_template(find_family(path), path)  # what is wrong with it shows before the work
        recipe = recipe_of_model(str(run_dir)) if run_dir and not shots.features else None
        by = shots.features or str(find_prepared_base(recipe) if recipe else path)
        return by, _name_of(task.items, shots.support, f"{weights_hash(resolve(by)) or by} {num_nearest}")

    assert task.shots_drawn
    shots, num_nearest = task.shots_drawn, max(NEAREST, task.shots_drawn.number)
    by, name = from_main(what)
    file = (run_dir / "evaluations" if run_dir else user_cache()) / "rices" / f"{name}.npy"
    nearest_QK = from_main(lambda: np.load(file) if file.is_file() else None)
    if nearest_QK is None:
        with all_or_none():
            encode = clip(by) if shots.features else tower((load if by == str(path) else load_for_inference)(by))
        images = list(dict.fromkeys(image for item in (*task.items, *shots.support) for image in item.images))
        vectors = vectors_of(images, encode, on_progress)
        nearest_QK = from_main(lambda: nearest(task.items, shots.support, vectors, num_nearest))
        if is_main_process():
            with whole_file(file) as staging:
                np.save(staging, nearest_QK)
    lists = {item.id: row[row >= 0].tolist() for item, row in zip(task.items, nearest_QK, strict=True)}
    shots.prefer(lists, f"{Path(by).name} ({name[:8]})")


def tower(loaded: Loaded) -> Encode:
    """Return what encodes images by the mean of the states that the tower of a model gives them."""

    def encode(images: Sequence[ImageRef]) -> Tensor:
        source = OpenedImages(images, loaded.images)
        shown = Shown.of(range(len(images)), source)
        tiles = shown.lay_tiles({number: source.tiles(number) for number in shown.numbers}, shown.numbers)
        with torch.autocast(device().type, torch.bfloat16, enabled=loaded.autocast):
            states_RE = loaded.model.encode_images([part.to(device()) for part in tiles], [*shown.tilings.values()])
        parts = torch.split(states_RE.float(), [*shown.num_states.values()])
        return torch.stack([parts[shown.numbers[number]].mean(0) for number in range(len(images))])

    return encode


def clip(name: str) -> Encode:
    """Return what encodes images by the embeddings of a CLIP, opened by Pillow and its own processor.

    Raises:
        UserError: there is none at this folder or hub id.
    """
    from transformers import CLIPModel, CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    path = resolve(name) if is_local(name) else name
    kinds = {"clip": CLIPModel, "clip_vision_model": CLIPVisionModelWithProjection}
    if (kind := str(read_config(path).get("model_type"))) not in kinds:
        raise UserError(f"shots.features: {name}: model_type is {kind!r}; expected {' or '.join(kinds)}")
    try:
        model, processor = kinds[kind].from_pretrained(path), CLIPImageProcessorPil.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"shots.features: {name}: {str(error).splitlines()[0]}") from error
    model.to(device()).eval()

    def encode(images: Sequence[ImageRef]) -> Tensor:
        opened = [decode_rgb(read_bytes(image), image.decoding) for image in images]
        pixels = processor(opened, return_tensors="pt")["pixel_values"].to(device())
        found: Tensor = model.get_image_features(pixels).pooler_output if kind == "clip" else model(pixels).image_embeds
        return found

    return encode


def _name_of(items: Sequence[TaskItem], support: Sequence[TaskItem], by: str) -> str:
    """Return a name that changes with the images, whose they are, and how they are compared."""
    digest = hashlib.sha256(f"{by} {len(items)}".encode())
    for item in (*items, *support):
        digest.update(f"{item.cluster} {[_stamp(image.source) for image in item.images]}\n".encode())
    return digest.hexdigest()[:32]


def _stamp(source: Path | bytes) -> str:
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    return f"{source.name} {source.stat().st_size} {source.stat().st_mtime_ns}"


def vectors_of(images: Sequence[ImageRef], encode: Encode, on_progress: Callable[[int, int], None]) -> Vectors:
    """Return the unit vector of each image that decodes."""
    found: Vectors = {}
    done = 0
    with all_or_none(), torch.inference_mode():
        for own, turn in assign([images[first : first + BATCH] for first in range(0, len(images), BATCH)]):
            found |= _encoded(own, encode)
            done += sum(map(len, turn))
            on_progress(done, len(images))
    return all_gather_dict(found)


def _encoded(images: Sequence[ImageRef], encode: Encode) -> Vectors:
    try:
        vectors = torch.nn.functional.normalize(encode(images).float(), dim=-1).cpu().numpy()
        return dict(zip(images, vectors, strict=True))
    except SkipSample:
        alone = [[image] for image in images] if len(images) > 1 else []
        return {image: vector for own in alone for image, vector in _encoded(own, encode).items()}


def nearest(items: Sequence[TaskItem], support: Sequence[TaskItem], vectors: Vectors, number: int) -> NDArray[np.int32]:
    """Return for each item the numbers (Q, K) of the support items that are most alike by the dot product of unit
    vectors, the most alike first and of equals the first; -1 where there are no more. None is of the item's own
    cluster. Items of several images have the direction of the sum of their vectors."""
    places = {images: place for place, images in enumerate(dict.fromkeys(one.images for one in (*items, *support)))}
    nothing = np.zeros_like(next(iter(vectors.values()), np.zeros(1, np.float32)))
    vectors_PE = np.stack([sum((vectors.get(image, nothing) for image in images), nothing) for images in places])
    vectors_PE /= np.maximum(np.linalg.norm(vectors_PE, axis=1, keepdims=True), 1e-12)
    is_known_P = np.any(vectors_PE != 0, axis=1)
    places_S = np.array([places[one.images] for one in support])
    own_cluster = defaultdict(list)
    for place, one in enumerate(support):
        own_cluster[one.cluster].append(place)
    found_QK = np.full((len(items), number), -1, np.int32)
    for row, item in enumerate(items):
        if row % ROWS == 0:
            some = [places[one.images] for one in items[row : row + ROWS]]
            alike_RS = (vectors_PE[some] @ vectors_PE.T)[:, places_S]
            alike_RS[:, ~is_known_P[places_S]] = -np.inf
        alike_S = alike_RS[row % ROWS]
        alike_S[own_cluster[item.cluster]] = -np.inf
        if is_known_P[places[item.images]]:
            least = np.partition(alike_S, -number)[-number] if number < len(alike_S) else -np.inf
            best = np.flatnonzero((alike_S >= least) & np.isfinite(alike_S))
            best = best[np.argsort(-alike_S[best], kind="stable")][:number]
            found_QK[row, : len(best)] = best
    return found_QK
