"""Memory and floating-point operations of a training step, added up by hand from the shape of the model.

Memory is taken at every moment at which it can be largest: when the loss is computed, when the backward pass enters
each part of the model, and when the optimizer updates. What each operation keeps for its backward pass is listed layer
by layer below. scripts/check_cost.py holds the result against the real model under fake tensors.

Types of numbers. On one GPU, or several with a copy each (`ddp`), what is trained is float32 and autocast computes in
half precision: the residual stream stays float32, a norm's result is half, and each linear layer keeps a half copy of
its weight. Frozen matrices are half precision or, in QLoRA, those of QUANTISED 4 bits; all else that is frozen
is float32 (`sft.models.idefics.load_model`). ZeRO-3 and FSDP2 are half precision throughout ("native").

Shape letters: D, F hidden and intermediate size of the language model; E, I of the vision tower. All sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from sft.cost.idefics.setting import PARTS, Setting
from sft.cost.idefics.shapes import Linear, Part, Shape
from sft.models.activation_checkpointing import is_recomputed
from sft.recipe import ENGINES, OPTIMIZERS

FOUR_BIT_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Of a weight in nf4 with double quantisation: an 8-bit scale for 64 weights, a float32 one for 256 of those:
4.127 bits (QLoRA, Dettmers and others, 2023, section 3)."""

QUANTISED: tuple[Part, ...] = ("language", "cross_attention")
"""Parts whose frozen matrices are stored in 4 bits in QLoRA (`sft.models.idefics.QUANTISED`)."""

CHUNK_LOGITS = 2**22
"""`sft.models.loss.CHUNK_LOGITS`; not imported, so that planning starts without torch."""


class Cost(NamedTuple):
    """What a training step takes of each GPU."""

    bytes: dict[str, int]
    """By part, at the moment when their sum is largest."""
    flop: int
    """Of a micro-batch, forward and backward, what checkpointing computes again included."""

    @property
    def peak_bytes(self) -> int:
        """The most that is there at once."""
        return sum(self.bytes.values())


@dataclass(frozen=True)
class Stage:
    """A part of the model on the way of the backward pass."""

    part: Part
    kept: float
    """What the forward pass keeps, until the backward pass is through."""
    layer: float
    """What one layer needs on top while it is gone through backward."""
    gradients: float
    copies: float
    """Half-precision copies of weights that autocast made and the backward pass needs."""
    of_images: bool


def cost(shape: Shape, setting: Setting) -> Cost:
    """Memory of each GPU by part, and floating-point operations."""
    return Cost(_Memory(shape, setting).peak(), _flop(shape, setting))


def trained_parameters(shape: Shape, setting: Setting) -> int:
    """Parameters that get a gradient."""
    return sum(_trained(shape, setting).values())


def _targets(shape: Shape, setting: Setting, part: Part | None = None) -> list[Linear]:
    """Linear layers that have an adapter."""
    return [
        linear
        for linear in shape.linears
        if setting.mode != "full" and f"{linear.part}.{linear.name}" in setting.lora_layers
        if part in (None, linear.part)
    ]


def _trained(shape: Shape, setting: Setting) -> dict[str, int]:
    """Trained parameters by part of the model: weights of the groups that are trained, adapters of the others."""
    groups = setting.trained
    weights = {part: shape.part_parameters(part) for part in PARTS}
    weights["cross_attention"] -= shape.gates
    weights["vision"] -= shape.never_trained
    trained: dict[str, int] = {
        part: weights[part] if part in groups else _adapter_parameters(shape, setting, part) for part in PARTS
    }
    trained["cross_attention"] += shape.gates * ("gates" in groups)
    extra = shape.extra_rows * shape.hidden * ("extra_rows" in groups)
    for name, group in (("embedding", "embeddings"), ("head", "head")):
        trained[name] = shape.vocabulary * shape.hidden * (group in groups) + extra
    return trained


