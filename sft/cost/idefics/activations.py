"""What the forward pass keeps for the backward pass, added up by hand: what each operation keeps, layer by layer.

Shape letters: D, F hidden and intermediate size of the language model; E, I of the vision tower; C of the resampler's
attention. All sizes are bytes.
"""

from __future__ import annotations

from dataclasses import replace

from sft.cost.idefics.shapes import LayerGroup
from sft.cost.idefics.trained_model import TrainedModel
from sft.cost.memory import Stage


class Activations:
    """What the layers of each group keep: for each of its rows, or for each image."""

    def __init__(self, model: TrainedModel) -> None:
        self.model, self.shape, self.setting = model, model.shape, model.setting
        self.half = model.setting.compute_bytes
        self.stream = 4 if model.setting.is_autocast else self.half  # the residual stream stays float32 under autocast

    def stages(self) -> list[Stage]:
        """Return the groups of layers that keep something, in the order of the forward pass."""
        shape, tokens, images = self.shape, self.setting.tokens, self.setting.images
        patches, states = images * shape.patches, images * shape.states
        result = []
        if images and self.model.has_backward("vision"):
            block_input = patches * shape.vision_hidden * 4
            result.append(self._stage("vision", patches * self._vision_layer(), block_input, patches))
        elif images and not self.setting.encoded:  # nothing is kept, but a layer works when the text has kept nothing
            widest = max(layer.outputs for layer in shape.linears if layer.rows == "patches")
            working = patches * (12 * shape.vision_hidden + 3 * self.half * widest)
            result.append(Stage(kept=0, working=working, trained=0, copies=0, of_images=True))
        if images and shape.resampler_layers and self.model.has_backward("resampler"):
            block = self._image_block() * images
            result.append(self._stage("resampler", block, block, 0))
        block_input = tokens * shape.hidden * self.stream
        if shape.cross_layers:
            cross = tokens * self._cross_layer() + states * self._cross_states()
            result.append(self._stage("cross_attention", cross, block_input, tokens))
        text = self._stage("language", tokens * self._text_layer(), block_input, tokens)
        last_norm = self._norm(shape.hidden, self.stream) + shape.hidden * self.half  # and the input of the head
        return [*result, replace(text, kept=text.kept + tokens * last_norm)]

    def _stage(self, group: LayerGroup, layer: float, block_input: float, rows: int) -> Stage:
        """Return a stage from what one layer keeps, and from its input: what it keeps where it is recomputed."""
        shape, half, is_frozen = self.shape, self.half, self.model.is_frozen(group)
        layers, recomputed = shape.layers_in(group), self.model.recomputed(group)
        largest = max((linear.weights for linear in shape.of_group(group)), default=0)
        wide = shape.vision_intermediate if group == "vision" else shape.intermediate
        working = 2.0 * rows * wide * half  # gradients on their way through the widest part of the layer
        if not is_frozen:
            working += (half + 4) * largest  # the gradient of a weight, in half and in float32
        if self.model.is_quantised(group):
            working += half * largest  # a weight unpacked
        if recomputed == layers:  # else the last layer is not: what another one needs, that has left by then
            working += layer
        if recomputed:
            working += half * shape.layer_weights(group) * (self.setting.is_autocast and not is_frozen)
        return Stage(
            kept=layer * (layers - recomputed) + block_input * recomputed,
            working=working,
            trained=self.model.trained[group],
            copies=self.model.copies(group) * (1 - recomputed / layers),
            of_images=group in ("vision", "resampler"),
        )

    def _inputs(self, group: LayerGroup, width: int, *names: str, stream: int) -> float:
        """Return what linear layers with the same input keep of it: nothing where the weight is frozen and has no
        adapter.

        Where the input comes in float32 (`stream` is 4), autocast makes a copy for each; so does PEFT's layer, except
        for bitsandbytes.
        """
        is_frozen = self.model.is_frozen(group)
        kept = len({linear.name for linear in self.model.adapted(group)} & {*names}) if is_frozen else len(names)
        dropout = is_frozen and self.setting.lora_dropout > 0  # keeps its result, and a byte for each number's mask
        by_peft = is_frozen and not self.model.is_quantised(group)
        own_copies = (self.half == 2 and (stream == 4 or by_peft)) or dropout
        return width * (self.half * (kept if own_copies else min(kept, 1)) + kept * dropout)

    def _norm(self, width: int, stream: int) -> float:
        """Return what an RMS norm keeps: its input; the root mean square is one number a token."""
        return width * stream

    def _qk_norm(self) -> float:
        return self._norm(self.shape.hidden, self.half) * self.shape.qk_norms

    def _mlp(self, group: LayerGroup) -> float:
        """Return what a gated MLP of the language model keeps for each token."""
        D, F, half = self.shape.hidden, self.shape.intermediate, self.half
        return (
            self._norm(D, self.stream)
            + self._inputs(group, D, "gate_proj", "up_proj", stream=self.half)
            + 2 * F * half  # gate and up
            + self._inputs(group, F, "down_proj", stream=half)
        )

    def _text_layer(self) -> float:
        """Return what a layer of the language model keeps for each token."""
        D, half = self.shape.hidden, self.half
        return (
            self._norm(D, self.stream)
            + self._inputs("language", D, "q_proj", "k_proj", "v_proj", stream=self.half)
            + 4 * D * half  # query, key, value and output of the attention
            + self._inputs("language", D, "o_proj", stream=half)
            + self._mlp("language")
        )

    def _cross_layer(self) -> float:
        """Return what a gated cross-attention layer keeps for each token."""
        D, half = self.shape.hidden, self.half
        return (
            self._norm(D, self.stream)
            + self._inputs("cross_attention", D, "q_proj", stream=half)
            + self._qk_norm()
            + 2 * D * half  # query and output of the attention
            + self._inputs("cross_attention", D, "o_proj", stream=half)
            + D * 2 * half * self.setting.trains("gates")  # what the gates multiply
            + self._mlp("cross_attention")
        )

    def _cross_states(self) -> float:
        """Return what a gated cross-attention layer keeps for each state of an image."""
        D, E = self.shape.hidden, self.shape.vision_hidden
        keys_values = self._inputs("cross_attention", E, "k_proj", "v_proj", stream=4)
        return keys_values + self._qk_norm() + 2 * D * self.half

    def _vision_layer(self) -> float:
        """Return what a layer of the tower keeps for each patch. The input of a layer norm is float32."""
        E, I, half = self.shape.vision_hidden, self.shape.vision_intermediate, self.half  # noqa: E741
        return (
            4 * E
            + self._inputs("vision", E, "q_proj", "k_proj", "v_proj", stream=self.half)
            + 4 * E * half
            + self._inputs("vision", E, "out_proj", stream=half) * self.model.is_frozen("vision")
            + 4 * E
            + self._inputs("vision", E, "fc1", stream=half)
            + I * half
            + self._inputs("vision", I, "fc2", stream=half)
        )

    def _image_block(self) -> float:
        """Return what a block of the resampler, or of what is in its place, keeps for each image."""
        if self.shape.connector_inputs:
            return self.shape.states * self._inputs("resampler", self.shape.connector_inputs, "proj", stream=self.half)
        return self._gated_block() if self.shape.perceiver_key_values else self._resampler_block()

    def _gated_block(self) -> float:
        """Return what a block of Idefics2's perceiver keeps for each image, with its share of the gated MLP before it:
        input and output of each linear layer, and the norms' inputs."""
        shape, latents = self.shape, self.shape.resampler_latents
        rows = {"patches": shape.patches, "latents": latents, "context": shape.patches + latents}
        kept = 0.0
        for layer in shape.of_group("resampler"):
            a_row = self._inputs("resampler", layer.inputs, layer.name, stream=4) + layer.outputs * self.half
            kept += rows[layer.rows] * layer.count * a_row
        norms = (shape.patches + 2 * latents) * self._norm(shape.state_size, 4)
        return kept / shape.resampler_layers + norms

    def _resampler_block(self) -> float:
        """Return what a block of the resampler keeps for each image."""
        shape, half = self.shape, self.half
        E, heads, C = shape.vision_hidden, shape.resampler_heads, shape.resampler_heads * shape.resampler_head
        latents, context = shape.resampler_latents, shape.resampler_latents + shape.patches
        normed = (4 + half) * shape.resampler_qk_norms  # a norm's input in float32, and its output for the product
        attention = (
            latents * (4 * E + self._inputs("resampler", E, "q_proj", stream=half) + C * normed)
            + context * (self._inputs("resampler", E, "k_proj", "v_proj", stream=4) + C * (normed + half))
            + latents * context * heads * (4 + half)
            + latents * self._inputs("resampler", C, "output_proj", stream=half)
        )
        mlp = self._inputs("resampler", E, "fc", stream=half) + self._inputs("resampler", 4 * E, "c_proj", stream=half)
        return attention + latents * (4 * E + mlp + 4 * E * half)
