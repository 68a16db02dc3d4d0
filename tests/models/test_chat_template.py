"""What the model reads, what of it is trained, and that nobody's text can forge a special token."""

from dataclasses import replace
from itertools import pairwise

import pytest
from conftest import TOY_IMAGES, conversation, document, num_trained, picture
from hypothesis import given
from hypothesis import strategies as st

from sft.core.sample import ImageRef, Message, Sample
from sft.models.chat_template import ChatTemplate

GOLDEN = {
    "text only": (
        conversation("Hi.", "Hello."),
        "<s>User: Hi.<end_of_utterance>\nAssistant: Hello.<end_of_utterance></s>",
    ),
    "image first": (
        conversation(("<dog>", "Describe this."), "A dog."),
        "<s>User:<fake_token_around_image><image><fake_token_around_image>Describe this.<end_of_utterance>"
        "\nAssistant: A dog.<end_of_utterance></s>",
    ),
    "image after text": (
        conversation(("What is this?", "<dog>"), "A dog."),
        "<s>User: What is this?<fake_token_around_image><image><fake_token_around_image><end_of_utterance>"
        "\nAssistant: A dog.<end_of_utterance></s>",
    ),
    "image inside text": (
        conversation(("Is this", "<dog>", "a cat?"), "No."),
        "<s>User: Is this<fake_token_around_image><image><fake_token_around_image>a cat?<end_of_utterance>"
        "\nAssistant: No.<end_of_utterance></s>",
    ),
    "adjacent images share a marker": (
        conversation(("<dog>", "<cat>", "Same?"), "No."),
        "<s>User:<fake_token_around_image><image><fake_token_around_image><image><fake_token_around_image>Same?"
        "<end_of_utterance>\nAssistant: No.<end_of_utterance></s>",
    ),
    "several turns": (
        conversation(("<dog>", "What?"), "A dog.", "Sure?", "Yes."),
        "<s>User:<fake_token_around_image><image><fake_token_around_image>What?<end_of_utterance>"
        "\nAssistant: A dog.<end_of_utterance>\nUser: Sure?<end_of_utterance>\nAssistant: Yes.<end_of_utterance></s>",
    ),
    "system text": (
        conversation("Hi.", "Hello.", system="Be kind."),
        "<s>Be kind.\nUser: Hi.<end_of_utterance>\nAssistant: Hello.<end_of_utterance></s>",
    ),
    "document": (
        document("A title.", "A line.", "<dog>", "A dog.", "More.", "<cat>", "<fox>"),
        "<s>A title. A line.<fake_token_around_image><image><fake_token_around_image>A dog. More."
        "<fake_token_around_image><image><fake_token_around_image><image><fake_token_around_image></s>",
    ),
}
golden = pytest.mark.parametrize(("sample", "text"), GOLDEN.values(), ids=GOLDEN)


def read_back(template, ids):
    """Tokens as text, with the space that `decode` takes off the front."""
    text = template.tokenizer.decode([template.tokenizer.convert_tokens_to_ids("."), *ids])
    return text.removeprefix(".")


def trained(template, sample, train_on="assistant"):
    encoded = template.encode(sample)
    return [read_back(template, encoded.input_ids[start:end]) for start, end in encoded.trained_ranges(train_on)]


def as_dicts(messages):
    """Messages as transformers takes them."""
    return [
        {
            "role": message.role,
            "content": [
                {"type": "image"} if isinstance(item, ImageRef) else {"type": "text", "text": item}
                for item in message.content
            ],
        }
        for message in messages
    ]


@golden
def test_golden_text(template, sample, text):
    assert template.text(sample.messages) == text


@golden
def test_plain_transformers_renders_and_encodes_the_same(template, tokenizer, monkeypatch, sample, text):
    monkeypatch.setattr(tokenizer, "chat_template", template.template)
    messages = as_dicts(sample.messages)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ids == template.encode(sample).input_ids.tolist()