def _adapter_parameters(shape: Shape, setting: Setting, part: Part) -> int:
    adapted = _targets(shape, setting, part)
    return sum(setting.lora_rank * (linear.inputs + linear.outputs) * linear.count for linear in adapted)


def _lines(shape: Shape, setting: Setting) -> int:
    """Return the rows and columns of all trained matrices and the numbers of all other trained tensors: what a factored
    second moment has a number for."""
    trained = trained_parameters(shape, setting)
    return trained - sum(
        count * (rows * columns - rows - columns) for rows, columns, count in _matrices(shape, setting)
    )


def _matrices(shape: Shape, setting: Setting) -> Iterator[tuple[int, int, int]]:
    """Yield rows, columns and number of the trained matrices."""
    groups, hidden, vision_hidden = setting.trained, shape.hidden, shape.vision_hidden
    for linear in shape.linears:
        if linear.part in groups:
            yield linear.outputs, linear.inputs, linear.count
    for linear in _targets(shape, setting):
        yield setting.lora_rank, linear.inputs, linear.count
        yield linear.outputs, setting.lora_rank, linear.count
    if "vision" in groups:
        yield shape.patches, vision_hidden, 1
        yield shape.patch_size, shape.patch_size, 3 * vision_hidden  # of the convolution by which the tower begins
    if "resampler" in groups and shape.resampler_layers:
        yield shape.resampler_latents, vision_hidden, 1
    for group in ("embeddings", "head"):
        yield shape.vocabulary, hidden, int(group in groups)
    yield shape.extra_rows, hidden, 2 * ("extra_rows" in groups)


# ---------------------------------------------------------------------------------------------------------- memory


