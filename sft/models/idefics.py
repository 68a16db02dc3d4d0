"""IDEFICS-1 (9b, 80b and their instruct models): everything that is peculiar to it.

The weights are those of `transformers.IdeficsForVisionText2Text`, on disk too. What is ours is the forward over packed
micro-batches: tokens attend inside their own sample, look at the last image at or before them, and only trained
positions reach the language-model head. transformers' own forward cannot do this (it has no packing) and its loss
crashes on every released checkpoint, whose vocabulary has extra rows.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, IdeficsConfig, PreTrainedTokenizerFast
from transformers import IdeficsForVisionText2Text as PlainIdefics
from transformers.masking_utils import sdpa_mask

from sft.attention import group_sequences, group_tokens, grouped_attention
from sft.errors import UserError
from sft.loss import token_losses, trained_positions, z_losses
from sft.recipe import GROUPS
from sft.sample import NO_SOURCE, Batch

CHAT_TEMPLATE = "idefics.jinja"

FAKE, IMAGE, END_OF_UTTERANCE = "<fake_token_around_image>", "<image>", "<end_of_utterance>"
EXTRA_TOKENS = (FAKE, IMAGE, END_OF_UTTERANCE)
"""Extra vocabulary in the order of the released checkpoints: rows 32000, 32001 and, in instruct models, 32002."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Pixel statistics of the CLIP vision tower (as in IdeficsImageProcessor)."""

NEVER_TRAINED = ("model.vision_model.post_layernorm.",)
"""The tower's last hidden state is taken before this norm, so it never gets a gradient. Left trainable, it stops DDP
("Expected to have finished reduction") and leaves holes in optimizer states."""

GROUP_OF = {
    "model.vision_model.": "vision",
    "model.perceiver_resampler.": "resampler",
    "model.layers.": "language",
    "model.norm.": "language",
    "model.gated_cross_attn_layers.": "cross_attention",
    "model.embed_tokens.additional_embedding.": "extra_rows",
    "model.embed_tokens.weight": "embeddings",
    "lm_head.additional_fc.": "extra_rows",
    "lm_head.": "head",
}
"""The group of parameters that a name begins with; gates are found by their own names."""
GATES = (".alpha_cross_attn", ".alpha_dense")

LORA_LAYERS = {
    "vision.attention": r"model\.vision_model\.encoder\.layers\.\d+\.self_attn\.(q|k|v|out)_proj",
    "vision.mlp": r"model\.vision_model\.encoder\.layers\.\d+\.mlp\.fc[12]",
    "resampler.attention": r"model\.perceiver_resampler\.blocks\.\d+\.0\.(q|k|v|output)_proj",
    "resampler.mlp": r"model\.perceiver_resampler\.blocks\.\d+\.1\.(fc|c_proj)",
    "language.attention": r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
    "language.mlp": r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
    "cross_attention.attention": r"model\.gated_cross_attn_layers\.\d+\.cross_attn\.(q|k|v|o)_proj",
    "cross_attention.mlp": r"model\.gated_cross_attn_layers\.\d+\.mlp\.(gate|up|down)_proj",
}
"""Whole names of the linear layers that adapters can stand beside. Anchored at the front: `layers.0.self_attn.q_proj`
alone would hit the vision tower too, and `q_proj` everything. The head and the embedding are not among them: PEFT's
adapters do not know of their extra rows."""

QUANTISED = ("language", "cross_attention")
"""Groups whose weight matrices are stored in 4 bits: 7.8 of the 8.9 billion parameters of idefics-9b. The tower, the
resampler, the embedding and the head stay unquantised; 4 bits would save another 0.5 GB."""

LLAMA_VOCABULARY = 32000
"""Tokens of LLaMA-1, on which the released models are built."""
GOLDEN_IDS = (
    *(1, 4911, 29901, 32000, 32001, 32000, 20355, 915, 445, 1967, 29889, 32002),  # User:<image>Describe this image.
    *(29871, 13, 7900, 22137, 29901, 319, 11203, 29889, 32002),  # \nAssistant: A dog.
    *(29871, 13, 2659, 29901, 1724, 338, 372, 29973, 32002),  # \nUser: What is it?
    *(29871, 13, 7900, 22137, 29901, 319, 11203, 29889, 32002, 2),
)
"""See `golden_ids`."""

