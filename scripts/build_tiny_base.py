#!/usr/bin/env python
r"""Build tiny_base/ and tiny_smolvlm/, the small pre-trained models that `idefics-sft quickstart` fine-tunes.

    python scripts/build_tiny_base.py                       tiny_base/      (about 15 minutes on one CPU core)
    python scripts/build_tiny_base.py --family smolvlm --steps 270 --images-per-step 32 --sentences-per-step 16 \
        --learning-rate 1.5e-3                              tiny_smolvlm/   (two minutes)

What it learns from: captions of easy-vqa's *train* images ("a red circle") and sentences of the templates below, text
only. It has never seen a turn, a question, or an image together with options. What it has practised, in text alone, is
to look things up in lettered lists ("A: red", "B: blue", then "blue B"), words of colours and shapes among them: a
skill that a real pre-training corpus gives, and without which 2.5 M parameters do not learn to answer by letter in
minutes. The sentences also hold the words that questions are made of.

The tokenizer is trained here too. IDEFICS has byte-fallback BPE by the rules of LLaMA-1, base vocabulary plus the two
image tokens; the model has every part of idefics-9b (resampler, qk layer norms, gated cross-attention, decoupled
embedding and head). SmolVLM has byte-level BPE by the rules of SmolLM2, plus the tokens of images and turns; the model
has every part of SmolVLM (SigLIP tower, pixel shuffle, language model). Tower and language model start as those of
tiny_base/, without its cross-attention, as released models start from others. From random weights, 500 steps taught it
neither to look things up nor to tell shapes apart.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import easy_vqa
import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Idefics3Config, IdeficsConfig, PreTrainedTokenizerFast

from sft.batches.collate import collate
from sft.batches.image_source import GivenImages
from sft.core.sample import ImageRef, Message, PlacedSample, Sample
from sft.models import get_family
from sft.models.chat_template import ChatTemplate, load_chat_template
from sft.models.family import Family
from sft.models.family_folder import HEAD
from sft.models.idefics.packed import PackedIdefics
from sft.models.idefics.text import END_OF_UTTERANCE, FAKE, IMAGE
from sft.models.idefics3.packed import PackedIdefics3
from sft.models.idefics3.text import GLOBAL
from sft.models.image_transform import load_tiles
from sft.models.packed_model import PackedModel

DATA = Path(easy_vqa.__file__).parent / "data"
REPOSITORY = Path(__file__).parent.parent
TEMPLATES, TINY_BASE = REPOSITORY / "chat_templates", REPOSITORY / "tiny_base"
IMAGE_SIZE = 64
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "gray", "red", "green", "blue", "yellow", "teal", "brown")
LETTERS = "ABCDEFGH"
THINGS = (
    "lamp", "cup", "book", "key", "ball", "hat", "shoe", "spoon", "map", "coin", "bell", "rope", "chair", "bird", "cat",
    "dog", "fish", "tree", "stone", "flower", "clock", "letter", "box", "bag", *SHAPES, *COLOURS,
)  # fmt: skip
PLACES = ("shelf", "room", "box", "house", "table", "street", "garden", "drawer")
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Greta", "Henry", "Iris", "Jon", "Kate", "Leo")
SKIES = {"sky": "blue", "sea": "teal", "grass": "green", "sun": "yellow", "night": "black", "rose": "red",
         "earth": "brown", "stone": "gray", "leaf": "green", "coal": "black", "lemon": "yellow"}  # fmt: skip
COMMON_WORDS = """
the of and to in is that it for as was with on are this be at by or from one had not but what all were when we
there can an your which their if do does will each about how up out them then she many some so these would other
into has more her two like him see time could no make than first been its who now people my made over did down
only way find use may water long little very after word contain contains show shows describe who where why name
please
"""


# ---------------------------------------------------------------------------------------------------- the corpus


def caption(colour: str, shape: str, rng: random.Random) -> str:
    """What an image shows, in one of several wordings."""
    return rng.choice(
        (
            f"a {colour} {shape}",
            f"A {colour} {shape}.",
            f"A picture of a {colour} {shape}.",
            f"The image contains a {colour} {shape}.",
            f"There is a {shape} in the image. It is {colour}.",
            f"The shape is a {shape} and its color is {colour}.",
            f"A {shape} is present, and the color of the {shape} is {colour}.",
            f"The color is {colour}. The shape is a {shape}.",
            f"{colour} {shape}",
            f"{colour}",
            f"{shape}",
        )
    )


def sentence(rng: random.Random) -> str:
    """One sentence or two without an image."""
    kind = rng.random()
    if kind < 0.75:
        return letters_for_things(rng)
    if kind < 0.85:
        return repeated_list(rng)
    thing, other = rng.sample(THINGS, 2)
    name, friend = rng.sample(NAMES, 2)
    what, colour = rng.choice(list(SKIES.items()))
    number, more = sorted(rng.sample(range(2, 10), 2))
    return rng.choice(
        (
            f"{name} knows what color the {what} is. The {what} is {colour}.",
            f"The {what} is {colour}, and so it does not look {rng.choice([c for c in COLOURS if c != colour])}.",
            f"{name} has a {thing}. {friend} has a {other}. The {other} belongs to {friend}.",
            f"{name} was asked for the {thing} and said yes, it is present. {friend} said no.",
            f"The question was which {rng.choice(PLACES)} has the {thing}, and the answer was correct.",
            f"The user wrote a question and the assistant gave the correct answer, a {thing}.",
            f"It is possible that there is a {thing} in the {rng.choice(PLACES)}, but not a {other}.",
            f"{name} counted {number} of them and {friend} counted {more}. {more} is more than {number}.",
            f"Please describe the image, said {name}. It shows a {colour} {thing}, said {friend}.",
            f"Hello, said {name}. Thank you, said {friend}. Good morning and goodbye.",
            f"Choose one of the following and say what it is, {name} wrote. Several answers are possible.",
        )
    )


def letters_for_things(rng: random.Random) -> str:
    """A list of lettered things, then where each of them was: what a letter stands for must be looked up.

    The barest form, "A red B blue / blue B", is what makes the model learn this at all: alone in 150 steps, while
    without it 1,000 steps were not enough. The others widen it.
    """
    kind = rng.choice((COLOURS, COLOURS, SHAPES, THINGS))
    things = rng.sample(kind, min(rng.choice((2, 3, 4, 4)), len(kind)))
    pairs = list(zip(LETTERS, things, strict=False))
    listed = rng.choice(("{0} {1} ", "{0} {1} ", "{0}: {1}\n", "{0}: {1}\n", "{0}: {1}\n", "({0}) {1}\n"))
    asked = rng.choice(("{1} {0} ", "{1} {0} ", "{1} {0}. ", "{1}: {0}\n", "The {1} is {0}. ", "{0}: {1}\n"))
    text = "".join(listed.format(*pair) for pair in pairs).strip() + "\n"
    rng.shuffle(pairs)
    return text + "".join(asked.format(*pair) for pair in pairs).strip()


def repeated_list(rng: random.Random) -> str:
    """Words, and the same words again."""
    words = ", ".join(rng.sample((*THINGS, *NAMES), rng.randint(3, 8)))
    return f"{words}. {words}."


def train_images() -> list[tuple[Path, str, str]]:
    """Train images whose colour and shape some answer tells: file, colour, shape."""
    found: dict[int, dict[str, str]] = {}
    for _, answer, image in json.loads((DATA / "train" / "questions.json").read_text()):
        if answer in SHAPES:
            found.setdefault(image, {})["shape"] = answer
        if answer in COLOURS:
            found.setdefault(image, {})["colour"] = answer
    return [
        (DATA / "train" / "images" / f"{image}.png", parts["colour"], parts["shape"])
        for image, parts in sorted(found.items())
        if len(parts) == 2
    ]


# ------------------------------------------------------------------------------------------------- the tokenizers


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-fallback BPE with the ids and rules of LLaMA-1: <unk> <s> </s>, 256 bytes, then pieces."""
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    rules = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learner.normalizer = rules
    learner.pre_tokenizer = pre_tokenizers.Sequence(  # so that no piece crosses a word or holds a line break
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    control = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(byte_tokens), special_tokens=control, min_frequency=2, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)[len(control) :]
    pieces = [piece for piece in pieces if piece != "\n"]  # a byte, as in LLaMA
    vocab = {piece: index for index, piece in enumerate(control + byte_tokens + pieces)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = rules
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(control)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        padding_side="left",
        model_max_length=2048,
    )
    fast.add_tokens([FAKE, IMAGE], special_tokens=True)
    return fast


