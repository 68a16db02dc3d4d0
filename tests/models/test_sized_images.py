"""Images and text of Idefics2, held against transformers' own processor and Mistral's real vocabulary."""

import random

import numpy as np
import pytest
from conftest import REPOSITORY, base_tokenizer, conversation
from helpers.pieces import legacy_tokenizer
from helpers.tiled import piece_tokenizer, shown, tiny_config
from PIL import Image
from test_tiled_images import CHATS, PUBLISHED, as_content, pictures
from tokenizers import pre_tokenizers
from transformers import Idefics2Processor
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

from sft.core.errors import UserError
from sft.core.sample import Message, Sample
from sft.models.chat_template import ChatTemplate, load_chat_template
from sft.models.idefics2 import text
from sft.models.idefics2.images import SizedImages

VOCABULARY = REPOSITORY / ".cache" / "mistral" / "mistral-tokenizer.js"
EXTRA = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]


def images_of(longest=980, shortest=378, is_split=True, latents=64, patch=14):
    """How images are cut; as in Idefics2-8b if nothing else is said."""
    config = tiny_config(piece_tokenizer(), "idefics2")
    config.vision_config.patch_size, config.perceiver_config.resampler_n_latents = patch, latents
    size = {"longest_edge": longest, "shortest_edge": shortest}
    config.preprocessor = {"size": size, "do_image_splitting": is_split}
    return SizedImages(config)


