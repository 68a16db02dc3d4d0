import json
import re
import shutil
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers import Idefics3Config, PreTrainedTokenizerFast

from inline_family.names import GROUPS
from inline_family.packed import PackedInline, image_token_ids
from sft.core.sample import EncodedSample, ImageRef, Tiling
from sft.models.family import Family
from sft.models.image_transform import resize

TILE = 32


def load_tokenizer(path):
    return PreTrainedTokenizerFast.from_pretrained(path)


def encode_prompt(tokenizer, items):
    text = tokenizer.bos_token + "".join(item for item in items if not isinstance(item, ImageRef))
    return EncodedSample(
        key="prompt",
        input_ids=np.array(tokenizer(text, add_special_tokens=False)["input_ids"]),
        trained_spans=(),
        image_positions=(),
    )


TEXT = SimpleNamespace(
    CHAT_TEMPLATE=str(Path(__file__).with_name("inline.jinja")),
    ENDS=("<end_of_utterance>",),
    NEVER_WRITTEN=("<fake_token_around_image>", "<image>"),
    load_tokenizer=load_tokenizer,
    num_rows=lambda config: config.text_config.vocab_size,
    max_positions=lambda config: config.text_config.max_position_embeddings,
    golden_ids=lambda config: None,
    wrong_with_tokens=lambda tokenizer, ids, text: "",
    encode_prompt=encode_prompt,
)


@dataclass(frozen=True)
class InlineImages:
    config: Idefics3Config
    one_tile = Tiling(0, 0, TILE, TILE)
    depends_on_size = True
    cost_in_tokens = 7.0

    @property
    def state_token_id(self):
        return self.config.image_token_id

    @property
    def state_size(self):
        return self.config.text_config.hidden_size

    def tiling(self, width, height):
        rows, columns = min(ceil(height / TILE), 2), min(ceil(width / TILE), 3)
        return self.one_tile if rows * columns == 1 else Tiling(rows, columns, TILE, TILE)

    def cut(self, pixels, tiling):
        whole = resize(pixels, TILE, TILE, "bicubic")[None]
        if not tiling.rows:
            return whole
        grid = resize(pixels, tiling.rows * TILE, tiling.columns * TILE, "bicubic")
        grid = grid.reshape(3, tiling.rows, TILE, tiling.columns, TILE).transpose(1, 3, 0, 2, 4)
        return np.concatenate([grid.reshape(-1, 3, TILE, TILE), whole])

    def token_ids(self, tokenizer, tiling):
        return image_token_ids(tokenizer, tiling.num_tiles)

    def num_states(self, tiling):
        return 4 * tiling.num_tiles

    def weight(self, tiling):
        return tiling.num_tiles

    def settings(self):
        return {"tile": TILE}


PREFIXES = {
    "model.vision_model.": "vision",
    "model.connector.": "connector",
    "model.text_model.embed_tokens.": "embeddings",
    "model.text_model.": "language",
    "lm_head.": "head",
}


def group_of(name):
    return next(group for prefix, group in PREFIXES.items() if name.startswith(prefix))


def select_trainable(model, groups=None):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(groups is None or group_of(name) in groups)
    return ()


def load_model(path, *, trained=None, frozen_dtype=torch.float32, quantised=False, device="cpu"):
    return PackedInline.from_pretrained(path).set_attention()


def save_model(model, directory, dtype, weights=None):
    weights = {name: tensor.to(dtype) for name, tensor in (weights or model.state_dict()).items()}
    model.save_pretrained(directory, state_dict=weights)
    write_config(json.loads((directory / "config.json").read_text()), directory, dtype)


def write_config(config, directory, dtype):
    config |= {"architectures": ["Idefics3ForConditionalGeneration"], "dtype": str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(config))


WEIGHTS = SimpleNamespace(
    prepare_base=lambda path, output: shutil.copytree(path, output),
    load_config=Idefics3Config.from_pretrained,
    load_model=load_model,
    save_model=save_model,
    write_config=write_config,
    weight_files=lambda folder: {},
    save_processor=lambda tokenizer, config, directory: tokenizer.save_pretrained(directory),
    encoder_settings=lambda config: config.vision_config.to_dict(),
    group_of=group_of,
    is_decayed=lambda name: not re.search("norm|bias", name),
    lora_pattern=lambda targets: r"model\.text_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
    select_trainable=select_trainable,
)

assert set(PREFIXES.values()) == GROUPS.keys()
FAMILY = Family(name="idefics3", text=TEXT, images=InlineImages, weights=WEIGHTS)