class _Memory:
    """Bytes of one GPU."""

    def __init__(self, shape: Shape, setting: Setting) -> None:
        self.shape, self.setting = shape, setting
        self.half = 4 if setting.precision == "float32" else 2
        self.engine = ENGINES[setting.engine]
        self.autocast = not self.engine.shards and self.half == 2
        self.stream = 4 if self.autocast else self.half
        self.shards = setting.gpus if self.engine.shards else 1
        self.has_masters = self.engine.is_half and self.half == 2
        self.trained = _trained(shape, setting)

    def peak(self) -> dict[str, int]:
        """The parts at the moment when their sum is largest."""
        return max(self.moments(), key=lambda parts: sum(parts.values()))

    def moments(self) -> Iterator[dict[str, int]]:
        """The parts at each moment that can be the largest."""
        stages, logits = self.stages(), self.setting.trained_tokens * self.shape.vocabulary_rows
        copies = sum(stage.copies for stage in stages)
        head_copy = self.half * self.shape.embedding_parameters * self.autocast
        done = 0.0
        # The logits of base and extra rows, and beside each other; autocast still holds a copy of every weight.
        yield self.at(done, stages, 2 * logits * self.half, self.weight_copies())
        # A few rows of them as float32 logarithms and their gradient; the rest is half (`sft.models.loss.summed_loss`).
        yield self.at(done, stages, logits * self.half + 8 * min(CHUNK_LOGITS, logits), self.weight_copies())
        done += self.trained["head"]
        # The gradient of the head's weight, in half and in float32.
        temporary = (self.half + 4) * self.trained["head"] + self.half * logits
        yield self.at(done, stages, temporary, copies + head_copy)
        while stages:
            yield self.at(done, stages, 0, copies, working=stages[-1].layer)
            done += stages[-1].gradients
            copies -= stages[-1].copies
            stages = stages[:-1]
        yield self.at(sum(self.trained.values()), [], 0, 0, working=self.update())

    def at(self, done: float, kept: list[Stage], logits: float, copies: float, working: float = 0) -> dict[str, int]:
        """The parts at a moment: gradients `done`, activations still `kept`."""
        trained = sum(self.trained.values())
        gradients = trained if self.setting.accumulates else done
        image_work = working if kept and kept[-1].of_images else 0
        parts = {
            "weights": self.weights(),
            "gradients": gradients * self.gradient_bytes / self.shards + self.buckets(),
            "optimizer": self.optimizer(),
            "activations": sum(stage.kept for stage in kept if not stage.of_images) + working - image_work,
            "images": sum(stage.kept for stage in kept if stage.of_images) + image_work + self.pixels(),
            "logits": logits,
            "copies": copies + self.gathered(),
        }
        return {name: round(size) for name, size in parts.items()}

    # ------------------------------------------------------------------------------- what is there all the time

    def weights(self) -> float:
        """Weights, and the float32 masters where the weights themselves are half precision."""
        trained = sum(self.trained.values())
        master = 6 if self.has_masters else 4
        adapters = sum(_adapter_parameters(self.shape, self.setting, part) for part in PARTS if self.frozen(part))
        frozen = self.shape.parameters - (trained - adapters)
        frozen_linears = {part: self.linear_weights(part) for part in PARTS if self.frozen(part)}
        quantised = sum(size for part, size in frozen_linears.items() if self.quantised(part))
        matrices = sum(frozen_linears.values()) - quantised + self.shape.pixel_weights * self.frozen("vision")
        exact = (4 if self.autocast else self.half) * (frozen - quantised - matrices)
        return (master * trained + self.half * matrices + FOUR_BIT_BYTES * quantised + exact) / self.shards

    def frozen(self, part: Part) -> bool:
        """Whether the weights of a part are not trained."""
        return part not in self.setting.trained

    def quantised(self, part: Part) -> bool:
        """Whether the matrices of a part are stored in 4 bits."""
        return self.setting.mode == "qlora" and part in QUANTISED and self.frozen(part)

    def linear_weights(self, part: Part) -> int:
        """Of all linear layers of a part."""
        return sum(linear.weights * linear.count for linear in self.shape.of_part(part))

    @property
    def gradient_bytes(self) -> int:
        """Of a gradient: ZeRO-3 keeps them as its weights, half precision."""
        return self.half if self.engine.is_half else 4

    def buckets(self) -> float:
        """DDP sums gradients in buckets of its own, as large as they are."""
        several = not self.engine.shards and self.setting.gpus > 1
        return 4 * sum(self.trained.values()) * several

    def optimizer(self) -> float:
        """The optimizer's states. Paged ones are in the machine's memory when the GPU's is short, and count nothing."""
        kind, embedding = OPTIMIZERS[self.setting.optimizer], self.trained["embedding"]
        if kind.is_paged:
            return 0
        a_number = kind.bytes_per_parameter
        of_embedding = a_number if kind.bytes_per_embedding_parameter is None else kind.bytes_per_embedding_parameter
        others = sum(self.trained.values()) - embedding
        lines = kind.bytes_per_line * _lines(self.shape, self.setting)
        return (a_number * others + of_embedding * embedding + lines) / self.shards

    def pixels(self) -> float:
        """The images themselves, uint8, and what the tower's first layer keeps of them; or their features, float16."""
        if self.setting.encoded:
            return self.setting.images * self.shape.feature_bytes
        kept = 0 if self.frozen("vision") else self.half
        return self.setting.images * 3 * self.shape.image_size**2 * (1 + kept)

    def gathered(self) -> float:
        """Weights of other GPUs that are here for a while, and their gradients on the way there."""
        largest = self.half * max(self.layer_parameters("language"), self.layer_parameters("cross_attention"))
        if self.shards == 1:
            return 0
        if self.engine.live_parameters is None:  # a layer, the next one, a layer's gradient
            return 3 * largest
        return self.half * min(self.engine.live_parameters, self.shape.parameters) + largest

    def update(self) -> float:
        """An engine with masters turns the gradients of a group of parameters into float32 to update them."""
        group = min(self.engine.live_parameters or 0, sum(self.trained.values()) / self.shards)
        return 4 * group * self.has_masters

    def weight_copies(self) -> float:
        """Half-precision copies of every float32 weight of a linear layer, held by autocast during the forward pass."""
        return sum(self.copies_of(part) for part in PARTS) + self.half * self.shape.embedding_parameters * self.autocast

    def copies_of(self, part: Part) -> float:
        adapters = _adapter_parameters(self.shape, self.setting, part)
        return self.half * self.autocast * (adapters if self.frozen(part) else self.linear_weights(part))

    def layer_parameters(self, part: Part) -> int:
        return sum(linear.weights for linear in self.shape.of_part(part))

    # ----------------------------------------------------------------------- what the forward pass keeps, by part

    def stages(self) -> list[Stage]:
        """Parts in the order of the forward pass that keep something for the backward pass."""
        shape, setting = self.shape, self.setting
        tokens, images = setting.tokens, setting.images
        patches, states = images * shape.patches, images * shape.states
        vision = patches * self.vision_layer()
        text = tokens * self.text_layer()
        cross = tokens * self.cross_layer() + states * self.cross_states()
        inputs = {
            "vision": patches * shape.vision_hidden * 4,
            "language": tokens * shape.hidden * self.stream,
        }
        result = []
        if images and _has_backward("vision", setting):
            result.append(self.stage("vision", vision, inputs["vision"], patches))
        if images and shape.resampler_layers and _has_backward("resampler", setting):
            block = self.resampler_block() * images
            result.append(self.stage("resampler", block, block, 0))
        again = inputs["language"]
        result.append(self.stage("cross_attention", cross, again, tokens))
        result.append(self.stage("language", text, again, tokens))
        last_norm = self.rms_norm(shape.hidden, self.stream) + shape.hidden * self.half  # and the input of the head
        result[-1] = replace(result[-1], kept=result[-1].kept + tokens * last_norm)
        return result

    def stage(self, part: Part, layer: float, inputs: float, rows: int) -> Stage:
        """Of one layer: all that it keeps, and its inputs, which is what it keeps where it is computed again."""
        layers = self.shape.layers_in(part)
        again = _recomputed(part, self.shape, self.setting)
        weights = self.layer_parameters(part)
        largest = max((linear.weights for linear in self.shape.of_part(part)), default=0)
        wide = {"vision": self.shape.vision_intermediate}.get(part, self.shape.intermediate)
        working = 2.0 * rows * wide * self.half  # gradients on their way through the widest part of the layer
        if not self.frozen(part):
            working += (self.half + 4) * largest  # the gradient of a weight, in half and in float32
        if self.quantised(part):
            working += self.half * largest  # a weight unpacked
        if again == layers:  # else the last layer is not: what another one needs, that has left by then
            working += layer
        if again:
            working += self.half * weights * (self.autocast and not self.frozen(part))
        return Stage(
            part=part,
            kept=layer * (layers - again) + inputs * again,
            layer=working,
            gradients=self.trained[part],
            copies=self.copies_of(part) * (1 - again / layers),
            of_images=part in ("vision", "resampler"),
        )

    def inputs(self, part: Part, width: int, *names: str, stream: int | None = None) -> float:
        """What linear layers with the same input keep of it: nothing where the weight is frozen and has no adapter.

        Where the input comes in float32 (`stream`) autocast makes a copy for each; so does PEFT's layer, but for
        bitsandbytes.
        """
        frozen = self.frozen(part)
        kept = len({linear.name for linear in self.targets(part)} & set(names)) if frozen else len(names)
        dropped = frozen and self.setting.lora_dropout > 0  # its result, and a byte that says what was kept
        by_peft = frozen and not self.quantised(part)
        own_copies = (self.half == 2 and ((stream or self.stream) == 4 or by_peft)) or dropped
        return width * (self.half * (kept if own_copies else min(kept, 1)) + kept * dropped)

    def targets(self, part: Part) -> list[Linear]:
        return _targets(self.shape, self.setting, part)

    def rms_norm(self, width: int, stream: int) -> float:
        """Its input; the root mean square is one number a token."""
        return width * stream

    def mlp(self, part: Part) -> float:
        """A gated MLP of the language model, for each token."""
        D, F = self.shape.hidden, self.shape.intermediate
        return (
            self.rms_norm(D, self.stream)
            + self.inputs(part, D, "gate_proj", "up_proj", stream=self.half)
            + 2 * F * self.half  # gate and up
            + self.inputs(part, F, "down_proj", stream=self.half)
        )

    def text_layer(self) -> float:
        """A layer of the language model, for each token."""
        D = self.shape.hidden
        return (
            self.rms_norm(D, self.stream)
            + self.inputs("language", D, "q_proj", "k_proj", "v_proj", stream=self.half)
            + 4 * D * self.half  # query, key, value and output of the attention
            + self.inputs("language", D, "o_proj", stream=self.half)
            + self.mlp("language")
        )

    def qk_norm(self) -> float:
        return self.rms_norm(self.shape.hidden, self.half) * self.shape.qk_norms

    def cross_layer(self) -> float:
        """A gated cross-attention layer, for each token."""
        D = self.shape.hidden
        return (
            self.rms_norm(D, self.stream)
            + self.inputs("cross_attention", D, "q_proj", stream=self.half)
            + self.qk_norm()
            + 2 * D * self.half  # query and output of the attention
            + self.inputs("cross_attention", D, "o_proj", stream=self.half)
            + D * 2 * self.half * ("gates" in self.setting.trained)  # what they multiply
            + self.mlp("cross_attention")
        )

    def cross_states(self) -> float:
        """The same, for each state of an image."""
        D, E = self.shape.hidden, self.shape.vision_hidden
        return self.inputs("cross_attention", E, "k_proj", "v_proj", stream=4) + self.qk_norm() + 2 * D * self.half

    def vision_layer(self) -> float:
        """A layer of the tower, for each patch. What a norm is given is float32."""
        E, I = self.shape.vision_hidden, self.shape.vision_intermediate  # noqa: E741
        return (
            4 * E
            + self.inputs("vision", E, "q_proj", "k_proj", "v_proj", stream=self.half)
            + 4 * E * self.half
            + self.inputs("vision", E, "out_proj", stream=self.half) * self.frozen("vision")
            + 4 * E
            + self.inputs("vision", E, "fc1", stream=self.half)
            + I * self.half
            + self.inputs("vision", I, "fc2", stream=self.half)
        )

    def resampler_block(self) -> float:
        """A block of the resampler, for each image."""
        shape, half = self.shape, self.half
        E, heads, C = shape.vision_hidden, shape.resampler_heads, shape.resampler_heads * shape.resampler_head
        latents, context = shape.resampler_latents, shape.resampler_latents + shape.patches
        normed = (4 + half) * shape.resampler_qk_norms  # a norm's input in float32, and its output for the product
        attention = (
            latents * (4 * E + self.inputs("resampler", E, "q_proj", stream=half) + C * normed)
            + context * (self.inputs("resampler", E, "k_proj", "v_proj", stream=4) + C * (normed + half))
            + latents * context * heads * (4 + half)
            + latents * self.inputs("resampler", C, "output_proj", stream=half)
        )
        mlp = self.inputs("resampler", E, "fc", stream=half) + self.inputs("resampler", 4 * E, "c_proj", stream=half)
        return attention + latents * (4 * E + mlp + 4 * E * half)