def processor_of(images, tokenizer):
    size = {"longest_edge": images.sizes.longest_edge, "shortest_edge": images.sizes.shortest_edge}
    processor = Idefics2ImageProcessorPil(
        size=size, do_image_splitting=images.sizes.is_split, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return Idefics2Processor(processor, tokenizer, image_seq_len=images.states_per_tile)


def random_size(rng):
    """Any size up to 200 pixels, or one of an extreme aspect. Of halves of one pixel the processor makes nothing."""
    short, long = rng.randint(2, 9), rng.randint(100, 600)
    return rng.choice([(rng.randint(2, 200), rng.randint(2, 200)), (short, long), (long, short)])


@pytest.mark.parametrize("is_split", [True, False])
@pytest.mark.parametrize("edges", [(56, 20), (31, 14)])
def test_tokens_and_tiles_are_those_of_the_processor_for_1000_sizes(is_split, edges):
    tokenizer, rng, images = (
        piece_tokenizer(),
        random.Random(0),
        images_of(*edges, is_split=is_split, latents=9, patch=7),
    )
    processor = processor_of(images, tokenizer)
    for _ in range(250):
        width, height = random_size(rng)
        expected = processor(
            text="<image><image>", images=[Image.new("RGB", (width, height))] * 2, add_special_tokens=False
        )
        tiling = images.tiling(width, height)
        ids = images.token_ids(tokenizer, tiling)
        assert ids + ids[1:] == list(expected["input_ids"][0]), "adjacent images share a marker"
        mask = np.asarray(expected["pixel_attention_mask"])[0, : tiling.num_tiles]
        assert [(int(tile[:, 0].sum()), int(tile[0].sum())) for tile in mask] == [*tiling.tile_sizes], (width, height)
        assert images.weight(tiling) == sum(tile[6::7, 6::7].sum() for tile in mask)


@pytest.mark.parametrize("images", [images_of(196, 76), images_of(196, 76, is_split=False)], ids=["split", "whole"])
def test_pixels_are_those_of_the_processor_within_two_of_255(images):
    processor = processor_of(images, piece_tokenizer()).image_processor
    for name, pixels in pictures().items():
        height, width, _ = pixels.shape
        made = processor([[Image.fromarray(pixels)]], return_tensors="np")
        tiling = images.tiling(width, height)
        own = images.cut(pixels, tiling)
        for tile, (height, width), expected in zip(own, tiling.tile_sizes, made["pixel_values"][0], strict=True):
            shown = np.rint((expected[:, :height, :width] + 1) * 127.5)
            apart = np.abs(tile[:, :height, :width].astype(int) - shown.astype(int))
            assert apart.max() <= 2 and apart.mean() <= 0.05, name
            assert not tile[:, height:].any() and not tile[:, :, width:].any()


def test_an_edge_of_one_pixel_is_split_as_well():
    images = images_of(98, 37)
    assert images.cut(np.full((1, 3, 3), 9, np.uint8), images.tiling(3, 1)).min() == 9


def test_a_shortest_edge_over_the_longest_is_refused():
    with pytest.raises(UserError, match=r"preprocessor_config\.json: shortest_edge 378 is over longest_edge 98"):
        images_of(98).tiling(9, 9)


# ------------------------------------------------------------------------------------------------------------- text


def template_of(tokenizer, images):
    return ChatTemplate(load_chat_template(REPOSITORY / "chat_templates" / text.CHAT_TEMPLATE), tokenizer, images)


@pytest.mark.parametrize("sample", CHATS, ids=["images and a system text", "text", "image last"])
def test_a_prompt_is_the_published_string(sample):
    """`<s>` is printed here, where the published template leaves it to the tokenizer."""
    tokenizer, messages = piece_tokenizer(), as_content(sample.messages)
    template = template_of(tokenizer, images_of())
    prompt = tokenizer.apply_chat_template(
        messages[:-1], chat_template=PUBLISHED, tokenize=False, add_generation_prompt=True
    )
    assert template.text(sample.messages[:-1], add_generation_prompt=True) == "<s>" + prompt
    whole = tokenizer.apply_chat_template(messages, chat_template=PUBLISHED, tokenize=False)
    assert template.text(sample.messages) == "<s>" + whole.removesuffix("\n") + "</s>"


def test_answers_are_trained_from_their_space_through_what_ends_them():
    template = template_of(piece_tokenizer(), images_of(latents=4))

    def trained(sample):
        encoded = template.encode(sample)
        return [template.tokenizer.decode(encoded.input_ids[first:last]) for first, last in encoded.trained_spans]

    turns = shown(("<square>", "What?"), "A dog.", "And?", "A cat.")
    assert trained(turns) == ["A dog.<end_of_utterance>", "A cat.<end_of_utterance></s>"]
    page = Message(role="document", content=("A dog.", turns.images[0], turns.images[0], "A cat.", "A bird."))
    assert trained(Sample(key="page", messages=(page,))) == ["A dog.", "A cat. A bird.</s>"]


@pytest.fixture(scope="module")
def mistral():
    """Idefics2-8b's tokenizer as far as its words go."""
    if not VOCABULARY.exists():
        pytest.skip("Mistral's vocabulary is not here; run scripts/fetch_vocabularies mistral")
    tokenizer = legacy_tokenizer(VOCABULARY)
    tokenizer.add_tokens(EXTRA, special_tokens=True)
    return tokenizer


F, IMAGE, END = 32000, 32001, 32002
WHOLE = [F, *[IMAGE] * 64, F]
TURN = [28705, 13]  # "▁" and the line break


def test_ids_of_a_chat_under_mistral_s_vocabulary(mistral):
    """Those of words are mistral-tokenizer-js's for each run between two special tokens."""
    chat = shown(("<square>", "Describe this image."), "A dog.", "What is it?", "A dog.")
    template = template_of(mistral, images_of(is_split=False))
    encoded = template.encode(chat)
    question = [1, 1247, 28747, *WHOLE, 27984, 456, 3469, 28723, END]
    answer = [*TURN, 7226, 11143, 28747, 330, 3914, 28723, END]
    assert encoded.input_ids.tolist() == [*question, *answer, *TURN, 730, 28747, 1824, 349, 378, 28804, END, *answer, 2]
    first = len(question) + 5
    assert encoded.trained_spans[0] == (first, first + 4) and encoded.image_positions == (3,)
    assert text.wrong_with_tokens(mistral, encoded.input_ids, template.text(chat.messages)) == ""


def test_a_word_after_an_image_has_the_ids_of_the_processor(mistral):
    """transformers 5 builds a tokenizer that puts "▁" before the first word only, and its processor a space after the
    marker: the same ids as by the legacy rules, which put "▁" before each run."""
    images = images_of(98, 37, latents=3)
    template = template_of(mistral, images)
    rebuilt = legacy_tokenizer(VOCABULARY)
    rebuilt.backend_tokenizer.normalizer = None
    rebuilt.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    rebuilt.add_tokens(EXTRA, special_tokens=True)
    picture = Image.new("RGB", (50, 40))
    expected = processor_of(images, rebuilt)(
        text="<s>User:<image>what is<image><image>it?<end_of_utterance>", images=[picture] * 3, add_special_tokens=False
    )
    square = shown("<square>", "").images[0]
    own = template.encode_prompt([Message(role="user", content=(square, "what is", square, square, "it?"))])
    found = own.input_ids.tolist()
    assert found[: found.index(END) + 1][3:] == list(expected["input_ids"][0])[3:]


def test_a_base_may_be_without_an_end_of_turns_and_not_without_legacy_rules(tmp_path):
    rebuilt = base_tokenizer()
    rebuilt.add_tokens(EXTRA[:2], special_tokens=True)
    rebuilt.save_pretrained(tmp_path)
    assert text.load_tokenizer(tmp_path).convert_tokens_to_ids("<end_of_utterance>") == 402, "the next row"
    rebuilt.backend_tokenizer.normalizer = None
    rebuilt.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="Idefics2 needs legacy rules"):
        text.load_tokenizer(tmp_path)


def test_what_somebody_writes_is_never_a_special_token(mistral):
    template = template_of(mistral, images_of())
    sample = conversation("Is <image> <s> or <end_of_utterance>?", "It is <fake_token_around_image>.")
    assert np.isin(template.encode(sample).input_ids, [1, 2, F, IMAGE, END]).sum() == 4, "two ends of turns and of all"
