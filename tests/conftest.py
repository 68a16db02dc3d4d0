"""Toys: a LLaMA-style tokenizer, a tiny IDEFICS whose cross-attention gates are open, and samples to pack."""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from transformers import IdeficsConfig, PreTrainedTokenizerFast

from sft.batches import source_stream
from sft.batches.collate import collate
from sft.batches.image_source import GivenImages
from sft.cli.main import main
from sft.core.sample import Batch, ImageRef, Message, PlacedSample, Sample
from sft.data.sources import Sources
from sft.models.chat_template import ChatTemplate, load_chat_template
from sft.models.idefics.family import FAMILY
from sft.models.idefics.images import IdeficsImages
from sft.models.idefics.packed import PackedIdefics
from sft.models.idefics.text import CHAT_TEMPLATE, END_OF_UTTERANCE
from sft.models.loaded_model import Loaded

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY / "scripts"))

from build_tiny_base import train_tokenizer  # noqa: E402

pytest_plugins = ["helpers.evaluated_run"]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> None:
    """A cache for the tests, in place of the user's."""
    os.environ["IDEFICS_SFT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


IMAGE_SIZE = 28
NUM_LATENTS = 8

torch.set_num_threads(1)  # toys are too small to share
source_stream.CHUNK_SAMPLES = 32  # of toys: the look-ahead has to be filled again and again
settings.register_profile("toys", deadline=None, max_examples=50)  # no deadline: the machine may be busy
settings.load_profile("toys")

CORPUS = [
    "User: What is in this image? Assistant: A dog and a cat.",
    "The quick brown fox jumps over the lazy dog 0123456789",
    "Describe this image. A red circle, a blue square and a green triangle.",
] * 2


def base_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few words by the rules of LLaMA-1, and the two image tokens: what a base model comes with."""
    return train_tokenizer(iter(CORPUS), vocab_size=400)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = base_tokenizer()
    tokenizer.add_tokens([END_OF_UTTERANCE], special_tokens=True)
    return tokenizer


@pytest.fixture(scope="session")
def template(tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    return ChatTemplate(load_chat_template(REPOSITORY / "chat_templates" / CHAT_TEMPLATE), tokenizer, TOY_IMAGES)


def tiny_config(vocab_size: int, extra: int = 3) -> IdeficsConfig:
    """Every part of idefics-9b. Sizes are multiples of 64, which bitsandbytes asks for."""
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
            use_resampler=True, resampler_n_latents=NUM_LATENTS, resampler_depth=2, resampler_n_heads=2,
            resampler_head_dim=32, qk_layer_norms_perceiver=True,
        ),
    )  # fmt: skip


square_images = IdeficsImages.of_size
TOY_IMAGES = IdeficsImages(tiny_config(400))


def toy_images(load: Callable[[int], np.ndarray], images: IdeficsImages = TOY_IMAGES) -> GivenImages:
    """Images of one square tile by their numbers; `load` makes uint8 (C, H, W) of a number."""
    return GivenImages(images, lambda number: load(number)[None])


def make_tiny_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0, extra: int = 3) -> PackedIdefics:
    """A model whose gates are 1, so that images matter from the start, and whose weights are not too small to see."""
    torch.manual_seed(seed)
    model = PackedIdefics(tiny_config(tokenizer.vocab_size, extra))
    model.use_grouped_attention()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval()


@pytest.fixture
def sources(tmp_path: Path, template: ChatTemplate) -> Sources:
    """Two sources, the first of two datasets; the red image is in all three."""
    from helpers.planning import data_config
    from helpers.sources import BLUE, GREEN, RED, part
    from helpers.stores import shown

    first = part(tmp_path / "a", template, shown("a0", RED, "What?"), shown("a1", "Hi."))
    second = part(tmp_path / "b", template, shown("b0", BLUE, RED, "Same?"))
    third = part(tmp_path / "c", template, shown("c0", GREEN, "Green?"), shown("c1", RED, "Red?"))
    return Sources([[first, second], [third]], data_config("one", "two", train_on="all"))


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> PackedIdefics:
    return make_tiny_model(tokenizer)


def loaded_of(model: PackedIdefics, template: ChatTemplate, **options: Any) -> Loaded:
    """A tiny model as `load_for_inference` returns it."""
    own = dict(family=FAMILY, path="tiny", max_positions=100_000, autocast=False)
    loaded = Loaded(model=model, **own | options)
    vars(loaded)["template"] = template
    return loaded


def picture(name: str) -> ImageRef:
    """A stand-in that says which image it is; tests that need pixels use `pixels_of`."""
    return ImageRef(source=name.encode())


def image_number(image: ImageRef) -> int:
    """The number by which collate knows an image."""
    assert isinstance(image.source, bytes)
    return int(hashlib.sha256(image.source).hexdigest()[:8], 16)


def pixels_of(number: int) -> np.ndarray:
    """Noise that depends on the image's number alone."""
    return np.random.default_rng(number).integers(0, 256, (3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)


def content(*items: str) -> tuple[str | ImageRef, ...]:
    """Text and pictures in reading order; a word in <angles> is the picture of that name."""
    return tuple(picture(item) if item.startswith("<") else item for item in items)


def conversation(*turns: tuple[str, ...] | str, system: str | None = None, key: str = "toy") -> Sample:
    """Turns of user and assistant in alternation; a word in <angles> is a picture of that name."""
    messages = [Message(role="system", content=(system,))] if system else []
    for i, turn in enumerate(turns):
        items = (turn,) if isinstance(turn, str) else turn
        messages.append(Message(role="assistant" if i % 2 else "user", content=content(*items)))
    return Sample(key=key, messages=tuple(messages))


def withheld(sample: Sample, *numbers: int) -> Sample:
    """A sample of which some messages, by their numbers, are not to be learned."""
    messages = (replace(message, is_trained=i not in numbers) for i, message in enumerate(sample.messages))
    return replace(sample, messages=tuple(messages))


def document(*items: str, key: str = "page") -> Sample:
    """A web document or an image-text pair; a word in <angles> is a picture of that name."""
    return Sample(key=key, messages=(Message(role="document", content=content(*items)),))


def place(template: ChatTemplate, sample: Sample, source: int = 0) -> PlacedSample:
    return PlacedSample(template.encode(sample), tuple(image_number(image) for image in sample.images), source)


def batch_of(*packs: Sequence[PlacedSample], **options: Any) -> Batch:
    """Collate packs of toys with their noise for pixels; every token is trained unless `options` say otherwise."""
    return collate(packs, toy_images(pixels_of), **{"train_on": "all"} | options)


def status_of(*arguments: object) -> int:
    """The exit status of a command line, run in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code or 0


@pytest.fixture
def refusal(capsys):
    """Runs a command line that is wrong and returns what it prints: a line for each of its `problems`."""

    def run(*arguments: object, problems: int = 1) -> str:
        assert status_of(*arguments) == 2
        printed = capsys.readouterr()
        assert printed.err.count("\n") == printed.err.count("idefics-sft: ") == problems, printed.err
        assert "Traceback" not in printed.err
        return printed.err

    return run


def num_trained(encoded, train_on) -> int:
    """Trained tokens of a sample, counted by hand: its first token never is."""
    return sum(end - max(start, 1) for start, end in encoded.trained_ranges(train_on))


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium, driven by selenium."""
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(paths) and os.environ.get("IDEFICS_SFT_SYSTEM_PACKAGES") != "1":
        pytest.skip("chromium and chromedriver are not here; run scripts/test --system-packages")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location, driver = paths
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as opened:
        yield opened


def visible(browser, selector, attribute="textContent"):
    """An attribute of every element that can be seen."""
    found = browser.find_elements("css selector", selector)
    return [element.get_property(attribute) for element in found if element.is_displayed()]
