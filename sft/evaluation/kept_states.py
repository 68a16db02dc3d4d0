"""The states of images that several forwards show, as those of shots: each is encoded once, while there is room for it.

Such an image is encoded by itself, so that its states do not depend on what else a process evaluates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sft.batches.collate import Shown
from sft.core.sample import Batch
from sft.models.packed_model import PackedModel

ROOM = 1 << 30
"""Bytes of states that are kept at most: the 2,048 images of a support set of idefics-9b take 0.7 GB in float32."""


class KeptStates:
    """The states of images by their numbers."""

    def __init__(self, images_of_forwards: Iterable[Sequence[int]], room: int = ROOM) -> None:
        self._uses = Counter(image for images in images_of_forwards for image in images)
        self._room = room
        self._is_kept: set[int] = set()
        self._states: dict[int, Tensor] = {}

    def to_open(self, shown: Shown, state_size: int) -> list[int]:
        """Return which images of the next forward have to be opened. Called once for each, in order; may run ahead of
        `complete`."""
        new = [image for image in shown.numbers if image not in self._is_kept]
        for image in new:
            size = 4 * shown.num_states[image] * state_size
            if self._uses[image] > 1 and size <= self._room:
                self._is_kept.add(image)
                self._room -= size
        return new

    def complete(
        self, model: PackedModel, batch: Batch, shown: Shown, tiles: Mapping[int, tuple[Tensor, ...]]
    ) -> Batch:
        """Return a batch with the states of its images, where some of them are shown by other forwards too. `tiles` are
        those of the images that were opened; `batch.tiles` those of all images otherwise."""
        if not any(self._uses[image] > 1 for image in shown.numbers):
            return batch
        device = batch.input_ids_T.device
        new = {
            image: model.encode_images([part.to(device) for part in own], [shown.tilings[image]])
            for image, own in tiles.items()
        }
        features_RE = torch.cat([new[image] if image in new else self._states[image] for image in shown.numbers])
        self._states |= {image: states for image, states in new.items() if image in self._is_kept}
        return replace(batch, features_RE=features_RE, tiles=())