# ------------------------------------------------------------------------------------- floating-point operations


def _flop(shape: Shape, setting: Setting) -> int:
    """Two for each weight and row of a matrix product; norms and activation functions are not counted."""
    images = setting.images
    rows = {
        "tokens": setting.tokens,
        "states": images * shape.states,
        "patches": images * shape.patches,
        "latents": images * shape.resampler_latents,
        "context": images * (shape.resampler_latents + shape.patches),
    }
    adapted = {(linear.part, linear.name) for linear in _targets(shape, setting)}
    total = 0.0
    unread = (setting.tokens - setting.trained_tokens) / max(setting.tokens, 1)
    done = ("vision", "resampler") if setting.encoded else ()
    for linear in shape.linears:
        if linear.part in done:
            continue
        is_spared = linear.part == "language" and linear.name in _READ_ONLY
        count = linear.count - is_spared * unread
        forward = 2.0 * rows[linear.rows] * linear.weights * count
        again = _share_again(linear.part, shape, setting)
        total += forward * (again + _passes(linear.part, setting, weight_trained=linear.part in setting.trained))
        last = (linear.part, linear.name) in _LAST and (linear.part, linear.name) not in adapted
        if last:
            total -= forward * again
        if (linear.part, linear.name) in adapted:
            forward = 2.0 * rows[linear.rows] * setting.lora_rank * (linear.inputs + linear.outputs) * count
            total += forward * (again + _passes(linear.part, setting, weight_trained=True))
    for part, forward in _attention_flop(shape, setting).items():
        if part in done:
            continue
        fused = part != "resampler"  # a fused kernel computes the scores again: five products backward for two forward
        again = _share_again(part, shape, setting)
        total += forward * (again + _passes(part, setting, weight_trained=True) + 0.5 * fused)
    total += 2 * setting.trained_tokens * shape.embedding_parameters * (3 if "head" in setting.trained else 2)
    pixels = 2 * images * (shape.patches - 1) * shape.pixel_weights * (not setting.encoded)
    return round(total + pixels * (2 if "vision" in setting.trained else 1))