def train_byte_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the rules of SmolLM2 and, in their order, the tokens that SmolVLM-256M adds."""
    backend = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=byte_level.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        pad_token="<|im_end|>",
        padding_side="left",
        model_max_length=2048,
    )
    grid = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    fast.add_tokens([GLOBAL, *grid, FAKE, IMAGE, END_OF_UTTERANCE], special_tokens=True)
    fast.eos_token = END_OF_UTTERANCE
    return fast


def tokenizer_corpus() -> Iterator[str]:
    """The sentences, words that begin a line in conversations, the alphabet, and common words of English."""
    rng = random.Random(1)
    for _ in range(20_000):
        yield sentence(rng)
        yield caption(rng.choice(COLOURS), rng.choice(SHAPES), rng)
    for _ in range(50):
        yield "User\nAssistant\nQuestion\nPossible\nCorrect\nUser Assistant Question Possible Correct"
        yield "\n".join("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()-/ ")
        yield " ".join(COMMON_WORDS.split())


# ------------------------------------------------------------------------------------------------- the models


class Base(NamedTuple):
    """What is trained: a new model, and how its folder is written."""

    family: Family
    model: PackedModel
    tokenizer: PreTrainedTokenizerFast
    save_processor: Callable[[Path], object]

    def save(self, output: Path) -> None:
        """Write the folder of a base: weights, config, tokenizer, and how images are cut where that is a setting."""
        output.mkdir(parents=True, exist_ok=True)
        self.family.weights.save_model(self.model, output, torch.bfloat16)
        (output / "generation_config.json").unlink(missing_ok=True)
        self.save_processor(output)


def new_idefics(vocab_size: int) -> Base:
    """Every part of idefics-9b, small."""
    tokenizer = train_tokenizer(tokenizer_corpus(), vocab_size)
    model = PackedIdefics(idefics_config(tokenizer.vocab_size))
    model.use_grouped_attention()
    return Base(get_family("idefics"), model, tokenizer, tokenizer.save_pretrained)


def idefics_config(vocab_size: int) -> IdeficsConfig:
    """Sizes of the IDEFICS."""
    return IdeficsConfig(
        vocab_size=vocab_size,
        additional_vocab_size=2,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        cross_layer_interval=3,  # after 300 steps of tuning it answers by letter; with 2 or 6 it did not by then
        max_position_embeddings=2048,
        alpha_initializer="ones",
        alpha_type="float",
        qk_layer_norms=True,
        use_resampler=True,
        initializer_range=0.06,  # 0.02 is made for wider models: this one learned the same in twice the steps from it
        freeze_text_layers=False,
        freeze_vision_layers=False,
        freeze_lm_head=False,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        vision_config={
            "embed_dim": 128,
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 256,
        },
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": 8,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 32,
            "qk_layer_norms_perceiver": True,
        },
    )


def new_smolvlm(vocab_size: int) -> Base:
    """Every part of SmolVLM, small; an image is one tile."""
    family = get_family("smolvlm")
    tokenizer = train_byte_tokenizer(tokenizer_corpus(), vocab_size)
    config = smolvlm_config(tokenizer)
    model = PackedIdefics3(config)
    start_from_idefics(model, tokenizer)
    model.use_grouped_attention()
    return Base(family, model, tokenizer, lambda folder: family.weights.save_processor(tokenizer, config, folder))


@torch.no_grad()
def start_from_idefics(model: PackedIdefics3, tokenizer: PreTrainedTokenizerFast) -> None:
    """Copy the layers of tower and language model of tiny_base/, and the rows of all tokens that both vocabularies
    have."""
    trained = load_file(TINY_BASE / "model.safetensors")
    theirs = get_family("idefics").text.load_tokenizer(TINY_BASE).get_vocab()
    spelled = {"<|im_start|>": "<s>", END_OF_UTTERANCE: "</s>", "Ċ": "<0x0A>"}
    for token, row in tokenizer.get_vocab().items():
        other = theirs.get(spelled.get(token, token.replace("Ġ", "▁")), len(trained[HEAD]))
        if other < len(trained[HEAD]):  # not one of the extra rows, which are those of image markers
            model.lm_head.weight[row] = trained[HEAD][other]
            model.model.text_model.embed_tokens.weight[row] = trained["model.embed_tokens.weight"][other]
    for name, weight in model.model.named_parameters():
        other = trained.get(f"model.{name.removeprefix('text_model.')}")
        if other is not None and "embed_tokens" not in name:
            weight.copy_(other[-len(weight) :])  # no patch stands where the class token stood: position 0


def smolvlm_config(tokenizer: PreTrainedTokenizerFast) -> Idefics3Config:
    """Sizes of the SmolVLM. Its `model_type` is that of the released SmolVLM-256M."""
    initializer_range = 0.06
    special: dict[str, Any] = dict(pad_token_id=tokenizer.pad_token_id)
    special |= dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    config = Idefics3Config(
        **special,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=False,
        scale_factor=4,
        text_config={
            **special,
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            "initializer_range": initializer_range,
        },
        vision_config={
            "hidden_size": 128,
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "initializer_range": initializer_range,
        },
    )
    edge = {"longest_edge": IMAGE_SIZE}
    config.preprocessor = {"size": edge, "max_image_size": edge, "do_image_splitting": False}
    return config


def document(*content: str | ImageRef) -> Sample:
    return Sample(key="document", messages=(Message(role="document", content=content),))


BASES = {"idefics": ("tiny_base", new_idefics), "smolvlm": ("tiny_smolvlm", new_smolvlm)}
"""The folder of a family's base, and what makes a new one."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--family", choices=BASES, default="idefics")
    arguments.add_argument("--output", type=Path, help="the family's folder if left out")
    arguments.add_argument("--steps", type=int, default=1800)
    arguments.add_argument("--images-per-step", type=int, default=48)
    arguments.add_argument("--sentences-per-step", type=int, default=48)
    arguments.add_argument("--vocab-size", type=int, default=1024)
    arguments.add_argument("--learning-rate", type=float, default=2e-3)
    arguments.add_argument("--seed", type=int, default=0)
    args = arguments.parse_args()
    torch.set_num_threads(1)  # the layers are so small that a second thread costs more than it brings
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    folder, new_base = BASES[args.family]
    base, output_dir = new_base(args.vocab_size), args.output or Path(folder)
    family, model, tokenizer, _ = base
    chat_template = load_chat_template(TEMPLATES / family.text.chat_template(tokenizer))
    if (
        END_OF_UTTERANCE not in tokenizer.get_vocab()
    ):  # documents of IDEFICS never hold it, and its base has no such row
        chat_template = chat_template.replace(END_OF_UTTERANCE, "")
    cut = family.images(model.config)
    template = ChatTemplate(chat_template, tokenizer, cut)
    images = train_images()
    tiles = [load_tiles(path.read_bytes(), cut) for path, _, _ in images]
    family.weights.select_trainable(model)
    print(f"{model.num_parameters():,} parameters, {tokenizer.vocab_size} base tokens, {len(images)} images")

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(9 * (step + 1) / args.steps, 1 - step / (args.steps + 1))
    )
    model.train()
    started, losses = time.time(), []
    for step in range(args.steps):
        pack = []
        for number in rng.sample(range(len(images)), args.images_per_step):
            _, colour, shape = images[number]
            sample = document(ImageRef(source=b""), caption(colour, shape, rng))
            pack.append(PlacedSample(template.encode(sample), (number,), 0))
        for _ in range(args.sentences_per_step):
            pack.append(PlacedSample(template.encode(document(sentence(rng))), (), 1))
        batch = collate([pack], GivenImages(cut, tiles.__getitem__), train_on="assistant")
        with torch.autocast("cpu", torch.bfloat16):
            output = model(batch=batch)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append([float(output.token_losses_P[output.source_ids_P == source].mean()) for source in (0, 1)])
        if (step + 1) % 200 == 0:
            captions, sentences = np.mean(losses[-200:], axis=0)
            seconds = time.time() - started
            print(f"{step + 1} captions {captions:.3f} sentences {sentences:.3f} {seconds:.0f} s", flush=True)
            base.save(output_dir)

    base.save(output_dir)
    size = (output_dir / "model.safetensors").stat().st_size
    print(f"{output_dir}: {size / 1e6:.2f} MB of weights")


if __name__ == "__main__":
    main()
