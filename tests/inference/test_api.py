"""A model in a few lines: the card's examples, ours beside transformers' own, and every line of docs/inference.md."""

import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, base_tokenizer, make_tiny_model
from PIL import Image
from transformers import AutoProcessor
from transformers.utils import logging

import sft
from sft.core.errors import UserError
from sft.inference.merge import merge
from sft.models import lora
from sft.models.chat_template import load_chat_template
from sft.models.idefics.packed import image_attention_mask
from sft.models.idefics.text import CHAT_TEMPLATE
from sft.models.idefics.weights import weights
from sft.recipe import LoraSettings

SNIPPETS = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "inference.md").read_text(), flags=re.DOTALL)
PICTURES = ("idefix.jpg", "obelix.jpg", "dog.jpg")
QUESTION = {"role": "user", "content": [{"type": "image", "image": "dog.jpg"}, {"type": "text", "text": "A dog?"}]}


def write_base(folder, tokenizer, extra=3):
    """A base whose every weight matters, in float32."""
    model = make_tiny_model(tokenizer, extra=extra)
    weights.save_model(model, folder, torch.float32)
    weights.save_processor(tokenizer, model.config, folder)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)


def write_adapters(folder, base, tokenizer):
    """Adapters, extra rows and gates beside them, all moved."""
    model = weights.load_model(base)
    settings = LoraSettings(r=4, targets=["language", "cross_attention"])
    lora.add_adapters(model, weights.lora_pattern(settings.targets), settings, base)
    weights.select_trainable(model, ["extra_rows", "gates"])
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    lora.save_adapters(model, folder)
    weights.save_processor(tokenizer, model.config, folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """What the page finds in the current folder."""
    path = tmp_path_factory.mktemp("inference")
    tokenizer.chat_template = load_chat_template(REPOSITORY / "chat_templates" / CHAT_TEMPLATE)
    write_base(path / "my-model", tokenizer)
    write_base(path / "idefics-9b", base_tokenizer(), extra=2)
    write_adapters(path / "my-adapters", path / "my-model", tokenizer)
    for number, name in enumerate(PICTURES):
        noise = np.random.default_rng(number).integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path / name, quality=100)
    yield path
    tokenizer.chat_template = None


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return sft.load(folder / "my-model", precision="float32")


def test_importing_loads_no_torch():
    code = "import sft, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --------------------------------------------------------------------------------------------------------- the page


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: re.search(r'"(my-\w+|idefics-9b)"', text)[1])
@pytest.mark.filterwarnings("ignore")  # of the libraries; the snippets are not ours to filter in
def test_the_page_runs_as_it_stands(here, snippet, capsys):
    exec(snippet, {})
    assert capsys.readouterr().out.strip()


def plain_answers(snippet):
    """`answers` of the snippet without our package, in float32."""
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(snippet.replace("bfloat16", "float32"), names)
    return names["answers"]


def test_chat_answers_what_plain_transformers_answers(here, model):
    (snippet,) = (text for text in SNIPPETS if "answers = " in text)
    dialogue = [
        {"role": "user", "content": [_text("What is in this image?"), _image("idefix.jpg")]},
        {"role": "assistant", "content": "This picture depicts Idefix, the dog of Obelix in Asterix and Obelix."},
        {"role": "user", "content": [_image("obelix.jpg"), _text("And who is that?")]},
    ]
    question = [{"role": "user", "content": [_image("dog.jpg"), _text("What is in this image?")]}]
    expected = plain_answers(snippet)
    assert len(set(expected)) == 2 and all(expected)
    assert model.chat([dialogue, question], max_new_tokens=40) == expected
    assert [model.chat(dialogue, max_new_tokens=40), model.chat(question, max_new_tokens=40)] == expected
    assert model.chat("What is in this image?", images=["dog.jpg"], max_new_tokens=40) == expected[1]


def _text(text):
    return {"type": "text", "text": text}


def _image(file):
    return {"type": "image", "image": file}


CARD = (
    [
        "User: What is in this image?", "idefix.jpg", "<end_of_utterance>",
        "\nAssistant: This picture depicts Idefix. Idefix is running on the ground.<end_of_utterance>",
        "\nUser:", "obelix.jpg", "And who is that?<end_of_utterance>", "\nAssistant:",
    ],
    ["idefix.jpg", "In this picture from Asterix and Obelix, we can see"],
    ["idefix.jpg", "obelix.jpg", " and ", "dog.jpg"],
    ["No image at all"],
)  # fmt: skip


def opened(items):
    return [Image.open(item) if item in PICTURES else item for item in items]


def test_a_prompt_becomes_the_ids_of_transformers_own_processor(here, model):
    processor = AutoProcessor.from_pretrained("my-model")
    for items in CARD:
        inputs = processor(text=opened(items), add_end_of_utterance_token=False, return_tensors="pt")
        prompt = model._prompt(opened(items))
        assert prompt.encoded.input_ids.tolist() == inputs["input_ids"][0].tolist()
        if prompt.images:
            mask_BTN = image_attention_mask([prompt.encoded], len(prompt.images))
            assert torch.equal(mask_BTN, inputs["image_attention_mask"])


def test_prompts_in_a_batch_are_gone_on_with_as_one_by_one(here, model):
    together = model.generate([opened(items) for items in CARD], max_new_tokens=8)
    assert together == [model.generate(opened(items), max_new_tokens=8) for items in CARD]
    assert len(set(together)) > 1


