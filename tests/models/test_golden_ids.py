"""The ids that idefics-9b-instruct was trained with, under the real LLaMA-1 vocabulary (transformers#28591)."""

import copy
import json
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY, TOY_IMAGES, conversation
from helpers.golden_ids import A_DOG, ASSISTANT, CHAT_IDS
from helpers.pieces import legacy_tokenizer
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sft.checks.model import check_tokens
from sft.checks.subject import Subject
from sft.core.errors import UserError
from sft.models.chat_template import ChatTemplate, load_chat_template
from sft.models.idefics.family import FAMILY
from sft.models.idefics.text import CHAT_TEMPLATE, EXTRA_TOKENS, load_tokenizer

VOCABULARY = REPOSITORY / ".cache" / "llama-tokenizer-js" / "llama-tokenizer.js"

# "What is in this image?" <fake> <image> <fake>, as the released processor of transformers 4.36 gave it
PROMPT = "<s>User: What is in this image?<fake_token_around_image><image><fake_token_around_image>"
PROMPT_IDS = [1, 4911, 29901, 1724, 338, 297, 445, 1967, 29973, 32000, 32001, 32000]

TURNS = conversation(("<dog>", "Describe this image."), "A dog.", "What is it?", "A dog.").messages


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of idefics-9b-instruct, from the files of llama-tokenizer-js."""
    tokenizer = legacy_tokenizer(VOCABULARY, "llama_")
    tokenizer.add_tokens(list(EXTRA_TOKENS), special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module")
def llama() -> PreTrainedTokenizerFast:
    if not VOCABULARY.exists():
        pytest.skip("the LLaMA-1 vocabulary is not here; run scripts/fetch_vocabularies llama")
    return llama_tokenizer()


@pytest.fixture(scope="module")
def saved(llama, tmp_path_factory):
    """A model folder as far as a tokenizer can tell."""
    folder = tmp_path_factory.mktemp("golden")
    llama.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "idefics", "vocab_size": 32000}))
    return folder


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def chat_template(tokenizer):
    return ChatTemplate(load_chat_template(REPOSITORY / "chat_templates" / CHAT_TEMPLATE), tokenizer, TOY_IMAGES)


def test_extra_tokens_follow_the_base_vocabulary(llama):
    assert llama.convert_tokens_to_ids(list(EXTRA_TOKENS)) == [32000, 32001, 32002]


def test_the_published_prompt(llama):
    assert ids_of(llama, PROMPT) == PROMPT_IDS
    prompt = conversation(("What is in this image?", "<dog>")).messages
    assert chat_template(llama).encode_prompt(prompt).input_ids.tolist() == [*PROMPT_IDS, 32002, *ASSISTANT]


def test_the_whole_chat(llama):
    template = chat_template(llama)
    assert template.encode_prompt(TURNS[:3]).input_ids.tolist() == CHAT_IDS
    sample = conversation(("<dog>", "Describe this image."), "A dog.", "What is it?", "A dog.")
    encoded = template.encode(sample)
    assert encoded.input_ids.tolist() == [*CHAT_IDS, *A_DOG, 2]
    first = CHAT_IDS.index(319)
    assert encoded.trained_spans == ((first, first + 4), (len(CHAT_IDS), len(CHAT_IDS) + 5))
    assert encoded.image_positions == (4,)


def test_the_card_s_letters_are_one_token_each_also_before_their_full_stop(llama):
    """MMBench is asked by them: a letter needs no forward of its own, and leaving its `.` out changes nothing of it."""
    template = chat_template(llama)
    asked = conversation(("<dog>", "Correct answer: ")).messages
    prompt = template.encode_prompt(asked).input_ids.tolist()
    assert prompt[-8:] == [29901, 29871, 32002, *ASSISTANT]
    for letter, token_id in zip("ABCD", (319, 350, 315, 360), strict=True):
        for answer in (letter, f"{letter}."):
            encoded, (start, _) = template.encode_answer(asked, answer)
            assert encoded.input_ids[: start + 1].tolist() == [*prompt, token_id]


@pytest.mark.parametrize("load", [load_tokenizer, AutoTokenizer.from_pretrained])
def test_a_saved_tokenizer_keeps_the_ids(saved, load):
    tokenizer = load(saved)
    assert ids_of(tokenizer, PROMPT) == PROMPT_IDS
    assert chat_template(tokenizer).encode_prompt(TURNS[:3]).input_ids.tolist() == CHAT_IDS


def test_a_tokenizer_of_another_vocabulary_is_refused(saved, tmp_path):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "idefics", "vocab_size": 32001}))
    with pytest.raises(UserError, match=r"with this model's vocabulary they are .*'<image>': 32002"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_legacy_rules_is_refused(saved, tmp_path):
    """transformers 5 would load such a folder without a word, and give other ids than the model was trained with."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rules = json.loads((tmp_path / "tokenizer.json").read_text())
    rules["normalizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(UserError, match="legacy LLaMA rules"):
        load_tokenizer(tmp_path)


def test_the_check_of_doctor_and_of_every_training_tells_them_from_drifted_ones(llama):
    config = SimpleNamespace(config=SimpleNamespace(vocab_size=32000, additional_vocab_size=3))
    assert check_tokens(Subject(FAMILY, config, chat_template(llama), "float32")).result == "ok"
    drifted = copy.deepcopy(llama)
    drifted.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")  # no "▁" in front
    finding = check_tokens(Subject(FAMILY, config, chat_template(drifted), "float32"))
    assert (finding.result, finding.of_input) == ("failed", True)
    assert finding.found.startswith("[2659, 29901, 32000] ['User', ':', '<fake_token_around_image>'] at 1 of a chat")
