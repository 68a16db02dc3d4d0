"""Images and text of Idefics3 and SmolVLM, held against transformers' own processors and SmolLM2's real vocabulary."""

import json
import random

import numpy as np
import pytest
from conftest import REPOSITORY, conversation
from helpers.tiled import GRID, byte_tokenizer, shown
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Idefics3Config, Idefics3Processor, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from sft.core.sample import Message, Sample
from sft.models.chat_template import ChatTemplate, load_chat_template
from sft.models.idefics3 import text
from sft.models.idefics3.images import TiledImages

VOCABULARY = REPOSITORY / ".cache" / "smollm2" / "vocabulary.json"


def images_of(longest_edge, tile, is_split=True, patch=16, scale=4):
    """How images are cut; the shape of SmolVLM-256M if nothing else is said."""
    config = Idefics3Config(
        text_config={"model_type": "llama"}, vision_config={"image_size": tile, "patch_size": patch}, scale_factor=scale
    )
    size, max_image_size = {"longest_edge": longest_edge}, {"longest_edge": tile}
    config.preprocessor = {"size": size, "max_image_size": max_image_size, "do_image_splitting": is_split}
    return TiledImages(config)


def processor_of(images, tokenizer):
    longest_edge, tile, is_split = images.tiles
    processor = Idefics3ImageProcessorPil(
        size={"longest_edge": longest_edge}, max_image_size={"longest_edge": tile}, do_image_splitting=is_split
    )
    return Idefics3Processor(processor, tokenizer, image_seq_len=images.states_per_tile)


def random_size(rng):
    """Any size up to 400 pixels, or one of an extreme aspect."""
    short, long = rng.randint(1, 30), rng.randint(100, 900)
    return rng.choice([(rng.randint(1, 400), rng.randint(1, 400)), (short, long), (long, short)])


@pytest.mark.parametrize(
    "images",
    [images_of(128, 32, patch=8, scale=2), images_of(89, 28, patch=7, scale=2), images_of(32, 32, patch=8, scale=2),
     images_of(128, 32, is_split=False, patch=8, scale=2)],
    ids=["4 x 4 tiles", "no whole number of tiles", "one tile", "not split"],
)  # fmt: skip
@pytest.mark.parametrize("tags", [(text.GLOBAL, *GRID), ()], ids=["tags are tokens", "tags are text"])
def test_tokens_and_tiles_are_those_of_the_processor_for_1000_sizes(images, tags):
    tokenizer, rng = byte_tokenizer(tags=tags), random.Random(0)
    processor = processor_of(images, tokenizer)
    for _ in range(125):
        width, height = random_size(rng)
        expected = processor(text="<image>", images=[Image.new("RGB", (width, height))], add_special_tokens=False)
        tiling = images.tiling(width, height)
        assert images.token_ids(tokenizer, tiling) == list(expected["input_ids"][0]), (width, height)
        assert images.weight(tiling) == len(expected["pixel_values"][0]), (width, height)
        assert images.num_states(tiling) == expected["input_ids"][0].count(processor.image_token_id)


def pictures():
    """Smooth, noisy, of text, small, wide and tall: what resizing may get wrong."""
    y, x = np.mgrid[0:480, 0:640]
    smooth = np.stack([x / 640 * 255, y / 480 * 255, (x + y) % 256], -1).astype(np.uint8)
    letters = Image.new("RGB", (300, 400), "white")
    for line in range(33):
        ImageDraw.Draw(letters).text((10, 12 * line), "The quick brown fox 0123456789" * 3, fill=(line * 6, 0, 0))
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    letters = np.array(letters)
    long = np.tile(noise, (6, 1, 1))  # made lower: Pillow resizes its rows before its columns
    return dict(smooth=smooth, letters=letters, noise=noise, small=noise[:13, :64], tall=letters[:, :120], long=long)


@pytest.mark.parametrize("images", [images_of(512, 128), images_of(512, 128, is_split=False)], ids=["split", "whole"])
def test_pixels_are_those_of_the_processor_within_two_of_255(images):
    processor = processor_of(images, byte_tokenizer()).image_processor
    for name, pixels in pictures().items():
        height, width, _ = pixels.shape
        expected = np.asarray(processor([[Image.fromarray(pixels)]], return_tensors="np")["pixel_values"][0])
        own = images.cut(pixels, images.tiling(width, height))
        apart = np.abs(own.astype(int) - np.rint((expected + 1) * 127.5).astype(int))
        assert own.shape == expected.shape and apart.max() <= 2 and apart.mean() <= 0.05, name


def test_without_torch_s_kernel_pixels_are_those_of_pillow(monkeypatch):
    monkeypatch.setattr("sft.models.idefics3.images._torch_has_lanczos", lambda: False)
    images = images_of(512, 128)
    pixels = pictures()["letters"]
    expected = processor_of(images, byte_tokenizer()).image_processor([[Image.fromarray(pixels)]], return_tensors="np")
    own = images.cut(pixels, images.tiling(300, 400))
    assert (own == np.rint((expected["pixel_values"][0] + 1) * 127.5)).all()


# ------------------------------------------------------------------------------------------------------------- text

