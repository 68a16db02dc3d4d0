"""Images and text of Idefics3 and SmolVLM, held against transformers' own processors and the real vocabularies."""

import json
import random

import numpy as np
import pytest
from build_smolvlm_256m import smollm2_tokenizer
from conftest import REPOSITORY, conversation
from helpers.tiled import GRID, batch_of, byte_tokenizer, shown
from PIL import Image, ImageDraw
from transformers import Idefics3Config, Idefics3Processor, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from sft.core.sample import Message, Sample
from sft.models.chat_template import ChatTemplate, load_chat_template
from sft.models.idefics3 import text
from sft.models.idefics3.images import TiledImages

CACHE = REPOSITORY / ".cache"
TURNS = (text.FAKE, text.IMAGE, text.END_OF_UTTERANCE)
"""All that Idefics3 and SmolVLM-Instruct (2.2B) add to their base vocabularies: rows and columns of tiles are text."""


def real_vocabulary(name):
    """The tokenizer of SmolVLM-Instruct or of Idefics3-8B, as far as its words go."""
    file = CACHE / {"smollm2": "smollm2/vocabulary.json", "llama3": "llama3/tokenizer.json"}[name]
    if not file.exists():
        pytest.skip(f"this vocabulary is not here; run scripts/fetch_vocabularies {name}")
    if name == "smollm2":
        stored = json.loads(file.read_text())
        return smollm2_tokenizer(stored["tokens"], stored["merges"], TURNS)
    start, end = "<|begin_of_text|>", "<|end_of_text|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token=start, eos_token=end, pad_token=end)
    tokenizer.add_tokens(list(TURNS), special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module")
def smollm2():
    return real_vocabulary("smollm2")


@pytest.fixture(scope="module")
def llama3():
    return real_vocabulary("llama3")


def images_of(longest_edge, tile, is_split=True, patch=16, scale=4, **options):
    """How images are cut; the shape of SmolVLM-256M if nothing else is said."""
    tower = {"image_size": tile, "patch_size": patch}
    config = Idefics3Config(text_config={"model_type": "llama"}, vision_config=tower, scale_factor=scale, **options)
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


@pytest.fixture(scope="module")
def tokenizer(request):
    if request.param in ("smollm2", "llama3"):
        return request.getfixturevalue(request.param)
    return byte_tokenizer(tags=(text.GLOBAL, *GRID) if request.param == "tags are tokens" else ())


@pytest.mark.parametrize(
    "images",
    [images_of(128, 32, patch=8, scale=2), images_of(89, 28, patch=7, scale=2), images_of(32, 32, patch=8, scale=2),
     images_of(128, 32, is_split=False, patch=8, scale=2)],
    ids=["4 x 4 tiles", "no whole number of tiles", "one tile", "not split"],
)  # fmt: skip
@pytest.mark.parametrize("tokenizer", ["tags are tokens", "tags are text", "smollm2", "llama3"], indirect=True)
def test_tokens_and_tiles_are_those_of_the_processor_for_1000_sizes(images, tokenizer):
    """250 sizes for each way to cut, 1,000 for each vocabulary."""
    rng, processor = random.Random(0), processor_of(images, tokenizer)
    for _ in range(250):
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


def test_ids_of_a_chat_under_llama_3_s_vocabulary(llama3):
    """Those of Idefics3-8B, whose extra tokens are the rows after 128,255."""
    images = images_of(1456, 364, is_split=False, patch=14, scale=2)
    encoded = template_of("<|begin_of_text|>", llama3, images).encode(
        conversation(("<dog>", "What is in this image?"), "a dog", "And this?", "A cat.")
    )
    whole = [128256, 27, 9951, 21743, 29, *[128257] * 169, 128256]  # the tag: < global -img >
    first = [128000, 1502, 25, *whole, 3923, 374, 304, 420, 2217, 30, 128258]
    second = [198, 72803, 25, 264, 5679, 128258, 198, 1502, 25, 1628, 420, 30, 128258]
    third = [198, 72803, 25, 362, 8415, 13, 128258, 128001]
    assert encoded.input_ids.tolist() == [*first, *second, *third]
    answers = [encoded.input_ids[start:end].tolist() for start, end in encoded.trained_spans]
    assert answers == [[264, 5679, 128258], [362, 8415, 13, 128258, 128001]]


def test_what_an_image_costs(smollm2, llama3):
    """Rows and columns are 9 tokens each in SmolVLM-Instruct (2.2B) and 8 in Idefics3-8B, <global-img> is 5 and 4."""
    sizes = [(64, 64), (640, 480), (480, 640), (3000, 500)]
    for tokenizer, images, expected, whole in (
        (smollm2, images_of(1536, 384, patch=14, scale=3), [1548, 1183, 1184, 453], 88),
        (llama3, images_of(1456, 364, patch=14, scale=2), [3027, 2314, 2315, 888], 175),
    ):
        assert [len(images.token_ids(tokenizer, images.tiling(*size))) for size in sizes] == expected
        assert [images.weight(images.tiling(*size)) for size in sizes] == [17, 13, 13, 5]
        assert len(images.token_ids(tokenizer, images.one_tile)) == whole
    assert [one("\n\n", add_special_tokens=False)["input_ids"] for one in (smollm2, llama3)] == [[1116], [271]]


ROWS = {
    "smollm2": ("<|im_start|>", [
        (1, 0), (11126, 0), (42, 0),  # <|im_start|> User :
        (FAKE, 0), (44, 0), (13906, 0), (29, 0), (6266, 0), (46, 0), *[(IMAGE, 0)] * 4, (FAKE, 0),  # < global - img >
        (1780, 0), (314, 0), (357, 0), (47, 0), (END, 0),  # What is it ? <end_of_utterance>
        (198, 0), (9519, 0), (9531, 0), (42, 0), (330, 1), (2767, 1), (30, 1), (END, 1),  # \n Ass istant : A dog .
    ]),
    "llama3": ("<|begin_of_text|>", [
        (128000, 0), (1502, 0), (25, 0),
        (128256, 0), (27, 0), (9951, 0), (21743, 0), (29, 0), *[(128257, 0)] * 4, (128256, 0),
        (3923, 0), (374, 0), (433, 0), (30, 0), (128258, 0),
        (198, 0), (72803, 0), (25, 0), (362, 1), (5679, 1), (13, 1), (128258, 1), (128001, 1),
    ]),
}  # fmt: skip
"""A conversation about an image of one tile and 4 states, token by token: the id, and whether it is of the answer."""


@pytest.mark.parametrize("vocabulary", ROWS)
def test_labels_token_by_token(vocabulary, request):
    """Answers alone, with what ends them; or every token but the first and those that images stand in place of."""
    start, row = ROWS[vocabulary]
    tokenizer = request.getfixturevalue(vocabulary)
    image = tokenizer.convert_tokens_to_ids(text.IMAGE)
    template = template_of(start, tokenizer, images_of(32, 32, patch=8, scale=2, image_token_id=image))
    sample = shown(("<square>", "What is it?"), "A dog.")
    answers, everything = (batch_of(template, [sample], train_on=train_on) for train_on in ("assistant", "all"))
    ids = [token for token, _ in row]
    assert answers.input_ids_T.tolist() == everything.input_ids_T.tolist() == ids
    assert answers.labels_T.tolist() == [token if is_answer else -100 for token, is_answer in row]
    assert everything.labels_T.tolist() == [-100, *(-100 if token == image else token for token in ids[1:])]
    assert answers.num_trained_tokens == sum(is_answer for _, is_answer in row)


def test_what_somebody_writes_is_never_a_special_token(smollm2):
    template = template_of(tokenizer=smollm2, images=images_of(2048, 512, is_split=False))
    sample = conversation("Is <image> <|im_start|> or <end_of_utterance>?", "It is <fake_token_around_image>.")
    ids = template.encode(sample).input_ids
    assert np.isin(ids, [1, FAKE, IMAGE, END]).sum() == 3, "the start and the end of two turns"
