"""Training, evaluation and chat show the model the same prompt."""

from pathlib import Path

import numpy as np
from conftest import conversation

from sft.core.sample import ImageRef
from sft.data.datasets import Adapter
from sft.evaluation.tasks.mmbench.protocols import query
from sft.evaluation.tasks.mmbench.questions import Row
from sft.inference.chat import Conversation

RAW = str(Path(__file__).parent / "fixtures" / "easy_vqa")


def starts_with(ids, prefix):
    return np.array_equal(ids[: len(prefix)], prefix)


def test_a_multiple_choice_sample_is_trained_as_mmbench_asks_it(template):
    choices = Adapter("easy_vqa", RAW, "train", {"form": "choices"})
    sample = choices.to_sample(next(iter(choices.rows(choices.files()[0]))))
    text = sample.messages[0].content[1]
    question, _, *options, _ = text.split("\n")
    asked = Row(
        index=0,
        question=question.removeprefix("Question: "),
        hint="",
        letters=tuple(option[0] for option in options),
        options=tuple(option[3:] for option in options),
        answer="A",
        category="",
        l2_category="",
        image=ImageRef(source=b""),
        image_sha256="",
    )
    assert starts_with(
        template.encode(sample).input_ids, template.encode_prompt(query(asked, "circular", "letter").messages).input_ids
    )


def test_a_chat_continues_as_a_trained_conversation_does(template):
    trained = conversation(("<cat>", "What is it?"), "A cat.", "Is it big?", "No.")
    answers = iter(["A cat.", "No."])
    seen = []

    def respond(messages, on_text):
        seen.append(template.encode_prompt(messages).input_ids)
        return next(answers)

    chat = Conversation(respond)
    chat.say("What is it?", trained.images[0])
    chat.say("Is it big?")
    ids = template.encode(trained).input_ids
    assert [starts_with(ids, prompt_ids) for prompt_ids in seen] == [True, True]
