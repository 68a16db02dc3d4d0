"""Answers that a model generates, for tasks that are not asked by likelihood."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sft.core.distributed import all_gather_dict, all_or_none, assign
from sft.core.sample import Sample
from sft.inference.generate import generate, prompt_of
from sft.models.chat_template import ChatTemplate
from sft.models.packed_model import PackedModel

BATCH_SIZE = 16


def generate_answers(
    model: PackedModel,
    template: ChatTemplate,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    num_beams: int = 1,
    forbidden: Sequence[str] = (),
    max_positions: int | None = None,
    autocast: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[str | None]:
    """Return the model's answer to each conversation, in the order given; None where the prompt leaves no room
    for `max_new_tokens` within `max_positions`. Prompts of similar length are answered together; `on_progress` is
    called with (answers written, answers in all).

    Raises:
        SkipSample: an image does not decode.
    """
    lengths = [len(template.encode_prompt(sample.messages).input_ids) for sample in samples]
    room = float("inf") if max_positions is None else max_positions - max_new_tokens
    fitting = [number for number, length in enumerate(lengths) if length <= room]
    fitting.sort(key=lambda number: -lengths[number])
    batches = [fitting[first : first + BATCH_SIZE] for first in range(0, len(fitting), BATCH_SIZE)]
    answers: dict[int, str] = {}
    done = 0
    with all_or_none():
        for own, turn in assign(batches):
            texts = generate(
                model,
                template.tokenizer,
                [prompt_of(template, samples[number].messages) for number in own],
                max_new_tokens=max_new_tokens,
                settings={"num_beams": num_beams, "early_stopping": num_beams > 1},
                forbidden=forbidden,
                batch_size=BATCH_SIZE,
                autocast=autocast,
            )
            answers |= zip(own, texts, strict=True)
            done += sum(map(len, turn))
            if on_progress:
                on_progress(done, len(fitting))
    answers = all_gather_dict(answers)
    return [answers.get(number) for number in range(len(samples))]
