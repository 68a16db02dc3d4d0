"""The conversation and its terminal, with an answerer that says what it was given."""

import io

import pytest
from PIL import Image

from sft.core.errors import UserError
from sft.core.sample import ImageRef, Message
from sft.inference.chat import HELP, Conversation, Repl, responder


def echo(messages, on_text):
    """Says how many turns and images it was shown, and the last words."""
    num_images = sum(isinstance(item, ImageRef) for message in messages for item in message.content)
    return f"{len(messages)} turns, {num_images} images: {messages[-1].content[-1]}"


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    Image.new("RGB", (8, 8), "red").save(inside / "red shape.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "outside.png")
    (inside / "link.png").symlink_to(tmp_path / "outside.png")
    (inside / "text.png").write_text("no picture")
    return inside


def typed(folder, *lines, respond=echo):
    output = io.StringIO()
    Repl(Conversation(respond, folder=folder), io.StringIO("".join(f"{line}\n" for line in lines)), output).run()
    return output.getvalue().splitlines()[1:]  # the first line is the help


def test_what_was_said_is_remembered_until_reset(folder):
    conversation = Conversation(echo, folder=folder)
    assert conversation.say("Hello") == "1 turns, 0 images: Hello"
    assert conversation.say("What is it?", "red shape.png") == "3 turns, 1 images: What is it?"
    assert [message.role for message in conversation.messages] == ["user", "assistant"] * 2
    conversation.reset()
    assert conversation.say("Hello") == "1 turns, 0 images: Hello"


def test_an_image_stands_before_the_words_and_is_kept_as_it_was(folder):
    conversation = Conversation(echo, folder=folder)
    conversation.say("What is it?", "red shape.png")
    content = (folder / "red shape.png").read_bytes()
    assert conversation.messages[0] == Message(role="user", content=(ImageRef(source=content), "What is it?"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../outside.png", "outside .*inside that folder only"),
        ("/etc/hostname", "outside .*inside that folder only"),
        ("link.png", "outside .*inside that folder only"),
        ("https://example.org/a.png", "addresses are not fetched"),
        ("missing.png", "missing.png: image file missing; looked in .*inside$"),
        (".", "a folder; expected an image file in it"),
        ("text.png", "text.png: image does not decode"),
    ],
)
def test_images_come_from_inside_the_folder_and_nothing_that_fails_is_remembered(folder, name, message):
    conversation = Conversation(echo, folder=folder)
    with pytest.raises(UserError, match=message):
        conversation.say("What is it?", name)
    assert conversation.messages == ()


def test_lines_are_commands_or_words_and_a_transcript_can_be_read(folder):
    assert typed(
        folder, "Hi", "/image red shape.png", "What is it?", "And now?", "/reset", "", "Hi", "/quit", "no"
    ) == [
        "User: Hi",
        "Assistant: 1 turns, 0 images: Hi",
        "User: /image red shape.png",
        "User: What is it?",
        "Assistant: 3 turns, 1 images: What is it?",
        "User: And now?",
        "Assistant: 5 turns, 1 images: And now?",
        "User: /reset",
        "User: ",
        "User: Hi",
        "Assistant: 1 turns, 0 images: Hi",
        "User: /quit",
    ]


def test_a_wrong_line_is_answered_with_one_line_and_the_talk_goes_on(folder):
    lines = typed(folder, "/imagine", "/image missing.png", "Hi")
    assert [line for line in lines if line.startswith("Error")] == [
        "Error: /imagine: unknown command; did you mean '/image'? /image FILE shows an image with your next message, "
        "/reset forgets, /help lists, /quit ends.",
        f"Error: missing.png: image file missing; looked in {folder}",
    ]
    assert "Assistant: 1 turns, 0 images: Hi" in lines


@pytest.mark.parametrize(
    ("pasted", "images"),
    [
        ("red shape.png", 1),
        ("'red shape.png'", 1),
        ('"red shape.png"', 1),
        ("red\\ shape.png", 1),
        ("'{folder}/red shape.png'", 1),
        ("{folder}/red\\ shape.png 'red shape.png'", 2),
    ],
)
def test_a_file_is_named_as_terminals_paste_it(folder, pasted, images):
    lines = typed(folder, f"/image {pasted.format(folder=folder)}", "What?")
    assert lines[-2] == f"Assistant: 1 turns, {images} images: What?"


@pytest.mark.parametrize("pasted", ["no such file.png", "it's.png"])
def test_a_file_that_is_missing_is_named_in_full(folder, pasted):
    assert typed(folder, f"/image {pasted}")[1].startswith(f"Error: {pasted}: image file missing")


def test_exit_ends_and_help_names_the_commands(folder):
    assert typed(folder, "/help", "/exit", "no") == ["User: /help", HELP, "User: /exit"]


def test_an_image_without_a_name_is_told(folder):
    assert typed(folder, "/image")[1].startswith("Error: /image: no file is named")


def test_an_image_waits_for_words_that_are_answered(folder):
    failures = iter([True, False])

    def fails_once(messages, on_text):
        if next(failures):
            raise UserError("too long")
        return echo(messages, on_text)

    lines = typed(folder, "/image red shape.png", "What?", "What?", respond=fails_once)
    assert lines[2:5] == ["Error: too long", "User: What?", "Assistant: 1 turns, 1 images: What?"]


def test_an_image_can_be_shown_before_the_first_line(folder):
    output = io.StringIO()
    repl = Repl(Conversation(echo, folder=folder), io.StringIO("What?\nAnd now?\n"), output)
    repl.show(ImageRef(source=folder.parent / "outside.png"))
    repl.run()
    assert [line for line in output.getvalue().splitlines() if line.startswith("Assistant")] == [
        "Assistant: 1 turns, 1 images: What?",
        "Assistant: 3 turns, 1 images: And now?",
    ]


def test_several_images_are_shown_in_their_order(folder):
    Image.new("RGB", (8, 8), "green").save(folder / "green.png")
    seen = []

    def looks(messages, on_text):
        seen.append(messages[-1].content)
        return "seen"

    typed(folder, "/image green.png", "/image red shape.png", "Which?", "And now?", respond=looks)
    green, red = ((folder / name).read_bytes() for name in ("green.png", "red shape.png"))
    assert seen == [(ImageRef(source=green), ImageRef(source=red), "Which?"), ("And now?",)]


def test_no_answer_is_said(folder):
    assert typed(folder, "Hi", respond=lambda messages, on_text: "")[1] == "Assistant: (no answer)"


def test_a_model_answers_the_prompt_of_training(model, template, folder):
    conversation = Conversation(responder(model, template, max_new_tokens=4), folder=folder)
    answer = conversation.say("What is in this image?", "red shape.png")
    assert answer == answer.strip()
    assert conversation.messages[-1] == Message(role="assistant", content=(answer,))


def test_a_conversation_that_does_not_fit_the_model_is_refused(model, template):
    model.config.max_position_embeddings = 12
    with pytest.raises(UserError, match="tokens, the model takes 8; /reset begins a new one"):
        Conversation(responder(model, template, max_new_tokens=4)).say("What is in this image?")