_LAST = (("language", "down_proj"), ("vision", "fc2"))
"""What a layer ends with is not computed again: nothing behind it in the layer needs its result, but an adapter."""


_READ_ONLY = ("o_proj", "gate_proj", "up_proj", "down_proj")
"""What the last layer computes only for tokens whose next one is trained."""


def _passes(part: Part, setting: Setting, *, weight_trained: bool) -> int:
    """How often a matrix product is done: forward, and for either gradient."""
    return 1 + _has_backward(part, setting) * (1 + weight_trained)


def _has_backward(part: Part, setting: Setting) -> bool:
    """Whether gradients flow through the part, to what is trained in it or before it; through the text side always."""
    if part in ("language", "cross_attention") or part in setting.trained:
        return True
    adapted = setting.mode != "full" and any(layer.startswith(f"{part}.") for layer in setting.lora_layers)
    return adapted or (part == "resampler" and _has_backward("vision", setting))


def _recomputed(part: Part, shape: Shape, setting: Setting) -> int:
    """Layers of the part that are computed again in the backward pass."""
    if part == "resampler" or not _has_backward(part, setting):
        return 0
    return sum(is_recomputed(shape.layers_in(part), setting.checkpointing))


def _share_again(part: Part, shape: Shape, setting: Setting) -> float:
    return _recomputed(part, shape, setting) / max(shape.layers_in(part), 1)


def _attention_flop(shape: Shape, setting: Setting) -> dict[Part, float]:
    """Forward, of the products of queries with keys and of weights with values."""
    tokens, images = setting.tokens, setting.images
    inner = shape.resampler_heads * shape.resampler_head
    context = shape.patches + shape.resampler_latents
    return {
        "language": 4 * tokens**2 * shape.hidden * shape.layers,
        "cross_attention": 4 * tokens * shape.states * shape.hidden * shape.cross_layers * bool(images),
        "vision": 4 * images * shape.patches**2 * shape.vision_hidden * shape.vision_layers,
        "resampler": 4 * images * shape.resampler_latents * context * inner * shape.resampler_layers,
    }