EXTRA_EMBEDDING = "model.embed_tokens.additional_embedding.weight"
EXTRA_HEAD = "lm_head.additional_fc.weight"
BASE_EMBEDDING = "model.embed_tokens.weight"


def _mask_always(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers may leave a causal mask out and rely on a flag; grouped attention wants to see it."""
    mask: Tensor | None = sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})
    return mask


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", _mask_always)


class PackedOutput(NamedTuple):
    """What the forward over a packed micro-batch returns. P = trained positions."""

    loss: Tensor
    """(Summed cross entropy + z-loss) / trained tokens of the whole optimizer step."""
    token_losses_P: Tensor
    """Cross entropy of each trained position, float32, detached."""
    source_ids_P: Tensor
    """The mixture's source of each trained position."""
    logits_PV: Tensor | None
    """Logits of each trained position, float32; only in evaluation mode, they are large."""


class PackedIdefics(PlainIdefics):  # type: ignore[misc]  # transformers is not typed
    """IDEFICS with a forward for packed micro-batches: `model(batch=batch)`. Anything else goes to transformers."""

    @functools.wraps(PlainIdefics.forward)  # generate() reads the signature
    def forward(
        self,
        *args: Any,
        batch: Batch | None = None,
        read_P: Tensor | None = None,
        z_loss: float = 0.0,
        **kwargs: Any,
    ) -> Any:
        """Summed next-token loss of a packed micro-batch; its logits (P, V) at the positions `read_P`, if those are
        given; transformers' forward when no `batch` is.

        `z_loss` is the weight of `sft.loss.z_losses` beside the loss.
        """
        if batch is None:
            return super().forward(*args, **kwargs)
        hidden_TD = self._hidden_states(batch)
        if read_P is not None:
            return self._logits(hidden_TD[read_P])
        positions_P = trained_positions(batch.labels_T)
        logits_PV = self._logits(hidden_TD[positions_P])
        losses_P = token_losses(logits_PV, batch.labels_T[positions_P + 1])
        source_ids_P = batch.source_ids_T[positions_P + 1]
        weights_P = source_ids_P != NO_SOURCE
        total_P = losses_P + z_loss * z_losses(logits_PV) if z_loss else losses_P
        return PackedOutput(
            loss=(total_P * weights_P).sum() / batch.num_trained_tokens,
            token_losses_P=losses_P.detach(),
            source_ids_P=source_ids_P,
            logits_PV=None if self.training else logits_PV,
        )

    def _logits(self, hidden_PD: Tensor) -> Tensor:
        """The head. In evaluation it computes in float32 whatever autocast says: bfloat16 logits of two options differ
        by steps of up to 1/16, and tie."""
        if self.training:
            return torch.as_tensor(self.lm_head(hidden_PD))
        with torch.autocast(hidden_PD.device.type, enabled=False):
            return torch.as_tensor(self.lm_head(hidden_PD.to(self.lm_head.weight.dtype))).float()

    def encode_images(self, pixel_values_NCHW: Tensor) -> Tensor:
        """uint8 or already normalised pixels -> (images, latents, size), what cross-attention looks at."""
        if pixel_values_NCHW.dtype == torch.uint8:
            pixel_values_NCHW = normalise(pixel_values_NCHW)
        features = self.model.vision_model(pixel_values=pixel_values_NCHW.to(self.dtype)).last_hidden_state
        if self.config.use_resampler:
            features = self.model.perceiver_resampler(features)
        return torch.as_tensor(features)

    def _image_states(self, batch: Batch) -> Tensor:
        if len(batch.pixel_values_NCHW):
            return self.encode_images(batch.pixel_values_NCHW)
        # Text only, on one device: nothing can look at these zeros.
        size = self.config.vision_config.embed_dim
        return torch.zeros(1, 1, size, dtype=self.dtype, device=batch.input_ids_T.device)

    def _hidden_states(self, batch: Batch) -> Tensor:
        """Final hidden states (T, D). The walk through the layers is that of `IdeficsModel.forward`."""
        decoder = self.model
        states_NLD = self._image_states(batch)
        samples = (
            group_sequences(batch.sequences, len(batch.input_ids_T), batch.input_ids_T.device)
            if batch.sequences
            else group_tokens(batch.segment_ids_T)
        )
        lookers = group_tokens(batch.image_ids_T)
        sees_image_1T = (batch.image_ids_T >= 0)[None]
        position_ids_1T = batch.position_ids_T[None]

        hidden_1TD = decoder.embed_tokens(batch.input_ids_T[None])
        for index, layer in enumerate(decoder.layers):
            if index % decoder.cross_layer_interval == 0:
                hidden_1TD = decoder.gated_cross_attn_layers[index // decoder.cross_layer_interval](
                    hidden_1TD,
                    None,
                    states_NLD.flatten(0, 1)[None],
                    cross_attention_gate=sees_image_1T,
                    groups=lookers,
                    num_images=len(states_NLD),
                )
            hidden_1TD = layer(hidden_1TD, position_ids=position_ids_1T, groups=samples)
        return torch.as_tensor(decoder.norm(hidden_1TD)[0])


def normalise(pixels_NCHW: Tensor) -> Tensor:
    """uint8 pixels -> float32 with the mean and deviation that the CLIP tower was trained with."""
    mean, std = (torch.tensor(x, device=pixels_NCHW.device)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    # In place in one copy: a sixth of the time of three, and the same bits.
    return pixels_NCHW.to(torch.float32, copy=True).div_(255).sub_(mean).div_(std)


def load_model(
    path: str | Path,
    *,
    trained: Collection[str] = GROUPS,
    frozen_dtype: torch.dtype = torch.float32,
    quantised: bool = False,
    device: torch.device | str = "cpu",
) -> PackedIdefics:
    """Load a model folder or hub id, ready for packed training, evaluation and generation.

    The groups in `trained` have float32 weights, since updates of 1e-5 are lost in bfloat16 parameters. Matrices of the
    others are stored in `frozen_dtype`, or in 4 bits where `quantised` and of a group in `QUANTISED`: nf4 with double
    quantisation (Dettmers et al. 2023, QLoRA), computed in `frozen_dtype`. Embeddings, head, norms, biases and gates
    are always float32. Quantised weights stay on the `device` they are loaded to.

    Raises:
        UserError: the folder is not an IDEFICS model, or weights are missing, damaged or of another shape.
    """
    folder = _local_folder(path)
    _check_weights(folder, _read_config(folder))
    in_4_bits = [group for group in QUANTISED if quantised and group not in trained]
    if set(GROUPS) <= set(trained):
        frozen_dtype = torch.float32  # nothing is frozen
    model: PackedIdefics = PackedIdefics.from_pretrained(
        folder,
        dtype=frozen_dtype,
        attn_implementation="sdpa",
        use_safetensors=True,
        **_quantisation(in_4_bits, frozen_dtype, device) if in_4_bits else {},
    )
    if frozen_dtype != torch.float32:
        _reload_exactly(model, folder, _exact(model, trained))
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            # On a CPU with avx512_bf16 a forward without gradients would repack the weights in place, with which the
            # next one with gradients fails (bitsandbytes 0.50.2).
            module.support_avx512bf16_for_cpu = False
    use_grouped_attention(model)
    return model


def _quantisation(groups: Collection[str], dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise the linear layers of some groups."""
    from transformers import BitsAndBytesConfig

    kept = [re.escape(name.removesuffix(".")) for name, group in GROUP_OF.items() if group not in groups]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _exact(model: nn.Module, trained: Collection[str]) -> Iterator[str]:
    """Parameters that are float32, whatever the frozen matrices are stored in: what is trained, and what no matrix
    product would round under autocast. The head computes in float32 in evaluation."""
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and group_of(f"{name}.weight") not in {*trained, "head", "extra_rows"}
    }
    return (name for name, _ in model.named_parameters() if name not in matrices)


def _reload_exactly(model: nn.Module, folder: Path, names: Iterable[str]) -> None:
    """Give parameters their float32 values: loading has rounded them."""
    shards, parameters = weight_files(folder), dict(model.named_parameters())
    by_file: dict[str, list[str]] = {}
    for name in names:
        by_file.setdefault(shards[name], []).append(name)
    for file, held in by_file.items():
        with safe_open(folder / file, framework="pt") as tensors:
            for name in held:
                parameters[name].data = tensors.get_tensor(name).float().to(parameters[name].device)


def use_grouped_attention(model: PackedIdefics) -> None:
    """Set attention by groups. The vision tower has no groups and attends as ever, see `grouped_attention`."""
    model.config._attn_implementation = "grouped"
    model.config.vision_config._attn_implementation = "grouped"


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model folder or hub id, exactly as its tokenizer.json says.

    Not through `AutoTokenizer`: transformers 5 rebuilds a `LlamaTokenizer` from its vocabulary, ignores the normalizer
    of tokenizer.json and gives other ids than the model was trained with (no "▁" after special tokens).

    Raises:
        UserError: there is no tokenizer, or it is not one of IDEFICS.
    """
    config = _read_config(path)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no tokenizer.json found; an IDEFICS folder has one") from error
    tokenizer.padding_side = "left"  # generation with right padding gives wrong tokens
    num_base = config.get("vocab_size")
    if num_base is None:
        raise UserError(f"{path}: config.json has no vocab_size")
    expected = {"<unk>": 0, "<s>": 1, "</s>": 2, FAKE: num_base, IMAGE: num_base + 1}
    found = {token: tokenizer.convert_tokens_to_ids(token) for token in expected}
    if found != expected:
        raise UserError(f"{path}: special tokens have ids {found}; with this model's vocabulary they are {expected}")
    first = tokenizer("User", add_special_tokens=False)["input_ids"][0]
    if not tokenizer.convert_ids_to_tokens(first).startswith("▁"):
        raise UserError(f"{path}: text after a special token does not begin with '▁'; IDEFICS needs legacy LLaMA rules")
    return tokenizer


def group_of(name: str) -> str:
    """The group of a parameter; an adapter belongs to the group of the layer beside which it stands.

    Raises:
        KeyError: not a parameter of this model.
    """
    if name.endswith(GATES):
        return "gates"
    matching = [group for start, group in GROUP_OF.items() if name.startswith(start)]
    if not matching:
        raise KeyError(name)
    return matching[0]


def lora_pattern(targets: Collection[str]) -> str:
    """A regular expression for the whole names of the linear layers that `model.lora.targets` names."""
    patterns = [pattern for name, pattern in LORA_LAYERS.items() if {name, name.partition(".")[0]} & set(targets)]
    return "|".join(f"({pattern})" for pattern in patterns)


def select_trainable(model: nn.Module, groups: Collection[str] = GROUPS) -> tuple[str, ...]:
    """Make the weights of some groups trainable, and adapters if there are any; freeze everything else.

    Returns the names of parameters of these groups that stay frozen, since they never get a gradient.
    `from_pretrained` silently resets what the config's freeze_* flags say, so this is done after every load.
    """
    frozen = []
    for name, parameter in model.named_parameters():
        of_adapter = ".lora_" in name
        asked = of_adapter or (group_of(name) in groups and ".base_layer." not in name)
        never = name.startswith(NEVER_TRAINED)
        if asked and never:
            frozen.append(name)
        parameter.requires_grad_(asked and not never)
    return tuple(frozen)


def save_model(model: nn.Module, directory: Path, dtype: torch.dtype, weights: dict[str, Tensor] | None = None) -> None:
    """Write weights rounded once to `dtype`, and the config, as plain `IdeficsForVisionText2Text`.

    `weights` are those of the model, where its parameters hold but a share of them.
    """
    assert isinstance(model, PackedIdefics)
    weights = {name: tensor.to(dtype) for name, tensor in (weights or model.state_dict()).items()}
    model.save_pretrained(directory, state_dict=weights)
    write_config(json.loads((directory / "config.json").read_text()), directory, dtype)


def write_config(config: dict[str, Any], directory: Path, dtype: torch.dtype) -> None:
    """Write config.json for weights of `dtype`, as of the plain class."""
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    config |= {"architectures": [PlainIdefics.__name__], "dtype": str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_processor(tokenizer: PreTrainedTokenizerFast, model_path: str | Path, directory: Path) -> None:
    """Write what transformers' `AutoProcessor` reads: the tokenizer, and how images become pixels of the size that the
    config of the model in `model_path` says."""
    from transformers import IdeficsImageProcessor, IdeficsProcessor

    size = int(_read_config(model_path)["vision_config"]["image_size"])
    images = IdeficsImageProcessor(image_size=size, image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD))
    IdeficsProcessor(image_processor=images, tokenizer=tokenizer, image_size=size).save_pretrained(directory)


def load_config(path: str | Path) -> IdeficsConfig:
    """The config of a model folder or hub id, without its weights.

    Raises:
        UserError: there is none, or it is not of IDEFICS-1.
    """
    return IdeficsConfig.from_dict(_read_config(path))


def num_rows(config: IdeficsConfig) -> int:
    """Tokens of the vocabulary: base and extra rows."""
    return int(config.vocab_size + config.additional_vocab_size)


def golden_ids(config: IdeficsConfig) -> list[int] | None:
    """The ids of `sft.checks.model.CHAT` that idefics-9b-instruct was trained with (LLaMA-1's vocabulary; the prompt of
    transformers#28591 and the rules of its released processor); None for another vocabulary."""
    return list(GOLDEN_IDS) if config.vocab_size == LLAMA_VOCABULARY else None


def plain_logits(model: nn.Module, input_ids_T: Tensor, image_ids_T: Tensor, pixel_values_NCHW: Tensor) -> Tensor:
    """Logits (T, V) of one sample by transformers' own forward and attention: what the packed forward must agree with.

    A token looks at the image of its `image_ids_T`, at none where that is -1.
    """
    assert isinstance(model, PackedIdefics)
    looks_TN = image_ids_T[:, None] == torch.arange(len(pixel_values_NCHW), device=image_ids_T.device)
    model.config._attn_implementation = model.config.vision_config._attn_implementation = "sdpa"
    try:
        output = model(
            input_ids=input_ids_T[None],
            attention_mask=torch.ones_like(input_ids_T)[None],
            pixel_values=normalise(pixel_values_NCHW).to(model.dtype)[None],
            image_attention_mask=looks_TN.long()[None],
            use_cache=False,
        )
    finally:
        use_grouped_attention(model)
    return torch.as_tensor(output.logits[0])


def image_size(config: IdeficsConfig) -> int:
    """Height and width in pixels that the vision tower takes."""
    return int(config.vision_config.image_size)


def max_positions(config: IdeficsConfig) -> int:
    """Longest sequence that the model has positions for."""
    return int(config.max_position_embeddings)


def tokens_per_image(size: tuple[int, int]) -> int:
    """`<fake><image><fake>`, whatever the size: the image itself comes through cross-attention."""
    return 3


def image_cost_in_tokens(config: IdeficsConfig) -> float:
    """What an image costs, in text tokens: how often a weight is multiplied, beside how often for a token.

    A token goes through the language layers and the cross-attention layers. An image's patches go through the tower,
    its latents through the resampler, patches and latents through the resampler's keys and values, and the latents
    through the keys and values of every cross-attention layer. For idefics-9b:
    (257 * 629 M + 64 * 102 M + 321 * 24 M + 64 * 84 M) / (6.48 G + 1.35 G) = 23.
    Left out: attention scores, which are little at these lengths, and the head, which only trained positions see.
    """
    with torch.device("meta"):
        model = PlainIdefics(config).model

    def num(part: str, *names: str) -> int:
        """Weights of a part; of those layers only whose name is among `names`, if any are given."""
        layers = ((name.split(".")[-2], weight) for name, weight in model.get_submodule(part).named_parameters())
        return sum(weight.numel() for name, weight in layers if not names or name in names)

    keys_values = ("k_proj", "v_proj")
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1  # and the class token
    latents, image = patches, patches * num("vision_model.encoder")
    if config.use_resampler:
        latents = config.perceiver_config.resampler_n_latents
        read = num("perceiver_resampler.blocks", *keys_values)
        image += latents * (num("perceiver_resampler.blocks") - read) + (patches + latents) * read
    looked_at = num("gated_cross_attn_layers", *keys_values)
    image += latents * looked_at
    return float(image / (num("layers") + num("gated_cross_attn_layers") - looked_at))


def prepare_base(path: str | Path, output: Path) -> None:
    """Write a base folder whose vocabulary has `<end_of_utterance>`, so that every engine loads a plain checkpoint.

    Only the shards that hold the extra rows are rewritten, the others are linked. The new row of the embedding and of
    the head is the mean of the base embedding rows (the method of HuggingFaceM4's update_model_embeds.py). A base that
    has the token already (an instruct model) is linked as it is. `resize_token_embeddings` cannot do this: it grows the
    *base* rows and throws the extra rows of the head away.

    Raises:
        UserError: the folder is not an IDEFICS model.
    """
    source = _local_folder(path)
    config = _read_config(source)
    _check_weights(source, config)
    if source.resolve() == output.resolve():
        raise UserError(f"{output}: the prepared base would replace the base it is made from; give another folder")
    staging = output.with_name(f".{output.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)

    grow = config["additional_vocab_size"] == len(EXTRA_TOKENS) - 1
    rewritten = _grow_extra_rows(source, staging) if grow else set()
    if grow:
        config["additional_vocab_size"] += 1
    (staging / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for file in source.iterdir():
        if file.suffix in (".safetensors", ".json") and file.name not in rewritten | {"config.json"}:
            _link(file, staging / file.name)

    tokenizer = load_tokenizer(source)
    tokenizer.add_tokens([END_OF_UTTERANCE], special_tokens=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (staging / name).unlink(missing_ok=True)  # never write through a link into the base
    tokenizer.save_pretrained(staging)
    shutil.rmtree(output, ignore_errors=True)
    staging.rename(output)


def _grow_extra_rows(source: Path, output: Path) -> set[str]:
    """Write the shards that hold the extra rows with one row more; return their file names."""
    from safetensors.torch import load_file, save_file

    shards = weight_files(source)
    mean = load_file(source / shards[BASE_EMBEDDING])[BASE_EMBEDDING].float().mean(0, keepdim=True)
    rewritten = {shards[EXTRA_EMBEDDING], shards[EXTRA_HEAD]}
    for name in rewritten:
        tensors = load_file(source / name)
        for key in (EXTRA_EMBEDDING, EXTRA_HEAD):
            if key in tensors:
                tensors[key] = torch.cat([tensors[key], mean.to(tensors[key].dtype)])
        save_file(tensors, output / name, metadata={"format": "pt"})
    return rewritten


def _check_weights(folder: Path, config: dict[str, Any]) -> None:
    """Whether every weight of the model is in the folder, in its shape; transformers would invent what is missing.

    Reads the headers of the safetensors files only.

    Raises:
        UserError: naming the first that is missing or of another shape, or the file that is damaged.
    """
    with torch.device("meta"):
        expected = PlainIdefics(IdeficsConfig.from_dict(config)).state_dict()
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(set(weight_files(folder).values())):
        try:
            with safe_open(folder / file, framework="pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / file}: not readable as safetensors ({error})") from error
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise UserError(f"{folder}: {len(missing)} weights are missing, {missing[0]} among them")
    for name, tensor in expected.items():
        if shapes[name] != tuple(tensor.shape):
            raise UserError(f"{folder}: {name} has shape {shapes[name]}, config.json asks for {tuple(tensor.shape)}")


def weight_files(folder: Path) -> dict[str, str]:
    """The safetensors file that holds each tensor.

    Raises:
        UserError: there is none, or it is damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            weight_map: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index}: damaged, does not say which file holds which tensor") from error
        return weight_map
    single = folder / "model.safetensors"
    if not single.exists():
        raise UserError(f"{folder}: no model.safetensors found; weights are read from safetensors only")
    try:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single.name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{single}: not readable as safetensors ({error})") from error


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def _local_folder(path: str | Path) -> Path:
    """The folder itself, or the local snapshot of a hub id.

    Raises:
        UserError: there is no such folder, nor is it in the local cache or on a hub that can be reached.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{path}: no such folder, not in the local cache, and not to be had of the hub ({reason})"
        ) from error


def _read_config(path: str | Path) -> dict[str, Any]:
    """config.json of a model folder or hub id.

    Raises:
        UserError: there is none, or it is not of IDEFICS-1.
    """
    from transformers import PreTrainedConfig

    missing = f"{path}: no config.json found; expected a model folder or a hub id"
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        raise UserError(missing)  # transformers would return an empty config
    try:
        config: dict[str, Any] = dict(PreTrainedConfig.get_config_dict(path)[0])
    except (OSError, ValueError, AttributeError, TypeError) as error:
        damaged = f"{path}: config.json is damaged, not a JSON object"
        raise UserError(damaged if (Path(path) / "config.json").exists() else missing) from error
    if config.get("model_type") != "idefics":
        raise UserError(f"{path}: model_type is {config.get('model_type')!r}; this family loads 'idefics'")
    return config
