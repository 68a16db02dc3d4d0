"""Memory of a GPU in a training step, at every moment at which it can be largest: when the loss is computed, when the
backward pass enters each part of the model, and when the optimizer updates.

Types of numbers. On one GPU, or several with a copy each (`ddp`), trained parameters are float32 and autocast computes
in half precision: the residual stream stays float32, the result of a norm is half precision, and each linear layer
keeps a half-precision copy of its weight. Frozen matrices are half precision or, in QLoRA, 4 bits where the family says
so; other frozen parameters are float32. ZeRO-3 and FSDP2 compute in half precision throughout, without autocast.

All sizes are bytes, unless they are said to be numbers of parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sft.cost.family import Setting
from sft.recipe import ENGINES, OPTIMIZERS

FOUR_BIT_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in nf4 with double quantisation: an 8-bit scale for 64 weights, a float32 one for 256 of those:
4.127 bits (QLoRA, Dettmers and others, 2023, section 3)."""

CHUNK_LOGITS = 2**22
"""`sft.models.loss.CHUNK_LOGITS`; not imported, so that planning starts without torch."""


@dataclass(frozen=True)
class Stage:
    """A part of the model, as the backward pass goes through it."""

    kept: float
    """What the forward pass keeps until the backward pass is through."""
    working: float
    """What one layer needs on top while the backward pass is in it."""
    trained: int
    """Trained parameters, which have gradients when the backward pass is through."""
    copies: float
    """Half-precision copies of weights that autocast made and the backward pass needs."""
    of_images: bool


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """What a family counts of a model that is trained in a Setting."""

    parameters: int
    """Parameters of the model, without adapters."""
    trained: int
    """Trained parameters, those of adapters included."""
    trained_embedding: int
    trained_head: int
    trained_lines: int
    """Rows and columns of all trained matrices and numbers of all other trained tensors: what a factored second moment
    has a number for."""
    frozen_exact: int
    """Frozen parameters that stay float32 where autocast computes."""
    frozen_half: int
    frozen_four_bit: int
    vocabulary: int
    """Rows of the head."""
    head: int
    """Parameters of the head's weight."""
    largest_layer: int
    """Parameters of the largest layer that a sharded engine gathers."""
    copies: float
    """Half-precision copies that autocast makes of float32 weights of linear layers, the head's excepted."""
    inputs: float
    """Pixels, or features of images, of a micro-batch."""
    stages: Sequence[Stage]
    """Parts in the order of the forward pass that keep something for the backward pass."""


def peak_memory(inventory: Inventory, setting: Setting) -> dict[str, int]:
    """Return the bytes by kind at the moment when their sum is largest."""
    return max(_Memory(inventory, setting).moments(), key=lambda kinds: sum(kinds.values()))


class _Memory:
    """The memory of one GPU."""

    def __init__(self, inventory: Inventory, setting: Setting) -> None:
        self.inventory, self.setting, self.half = inventory, setting, setting.compute_bytes
        self.engine = ENGINES[setting.engine]
        self.shards = setting.gpus if self.engine.shards else 1
        self.has_masters = self.engine.is_half and self.half == 2

    def moments(self) -> Iterator[dict[str, int]]:
        """Yield the bytes by kind at each moment that can be the largest."""
        inventory, half, stages = self.inventory, self.half, list(self.inventory.stages)
        logits = self.setting.trained_tokens * inventory.vocabulary
        head_copy = half * inventory.head * self.setting.is_autocast
        all_copies = inventory.copies + head_copy
        copies = sum(stage.copies for stage in stages)
        done = 0
        # Logits of base and extra rows, and both of them joined; autocast still holds a copy of every weight.
        yield self._at(done, stages, 2 * logits * half, all_copies)
        # A chunk of them as float32 logarithms and their gradient; the rest is half (`sft.models.loss.summed_loss`).
        yield self._at(done, stages, logits * half + 8 * min(CHUNK_LOGITS, logits), all_copies)
        done += inventory.trained_head
        # The gradient of the head's weight, in half and in float32.
        yield self._at(done, stages, (half + 4) * inventory.trained_head + half * logits, copies + head_copy)
        while stages:
            yield self._at(done, stages, 0, copies, working=stages[-1].working)
            done += stages[-1].trained
            copies -= stages[-1].copies
            stages.pop()
        yield self._at(inventory.trained, [], 0, 0, working=self._update())

    def _at(
        self, done: int, stages: Sequence[Stage], logits: float, copies: float, working: float = 0
    ) -> dict[str, int]:
        """Return the bytes by kind when `done` parameters have gradients and the activations of `stages` are kept."""
        gradients = self.inventory.trained if self.setting.accumulates else done
        image_working = working if stages and stages[-1].of_images else 0
        kinds = {
            "weights": self._weights(),
            "gradients": gradients * (self.half if self.engine.is_half else 4) / self.shards + self._buckets(),
            "optimizer": self._optimizer(),
            "activations": sum(stage.kept for stage in stages if not stage.of_images) + working - image_working,
            "images": sum(stage.kept for stage in stages if stage.of_images) + image_working + self.inventory.inputs,
            "logits": logits,
            "copies": copies + self._gathered(),
        }
        return {name: round(size) for name, size in kinds.items()}

    def _weights(self) -> float:
        """Weights, and float32 masters where the trained weights themselves are half precision."""
        inventory, exact = self.inventory, 4 if self.setting.is_autocast else self.half
        frozen = self.half * inventory.frozen_half + FOUR_BIT_BYTES * inventory.frozen_four_bit
        trained = (6 if self.has_masters else 4) * inventory.trained
        return (trained + frozen + exact * inventory.frozen_exact) / self.shards

    def _buckets(self) -> float:
        """Return the bytes of the buckets in which DDP sums gradients, as large as these."""
        return 4 * self.inventory.trained * (not self.engine.shards and self.setting.gpus > 1)

    def _optimizer(self) -> float:
        """Return the bytes of the optimizer's states. Paged ones are in main memory when the GPU's is short: they count
        nothing."""
        kind, embedding = OPTIMIZERS[self.setting.optimizer], self.inventory.trained_embedding
        if kind.is_paged:
            return 0
        a_number = kind.bytes_per_parameter
        of_embedding = a_number if kind.bytes_per_embedding_parameter is None else kind.bytes_per_embedding_parameter
        others = self.inventory.trained - embedding
        lines = kind.bytes_per_line * self.inventory.trained_lines
        return (a_number * others + of_embedding * embedding + lines) / self.shards

    def _gathered(self) -> float:
        """Weights that a sharded engine has gathered, and their gradients until they are reduced."""
        largest = self.half * self.inventory.largest_layer
        if self.shards == 1:
            return 0
        if self.engine.live_parameters is None:  # a layer, the next one, a layer's gradient
            return 3 * largest
        return self.half * min(self.engine.live_parameters, self.inventory.parameters) + largest

    def _update(self) -> float:
        """Return the bytes of the float32 gradients that an engine with masters updates at a time."""
        group = min(self.engine.live_parameters or 0, self.inventory.trained / self.shards)
        return 4 * group * self.has_masters
