"""A model of IDEFICS-1 that is trained in a Setting: which parameters are trained, in which type each is kept, where
adapters stand and where gradients flow.

Types are those of `sft.models.idefics.load_model`: frozen matrices are half precision or, in QLoRA, those of QUANTISED
4 bits; other frozen parameters are float32 (see `sft.cost.memory`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from sft.cost.family import Setting
from sft.cost.idefics.shapes import LAYER_GROUPS, LayerGroup, Linear, Shape
from sft.models.activation_checkpointing import is_recomputed

QUANTISED: tuple[LayerGroup, ...] = ("language", "cross_attention")
"""Groups whose frozen matrices are stored in 4 bits in QLoRA (`sft.models.idefics.weights.IdeficsFolder.quantised`)."""


@dataclass(frozen=True)
class TrainedModel:
    """The numbers of parameters of a model in a Setting, by what happens to them."""

    shape: Shape
    setting: Setting

    def is_frozen(self, group: LayerGroup) -> bool:
        """Return whether the weights of a group are not trained."""
        return not self.setting.trains(group)

    def is_quantised(self, group: LayerGroup) -> bool:
        """Return whether the matrices of a group are stored in 4 bits."""
        return self.setting.mode == "qlora" and group in QUANTISED and self.is_frozen(group)

    def adapted(self, group: LayerGroup) -> list[Linear]:
        """Return the linear layers of a group that have an adapter."""
        if self.setting.mode == "full":
            return []
        return [linear for linear in self.shape.of_group(group) if linear.layer in self.setting.lora_layers]

    def adapter_parameters(self, group: LayerGroup) -> int:
        """Return the parameters of the adapters of a group."""
        rank = self.setting.lora_rank
        return sum(rank * (linear.inputs + linear.outputs) * linear.count for linear in self.adapted(group))

    @cached_property
    def trained(self) -> dict[str, int]:
        """Trained parameters: of each group of layers, its weights or its adapters; of embedding and head."""
        shape, trains = self.shape, self.setting.trains
        weights = {group: shape.group_parameters(group) for group in LAYER_GROUPS}
        weights["cross_attention"] -= shape.gates
        weights["vision"] -= shape.never_trained
        trained: dict[str, int] = {
            group: weights[group] if trains(group) else self.adapter_parameters(group) for group in LAYER_GROUPS
        }
        trained["cross_attention"] += shape.gates * trains("gates")
        extra = shape.extra_rows * shape.hidden * trains("extra_rows")
        for name, group in (("embedding", "embeddings"), ("head", "head")):
            trained[name] = shape.vocabulary * shape.hidden * trains(group) + extra
        trained["head"] *= not shape.is_tied
        return trained

    @property
    def lines(self) -> int:
        """Rows and columns of all trained matrices, and numbers of all other trained tensors."""
        matrices = sum(count * (rows * columns - rows - columns) for rows, columns, count in self._matrices())
        return sum(self.trained.values()) - matrices

    def _matrices(self) -> Iterator[tuple[int, int, int]]:
        """Yield rows, columns and number of the trained matrices."""
        shape, trains = self.shape, self.setting.trains
        for group in LAYER_GROUPS:
            for linear in shape.of_group(group) if trains(group) else ():
                yield linear.outputs, linear.inputs, linear.count
            for linear in self.adapted(group):
                yield self.setting.lora_rank, linear.inputs, linear.count
                yield linear.outputs, self.setting.lora_rank, linear.count
        if trains("vision"):
            yield shape.positions, shape.vision_hidden, 1
            # The convolution by which the tower begins.
            yield shape.patch_size, shape.patch_size, 3 * shape.vision_hidden
        if trains("resampler") and shape.resampler_layers and shape.resampler_latents:
            yield shape.resampler_latents, shape.state_size, 1
        yield shape.vocabulary, shape.hidden, trains("embeddings") + trains("head")
        yield shape.extra_rows, shape.hidden, 2 * trains("extra_rows")

    @property
    def frozen(self) -> tuple[int, int, int]:
        """Frozen parameters that are kept exactly, in half precision and in 4 bits."""
        adapters = sum(self.adapter_parameters(group) for group in LAYER_GROUPS if self.is_frozen(group))
        frozen = self.shape.parameters - (sum(self.trained.values()) - adapters)
        matrices = sum(self.shape.linear_weights(group) for group in LAYER_GROUPS if self.is_frozen(group))
        four_bit = sum(self.shape.linear_weights(group) for group in LAYER_GROUPS if self.is_quantised(group))
        half = matrices - four_bit + self.shape.pixel_weights * self.is_frozen("vision")
        return frozen - four_bit - half, half, four_bit

    def copies(self, group: LayerGroup) -> float:
        """Return the bytes of the half-precision copies that autocast makes of the float32 weights of a group."""
        float32 = self.adapter_parameters(group) if self.is_frozen(group) else self.shape.linear_weights(group)
        return self.setting.compute_bytes * self.setting.is_autocast * float32

    def has_backward(self, group: LayerGroup) -> bool:
        """Return whether gradients flow through a group, to what is trained in it or before it. Through the text side
        they always do where anything is trained."""
        if self.setting.mode == "full" and self.setting.trainable == ():
            return False
        if group in ("language", "cross_attention") or self.setting.trains(group) or self.adapted(group):
            return True
        return group == "resampler" and self.has_backward("vision")

    def recomputed(self, group: LayerGroup) -> int:
        """Return how many layers of a group recompute their activations in the backward pass."""
        if group == "resampler" or not self.has_backward(group):
            return 0
        return sum(is_recomputed(self.shape.layers_in(group), self.setting.checkpointing))