# The published template of SmolVLM and SmolVLM2; Idefics3's begins with another token.
PUBLISHED = (
    "{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
STARTS = {"<|im_start|>": text.END_OF_UTTERANCE, "<|begin_of_text|>": "<|end_of_text|>"}


def template_of(start="<|im_start|>", tokenizer=None, images=None):
    tokenizer = tokenizer or byte_tokenizer(start, STARTS[start])
    source = load_chat_template(REPOSITORY / "chat_templates" / text.CHAT_TEMPLATES[start])
    return ChatTemplate(source, tokenizer, images or images_of(128, 32, patch=8, scale=2))


CHATS = [
    conversation(("<dog>", "What is it?"), "A dog.", ("And", "<cat>", "this?"), "A cat.", system="Be brief."),
    conversation("Hello.", "Hello."),
    conversation(("What is it?", "<dog>"), "A dog."),
]


def as_content(messages):
    def item(part):
        return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}

    return [{"role": message.role, "content": [*map(item, message.content)]} for message in messages]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("sample", CHATS, ids=["images and a system text", "text", "image last"])
def test_a_prompt_is_the_published_string(start, sample):
    """A whole chat ends where its last turn does, in place of a line break that nobody writes."""
    template, tokenizer = template_of(start), byte_tokenizer(start)
    messages = as_content(sample.messages)
    prompt = tokenizer.apply_chat_template(
        messages[:-1], chat_template=start + PUBLISHED, tokenize=False, add_generation_prompt=True
    )
    assert template.text(sample.messages[:-1], add_generation_prompt=True) == prompt
    whole = tokenizer.apply_chat_template(messages, chat_template=start + PUBLISHED, tokenize=False)
    end = STARTS[start] * (start == "<|begin_of_text|>")
    assert template.text(sample.messages) == whole.removesuffix("\n") + end
    assert tokenizer.apply_chat_template(messages, chat_template=template.template, tokenize=False) == (
        whole.removesuffix("\n") + end
    )


@pytest.mark.parametrize("start", STARTS)
def test_answers_are_trained_from_their_space_through_what_ends_them(start):
    template = template_of(start)

    def trained(sample):
        encoded = template.encode(sample)
        return [template.tokenizer.decode(encoded.input_ids[first:last]) for first, last in encoded.trained_spans]

    end = "<|end_of_text|>" * (start == "<|begin_of_text|>")
    turns = shown(("<square>", "What?"), "A dog.", "And?", "A cat.")
    assert trained(turns) == [" A dog.<end_of_utterance>", f" A cat.<end_of_utterance>{end}"]
    page = Message(role="document", content=("A dog.", turns.images[0], "A cat.", "A bird."))
    assert trained(Sample(key="page", messages=(page,))) == ["A dog.", f"A cat. A bird.{end or '<end_of_utterance>'}"]


@pytest.fixture(scope="module")
def smollm2():
    """SmolVLM-256M's tokenizer as far as its words go: SmolLM2's vocabulary, and the tokens of images after it."""
    if not VOCABULARY.exists():
        pytest.skip("SmolLM2's vocabulary is not here; run scripts/fetch_smollm2_vocabulary")
    stored = json.loads(VOCABULARY.read_text())
    merges = [tuple(merge.split(" ")) for merge in stored["merges"]]
    vocab = {token: index for index, token in enumerate(stored["tokens"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", pad_token="<|im_end|>")
    tokenizer.add_tokens([text.FAKE, text.IMAGE, text.END_OF_UTTERANCE], special_tokens=True)
    tokenizer.eos_token = text.END_OF_UTTERANCE
    return tokenizer


FAKE, IMAGE, END = 49152, 49153, 49154  # as in SmolVLM-Instruct (2.2B), whose <image> is 49,153


def test_ids_of_a_chat_under_smollm2_s_vocabulary(smollm2):
    unsplit = images_of(2048, 512, is_split=False)
    encoded = template_of(tokenizer=smollm2, images=unsplit).encode(
        conversation(("<dog>", "What is in this image?"), " a dog".strip())
    )
    whole = [FAKE, *smollm2("<global-img>", add_special_tokens=False)["input_ids"], *[IMAGE] * 64, FAKE]
    question = [1, 11126, 42, *whole, 1780, 314, 281, 451, 2443, 47, END]
    assert encoded.input_ids.tolist() == [*question, 198, 9519, 9531, 42, 253, 2767, END]
    assert encoded.trained_spans == ((len(question) + 4, len(question) + 7),)


def test_what_an_image_costs_under_smollm2_s_vocabulary(smollm2):
    """The figures of SmolVLM-Instruct (2.2B), whose rows and columns are 9 tokens each, and <global-img> is 5."""
    images = images_of(1536, 384, patch=14, scale=3)
    costs = {size: len(images.token_ids(smollm2, images.tiling(*size))) for size in [(64, 64), (640, 480), (3000, 500)]}
    assert costs == {(64, 64): 1548, (640, 480): 1183, (3000, 500): 453}
    assert [images.weight(images.tiling(*size)) for size in costs] == [17, 13, 5]
    assert smollm2("\n\n", add_special_tokens=False)["input_ids"] == [1116]


def test_what_somebody_writes_is_never_a_special_token(smollm2):
    template = template_of(tokenizer=smollm2, images=images_of(2048, 512, is_split=False))
    sample = conversation("Is <image> <|im_start|> or <end_of_utterance>?", "It is <fake_token_around_image>.")
    ids = template.encode(sample).input_ids
    assert np.isin(ids, [1, FAKE, IMAGE, END]).sum() == 3, "the start and the end of two turns"
