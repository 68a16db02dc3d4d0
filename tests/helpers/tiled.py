"""A tiny Idefics2, Idefics3 or SmolVLM: their vocabularies, random weights that are not too small to see, pictures."""

import io
import json

import numpy as np
import torch
from conftest import CORPUS, base_tokenizer, conversation
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Idefics2Config, Idefics3Config, PreTrainedTokenizerFast, SmolVLMConfig

from sft.batches.collate import collate
from sft.batches.image_source import OpenedImages
from sft.core.sample import ImageRef, Message, PlacedSample, Sample
from sft.models import get_family
from sft.models.idefics3.text import END_OF_UTTERANCE, FAKE, GLOBAL, IMAGE

KINDS = {
    "idefics3": dict(kind="idefics3"),
    "smolvlm": dict(kind="smolvlm"),
    "tied": dict(kind="smolvlm", tied=True),
    "idefics2": dict(kind="idefics2", do_image_splitting=False),
    "idefics2, split and tied": dict(kind="idefics2", tied=True),
}
TILE, LONGEST_EDGE = 64, 128
GRID = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
SIZES = {"square": (20, 20), "wide": (90, 40), "tall": (30, 200)}  # 2 x 2, 1 x 2 and 2 x 1 tiles, and the whole


def byte_tokenizer(start="<|im_start|>", end=END_OF_UTTERANCE, tags=(GLOBAL, *GRID)) -> PreTrainedTokenizerFast:
    """As SmolVLM-256M's, whose rows and columns are tokens; without `tags` they are text, as in Idefics3-8B."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", start, *({end} - {END_OF_UTTERANCE})]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=start, pad_token="<|endoftext|>")
    tokenizer.add_tokens([FAKE, IMAGE, END_OF_UTTERANCE, *tags], special_tokens=True)
    tokenizer.eos_token = end
    return tokenizer


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """As Idefics2's: pieces by legacy rules, and the tokens of images and of a turn's end."""
    tokenizer = base_tokenizer()
    tokenizer.add_tokens([FAKE, IMAGE, END_OF_UTTERANCE], special_tokens=True)
    return tokenizer


def tiny_config(tokenizer, kind="idefics3", tied=False):
    """Two layers of each part, with shared key and value heads."""
    text = dict(
        model_type="mistral" if kind == "idefics2" else "llama", vocab_size=512, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0,
    )  # fmt: skip
    vision = dict(
        hidden_size=64, patch_size=16, image_size=TILE, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128,
    )  # fmt: skip
    others = dict(tie_word_embeddings=tied, pad_token_id=0, image_token_id=tokenizer.convert_tokens_to_ids(IMAGE))
    if kind == "idefics2":
        perceiver = dict(
            hidden_size=64, resampler_n_latents=4, resampler_depth=2, resampler_n_heads=4, resampler_head_dim=8,
            num_key_value_heads=2,
        )  # fmt: skip
        text |= {"sliding_window": 48}
        return Idefics2Config(text_config=text, vision_config=vision, perceiver_config=perceiver, **others)
    config = SmolVLMConfig if kind == "smolvlm" else Idefics3Config
    return config(text_config=text, vision_config=vision, scale_factor=2, **others)


def tiny_folder(folder, tokenizer, kind="idefics3", tied=False, **settings):
    """Write a model, its tokenizer and its preprocessor_config.json, in which `settings` are other than usual."""
    torch.manual_seed(0)
    config, weights = tiny_config(tokenizer, kind, tied), get_family(kind).weights
    edges = {"longest_edge": LONGEST_EDGE} | ({"shortest_edge": 48} if kind == "idefics2" else {})
    config.preprocessor = {"size": edges, "max_image_size": {"longest_edge": TILE}, **settings}
    model = weights.model_class(config)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
            if name.endswith(".latents"):
                parameter.add_(torch.randn(parameter.shape))
    folder.mkdir(parents=True)
    weights.save_model(model, folder, torch.float32)
    weights.save_processor(tokenizer, config, folder)
    return folder


def png(name):
    width, height = SIZES[name]
    noise = np.random.default_rng(len(name)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


REFS = {name: ImageRef(source=png(name)) for name in SIZES}


def shown(*turns):
    """A conversation whose `<words>` are pictures."""
    sample = conversation(*turns)
    messages = [
        Message(
            role=m.role,
            content=tuple(REFS[i.source.decode()[1:-1]] if isinstance(i, ImageRef) else i for i in m.content),
        )
        for m in sample.messages
    ]
    return Sample(key="toy", messages=tuple(messages))


SAMPLES = [
    shown(("<square>", "What is it?"), "A dog."),
    shown("The quick brown fox?", "It jumps over the lazy dog."),
    shown(("<wide>", "What is in", "<tall>", "this image?"), "A cat.", ("And", "<wide>", "this?"), "A red circle."),
    shown(("<tall>", "A square?"), "A green triangle and a blue square."),
]


def batch_of(template, samples, **options):
    names = list(REFS.values())
    placed = [PlacedSample(template.encode(s), tuple(map(names.index, s.images)), 0) for s in samples]
    return collate([placed], OpenedImages(names, template.images), **{"train_on": "assistant"} | options)


def write_recipe(folder, base, family="smolvlm"):
    """Pictures with questions, every other question without one, and a recipe that trains a base on them."""
    for name in SIZES:
        (folder / f"{name}.png").write_bytes(png(name))
    rows = [
        {
            "messages": [
                {"role": "user", "content": "<image>What is this?" if number % 2 else "What is a dog?"},
                {"role": "assistant", "content": f"A {name} image."},
            ],
            "images": [f"{name}.png"] * (number % 2),
        }
        for number, name in enumerate([*SIZES] * 8)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = [{"question": "What is it?", "answer": "A dog.", "image": f"{name}.png"} for name in SIZES]
    (folder / "own.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    file = folder / f"{family}.yaml"
    file.write_text(
        f"""
model: {{path: {base}, family: {family}}}
data:
  store: {folder}/{family}
  sequence_length: 256
  mixture: [{{name: talk, share: 1, datasets: [{{dataset: messages, path: {folder}/train.jsonl}}]}}]
  validation: {{share: 0.1}}
training: {{max_steps: 5, tokens_per_step: 512, learning_rate: 1e-3, precision: float32}}
checkpoints: {{every_steps: 5}}
output_dir: {folder}/out_{family}
"""
    )
    return file