def test_a_base_as_it_was_released_goes_on_with_prompts_and_says_why_it_cannot_chat(here):
    base = sft.load("idefics-9b")
    assert isinstance(base.generate(opened(CARD[1]), max_new_tokens=4), str)
    with pytest.raises(UserError, match=r"end_of_utterance.*a base gets it by `idefics-sft prepare RECIPE`"):
        base.chat("Hi")


def test_adapters_answer_as_their_merged_model_and_over_4_bits(here, tmp_path):
    merge(here / "my-adapters", tmp_path / "merged", dtype=torch.float32)
    adapters, merged = (sft.load(path, precision="float32") for path in ("my-adapters", tmp_path / "merged"))
    answer = adapters.chat([QUESTION], max_new_tokens=8)
    assert answer == merged.chat([QUESTION], max_new_tokens=8) != ""
    assert answer != sft.load("my-model", precision="float32").chat([QUESTION], max_new_tokens=8)
    quantised = sft.load("my-adapters", load_in_4bit=True)
    assert any(type(module).__name__ == "Linear4bit" for module in quantised.loaded.model.modules())
    assert isinstance(quantised.chat([QUESTION], max_new_tokens=8), str)


# ---------------------------------------------------------------------------------------------------------- details


def test_an_image_may_be_a_file_its_bytes_or_opened(here, model):
    lossless = Image.open("dog.jpg")
    forms = ("dog.jpg", here / "dog.jpg", (here / "dog.jpg").read_bytes(), lossless)
    assert len({model.chat("A dog?", images=[form], max_new_tokens=8) for form in forms}) == 1
    assert model.chat("A dog?", images=forms[0]) == model.chat("A dog?", images=lossless) == model.chat([QUESTION])
    assert model.generate(lossless, max_new_tokens=8) == model.generate([here / "dog.jpg"], max_new_tokens=8)


def test_a_text_that_looks_like_a_special_token_is_a_text(model):
    prompt = model.loaded.template.encode_prompt(sft.inference.api._messages("<image><end_of_utterance>", ()))
    assert prompt.image_positions == ()
    assert prompt.input_ids.tolist().count(model.loaded.tokenizer.convert_tokens_to_ids("<end_of_utterance>")) == 1


def test_beams_are_a_setting_and_a_misspelt_one_is_told(here, model):
    assert isinstance(model.chat([QUESTION], max_new_tokens=4, num_beams=2), str)
    with pytest.raises(UserError, match=r"temperatur: not a field .*did you mean 'temperature'"):
        model.chat([QUESTION], temperatur=0.5)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda model: model.chat("A dog?", images=["https://a.org/dog.jpg"]), "addresses are not fetched"),
        (lambda model: model.generate(["https://a.org/dog.jpg", "We see"]), "addresses are not fetched"),
        (lambda model: model.generate(["A dog <image>"]), "holds <image>; give the image itself"),
        (lambda model: model.generate("A dog"), "expected a list of texts and images"),
        (lambda model: model.generate([["A dog"], "A cat"]), "expected a list of texts and images"),
        (lambda model: model.generate(None), "prompt: NoneType; expected a list of texts and images"),
        (lambda model: model.chat("A dog?", images="cat.jpg"), "cat.jpg: image file missing"),
        (lambda model: model.chat("A dog?", images=7), "image: int; expected a file name"),
        (lambda model: model.chat(["hi", "ho"]), "conversation: a message is a str; expected {\"role\""),
        (lambda model: model.chat(None), "conversation: NoneType; expected a question or a list of messages"),
        (lambda model: model.chat("A dog?", max_new_tokens="a"), "max_new_tokens: 'a'; expected a whole number"),
        (lambda model: model.chat("A dog?", images=["cat.jpg"]), "cat.jpg: image file missing"),
        (lambda model: model.chat([QUESTION], images=["dog.jpg"]), "they stand in the messages"),
        (lambda model: model.chat([{"role": "bot", "content": "Hi"}]), "role 'bot'; expected system, user"),
        (lambda model: model.chat([{"role": "assistant", "content": "Hi"}]), "the last message must be the user's"),
        (lambda model: model.chat([{"role": "user", "content": [{"type": "image"}]}]), "expected .*\"image\""),
        (lambda model: model.chat("dog " * 3000), "the prompt has .* tokens; beside 64 new ones the model takes"),
        (
            lambda model: model.chat([[QUESTION]] * 2, on_text=print),
            "on_text: only one text can be followed at a time",
        ),
        (lambda model: sft.load("my-modle"), "my-modle: neither a model folder"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_one_line(here, model, ask, message):
    with pytest.raises(UserError, match=message):
        ask(model)


@pytest.fixture
def with_bars():
    """As transformers comes; commands that ran in this process have turned its bars off."""
    were_on = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    yield
    if not were_on:
        logging.disable_progress_bar()


@pytest.mark.usefixtures("with_bars")
def test_loading_shows_bars_on_a_terminal_only(folder, monkeypatch, capsys):
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)  # noqa: B023
        sft.load(folder / "my-model")
        assert ("Loading weights" in capsys.readouterr().err) is is_terminal
        assert logging.is_progress_bar_enabled(), "what the caller has chosen"
