"""Toys: a LLaMA-style tokenizer, a tiny IDEFICS whose cross-attention gates are open, and samples to pack."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import IdeficsConfig, PreTrainedTokenizerFast

from sft.chat_template import ChatTemplate, load_chat_template
from sft.collate import PlacedSample
from sft.models import idefics
from sft.sample import ImageRef, Message, Sample

REPOSITORY = Path(__file__).parent.parent
IMAGE_SIZE = 28

torch.set_num_threads(2)

CORPUS = [
    "User: What is in this image? Assistant: A dog and a cat.",
    "The quick brown fox jumps over the lazy dog 0123456789",
    "Describe this image. A red circle, a blue square and a green triangle.",
]


def train_tokenizer(corpus: list[str], vocab_size: int = 320) -> Tokenizer:
    """Byte-fallback BPE by the rules of the LLaMA-1 tokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no merge crosses words
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, show_progress=False)
    )
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(CORPUS),
        unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>", padding_side="left",
    )  # fmt: skip
    tokenizer.add_tokens(list(idefics.EXTRA_TOKENS), special_tokens=True)
    return tokenizer


@pytest.fixture(scope="session")
def template(tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    return ChatTemplate(load_chat_template(REPOSITORY / "chat_templates" / idefics.CHAT_TEMPLATE), tokenizer)


def tiny_config(vocab_size: int, extra: int = 3) -> IdeficsConfig:
    return IdeficsConfig(
        vocab_size=vocab_size, additional_vocab_size=extra, hidden_size=64, num_hidden_layers=4,
        num_attention_heads=4, intermediate_size=128, cross_layer_interval=2, alpha_type="float",
        alpha_initializer="ones", use_resampler=True, qk_layer_norms=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
        vision_config=dict(
            embed_dim=64, image_size=IMAGE_SIZE, patch_size=14, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=128,
        ),
        perceiver_config=dict(
            use_resampler=True, resampler_n_latents=8, resampler_depth=2, resampler_n_heads=2,
            resampler_head_dim=32, qk_layer_norms_perceiver=True,
        ),
    )  # fmt: skip


def make_tiny_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> idefics.PackedIdefics:
    """A model whose gates are 1, so that images matter from the start, and whose weights are not too small to see."""
    torch.manual_seed(seed)
    model = idefics.PackedIdefics(tiny_config(tokenizer.vocab_size))
    idefics.use_grouped_attention(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> idefics.PackedIdefics:
    return make_tiny_model(tokenizer)


def picture(name: str) -> ImageRef:
    """A stand-in that says which image it is; tests that need pixels use `pixels_of`."""
    return ImageRef(source=name.encode())


def image_number(image: ImageRef) -> int:
    assert isinstance(image.source, bytes)
    return int(hashlib.sha256(image.source).hexdigest()[:8], 16)


def pixels_of(number: int) -> np.ndarray:
    """Noise that depends on the image's number alone."""
    return np.random.default_rng(number).integers(0, 256, (3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)


def conversation(*turns: tuple[str, ...] | str, key: str = "toy") -> Sample:
    """Turns of user and assistant in alternation; a word in <angles> is a picture of that name."""
    messages = []
    for i, turn in enumerate(turns):
        items = (turn,) if isinstance(turn, str) else turn
        content = tuple(picture(item) if item.startswith("<") else item for item in items)
        messages.append(Message(role="assistant" if i % 2 else "user", content=content))
    return Sample(key=key, messages=tuple(messages))


def place(template: ChatTemplate, sample: Sample, source: int = 0) -> PlacedSample:
    return PlacedSample(template.encode(sample), tuple(image_number(image) for image in sample.images), source)