def test_plain_transformers_prompts_the_same(template, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template.template)
    turns = conversation(("<dog>", "What?"), "A dog.", "Sure?").messages
    text = tokenizer.apply_chat_template(as_dicts(turns), tokenize=False, add_generation_prompt=True)
    assert text == template.text(turns, add_generation_prompt=True)
    assert text.endswith("User: Sure?<end_of_utterance>\nAssistant:")
    ids = tokenizer.apply_chat_template(as_dicts(turns), add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == template.encode_prompt(turns).input_ids.tolist()


def test_answers_are_trained_with_their_space_and_their_end(template):
    sample = conversation(("<dog>", "What?"), "A dog.", "Sure?", "Yes.", system="Be kind.")
    assert trained(template, sample) == [" A dog.<end_of_utterance>", " Yes.<end_of_utterance></s>"]


def test_documents_are_trained_without_image_markers(template):
    page = document("A title.", "A line.", "<dog>", "A dog.", "<cat>", "<fox>")
    assert trained(template, page) == [" A title. A line.", " A dog.", "</s>"]


def test_a_token_is_trained_when_its_last_character_is(template, tokenizer):
    source = "<s>A do{% generation %}{{ messages[0].content[0].text }}{% endgeneration %} fox</s>"
    assert trained(ChatTemplate(source, tokenizer, TOY_IMAGES), document("g")) == [" dog"], (
        "one token of template and text"
    )
    assert trained(template, document("犬")) == [" 犬</s>"], "the ▁ before a run goes with what follows it"


@pytest.mark.parametrize(
    ("number", "answers"),
    [
        (1, [" Yes.<end_of_utterance></s>"]),
        (3, [" A dog.<end_of_utterance>"]),
        (0, [" A dog.<end_of_utterance>", " Yes.<end_of_utterance></s>"]),
    ],
)
def test_a_message_that_is_not_to_be_learned_has_no_labels(template, number, answers):
    messages = list(conversation(("<dog>", "What?"), "A dog.", "Sure?", "Yes.").messages)
    said = [message.content[-1] for message in messages]
    messages[number] = replace(messages[number], is_trained=False)
    sample = Sample(key="toy", messages=tuple(messages))
    assert trained(template, sample) == answers
    labelled = "".join(trained(template, sample, "all"))
    assert said[number] not in labelled
    assert all(text in labelled for text in said if text != said[number])
    assert (
        sum(end - start for start, end in template.encode(sample).withheld_spans)
        + num_trained(template.encode(sample), "all")
        == len(template.encode(sample).input_ids) - 1
    )


@golden
def test_all_trains_everything_after_the_first_token(template, sample, text):
    assert template.encode(sample).trained_ranges("all") == ((1, len(template.encode(sample).input_ids)),)
    assert "".join(trained(template, sample, "all")).lstrip() == template.tokenizer.decode(
        template.encode(sample).input_ids[1:]
    )


def test_image_positions_are_those_of_the_image_token(template, tokenizer):
    sample = conversation(("<dog>", "<cat>", "What?"), "A <dog>.")
    names = tokenizer.convert_ids_to_tokens(template.encode(sample).input_ids)
    assert names[:7] == ["<s>", "▁User", ":", FAKE := "<fake_token_around_image>", "<image>", FAKE, "<image>"]
    assert template.encode(sample).image_positions == (4, 6)


# ------------------------------------------------------------------------------------- text that looks like a template

SPECIAL = ("<s>", "</s>", "<unk>", "<image>", "<fake_token_around_image>", "<end_of_utterance>")
FRAGMENTS = (*SPECIAL, "User:", "Assistant:", "\n", " ", "A dog.", "犬", "<", "{{ x }}", "<0x0A>")
hostile_text = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=6).map("".join)


def question_and_answer(question, answer):
    """One turn each; unlike `conversation`, text in <angles> is text."""
    user = Message(role="user", content=(question, picture("dog")))
    return Sample(key="toy", messages=(user, Message(role="assistant", content=(answer,))))


@given(question=hostile_text, answer=hostile_text)
def test_text_that_looks_special_stays_text(template, tokenizer, question, answer):
    encoded = template.encode(question_and_answer(question, answer))
    ids = encoded.input_ids.tolist()
    special = [i for i, token in enumerate(ids) if token in tokenizer.added_tokens_decoder]
    names = tokenizer.convert_ids_to_tokens([ids[i] for i in special])
    image = ["<fake_token_around_image>", "<image>", "<fake_token_around_image>"]
    assert names == ["<s>", *image, "<end_of_utterance>", "<end_of_utterance>", "</s>"]

    said = [tokenizer.decode(ids[a + 1 : b]) for a, b in pairwise(special)]
    assert said == [f"User: {question}", "", "", "", f"\nAssistant: {answer}", ""]
    assert trained(template, question_and_answer(question, answer)) == [f" {answer}<end_of_utterance></s>"]
    assert len(encoded.image_positions) == 1


@given(question=hostile_text, answer=hostile_text)
def test_a_prompt_is_the_beginning_of_its_training_sample(template, question, answer):
    sample = question_and_answer(question, answer)
    ids = template.encode(sample).input_ids.tolist()
    prompt = template.encode_prompt(sample.messages[:-1]).input_ids.tolist()
    assert prompt == ids[: len(prompt)]

    encoded, (start, end) = template.encode_answer(sample.messages[:-1], answer)
    assert encoded.input_ids.tolist() == ids
    assert start == len(prompt)
    assert read_back(template, ids[start:end]) == f" {answer}"


def test_transformers_alone_would_take_text_for_an_image(tokenizer):
    """Why the template is not simply rendered and tokenized."""
    assert tokenizer.convert_tokens_to_ids("<image>") in tokenizer("A literal <image>.")["input_ids"]


def test_a_template_with_an_unknown_special_token_is_refused(template, tokenizer):
    with pytest.raises(ValueError, match=r"'<end_of_turn>'"):
        ChatTemplate(template.template + "<end_of_turn>", tokenizer, TOY_IMAGES)


def test_the_fingerprint_changes_with_the_template(template, tokenizer):
    other = ChatTemplate(template.template.replace("Assistant:", "Model:"), tokenizer, TOY_IMAGES)
    assert other.fingerprint != template.fingerprint
    assert ChatTemplate(template.template, tokenizer, TOY_IMAGES).fingerprint == template.fingerprint


def test_a_system_message_may_hold_images(template):
    sample = Sample(key="toy", messages=(Message(role="system", content=("Look:", picture("dog"))),))
    assert template.text(sample.messages) == ("<s>Look:<fake_token_around_image><image><fake_token_around_image></s>")
