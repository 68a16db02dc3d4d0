"""Batched generation: equal to one conversation at a time, and to argmax over the packed forward."""

import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE, image_number, picture, pixels_of, toy_images

from sft.batches.collate import collate
from sft.core.sample import EncodedSample, Message, PlacedSample
from sft.inference.generate import generate, prompt_of
from sft.models.idefics.packed import image_attention_mask
from sft.models.idefics.text import END_OF_UTTERANCE, FAKE, IMAGE


def user(*content):
    return Message(role="user", content=tuple(picture(c) if c.startswith("<") else c for c in content))


def assistant(text):
    return Message(role="assistant", content=(text,))


CONVERSATIONS = [
    [user("<dog>", "What is in this image?")],
    [user("<cat>", "What is in this image? Describe the red circle and the blue square.")],
    [user("The quick brown fox")],
    [user("<dog>", "A dog?"), assistant("A dog."), user("And", "<cat>", "this?")],
]


def load_image(image):
    return pixels_of(image_number(image))[None]


def answers(model, template, conversations, **options):
    prompts = [prompt_of(template, messages) for messages in conversations]
    return generate(model, template.tokenizer, prompts, **{"load_image": load_image, "max_new_tokens": 8} | options)


def greedy(model, template, messages, num_tokens, *, never, stops):
    """Token by token, the whole text each time, through the forward that training uses."""
    encoded = template.encode_prompt(messages)
    refs = [item for message in messages for item in message.content if not isinstance(item, str)]
    ids = encoded.input_ids.tolist()
    for _ in range(num_tokens):
        sample = EncodedSample(
            key="", input_ids=np.array([*ids, 0]), trained_spans=((len(ids), len(ids) + 1),),
            image_positions=encoded.image_positions,
        )  # fmt: skip
        placed = PlacedSample(sample, tuple(image_number(ref) for ref in refs), 0)
        batch = collate([[placed]], toy_images(pixels_of), train_on="assistant")
        with torch.no_grad():
            logits = model(batch=batch, read_P=torch.tensor([len(ids) - 1]))[0]
        logits[never] = -torch.inf
        token = int(logits.argmax())
        if token in stops:
            break
        ids.append(token)
    return template.tokenizer.decode(ids[len(encoded.input_ids) :], skip_special_tokens=True).strip()


def test_batched_answers_equal_those_of_one_conversation_at_a_time(model, template):
    together = answers(model, template, CONVERSATIONS)
    assert together == [answers(model, template, [messages])[0] for messages in CONVERSATIONS]
    assert together == answers(model, template, CONVERSATIONS, batch_size=3)


def test_answers_are_what_the_forward_of_training_finds_likeliest(model, template, tokenizer):
    never = tokenizer.convert_tokens_to_ids([FAKE, IMAGE])
    stops = tokenizer.convert_tokens_to_ids(["</s>", END_OF_UTTERANCE])
    expected = [greedy(model, template, messages, 8, never=never, stops=stops) for messages in CONVERSATIONS]
    assert any(expected)
    assert answers(model, template, CONVERSATIONS) == expected


def test_each_token_looks_at_the_last_image_at_or_before_it(template):
    one, two = (template.encode_prompt(messages) for messages in (CONVERSATIONS[0], CONVERSATIONS[3]))
    first, second = two.image_positions
    longest, padding = len(two.input_ids), len(two.input_ids) - len(one.input_ids)
    mask_BTN = image_attention_mask([one, two], num_images=2)
    looks_at = torch.where(mask_BTN.any(-1), mask_BTN.argmax(-1), -1).tolist()
    start = padding + one.image_positions[0]
    assert mask_BTN.sum(-1).max() == 1
    assert looks_at[0] == [-1] * start + [0] * (longest - start)
    assert looks_at[1] == [-1] * first + [0] * (second - first) + [1] * (longest - second)


def test_another_image_gives_another_answer(model, template):
    dark, light = (
        answers(
            model, template, CONVERSATIONS[:1],
            load_image=lambda _, level=level: np.full((1, 3, IMAGE_SIZE, IMAGE_SIZE), level, dtype=np.uint8),
        )
        for level in (0, 255)
    )  # fmt: skip
    assert dark != light


def head_that_always_prefers(model, *tokens):
    """The head says `tokens`, the first the most, whatever the hidden state."""
    scores = torch.zeros(model.config.vocab_size + model.config.additional_vocab_size)
    scores[list(tokens)] = torch.arange(len(tokens), 0, -1).float()
    model.lm_head.register_forward_hook(lambda module, args, output: scores.expand_as(output))


@pytest.mark.parametrize("stop", ["</s>", END_OF_UTTERANCE])
def test_an_answer_ends_where_a_turn_ends(model, template, tokenizer, stop):
    head_that_always_prefers(model, tokenizer.convert_tokens_to_ids(stop))
    assert answers(model, template, CONVERSATIONS) == ["", "", "", ""]


def test_an_answer_never_holds_image_markers(model, template, tokenizer):
    unwanted = tokenizer.convert_tokens_to_ids([IMAGE, FAKE])
    letter = tokenizer("A", add_special_tokens=False)["input_ids"][-1]
    head_that_always_prefers(model, *unwanted, letter)
    (answer,) = answers(model, template, CONVERSATIONS[:1])
    assert answer.replace(" ", "") == "AAAAAAAA"


def test_images_are_opened_when_no_loader_is_given(model, template, tmp_path):
    from PIL import Image

    from sft.core.sample import ImageRef

    file = tmp_path / "noise.png"
    Image.fromarray(pixels_of(3).transpose(1, 2, 0)).save(file)
    message = Message(role="user", content=(ImageRef(source=file), "What is it?"))
    opened = answers(model, template, [[message]], load_image=None)
    assert opened == answers(model, template, [[message]], load_image=lambda _: pixels_of(3)[None])


def test_no_conversations_give_no_answers(model, template):
    assert answers(model, template, []) == []


def test_an_answer_is_followed_word_by_word(model, template, tokenizer):
    words = iter(tokenizer("The quick brown fox<end_of_utterance>", add_special_tokens=False)["input_ids"])
    likeliest = torch.eye(model.config.vocab_size + model.config.additional_vocab_size)
    model.lm_head.register_forward_hook(lambda module, args, output: likeliest[next(words)].expand_as(output))
    pieces = []
    (answer,) = answers(model, template, CONVERSATIONS[:1], max_new_tokens=64, on_text=pieces.append)
    assert answer == "The quick brown fox"
    assert "".join(pieces).strip() == answer
    assert pieces[:2] == ["The ", "quick "]
