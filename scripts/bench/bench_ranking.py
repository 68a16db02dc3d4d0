#!/usr/bin/env python3
"""How much cheaper many candidates are ranked in one prefix tree than by what one would write first.

    scripts/bench/bench_ranking.py [--json] [--classes 1000] [--shots 16] [--timed-classes 10] [--hidden-size 512]

A random IDEFICS as in bench_mmbench.py, float32, one thread; made class names of one to four words, ranked after a
question about an image, with shots. CPU seconds of this process, each side once; the first is timed on --timed-classes
of the names and scaled.

    forward_per_class   one forward of transformers for each name, all images encoded each time
    rows_per_class      ours with a row of attention for each name in place of the tree

`difference` is the largest between our log-probabilities and those of `forward_per_class`.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from bench_mmbench import WORDS, build_model, prepared_base
from PIL import Image

from sft.core.sample import ImageRef, Sample
from sft.core.shipped import shipped_root
from sft.evaluation.prompts import Prompt, TaskItem, conversation
from sft.evaluation.rank_answers import score_answers
from sft.evaluation.task import Query
from sft.models import grouped_attention
from sft.models.chat_template import ChatTemplate, load_chat_template
from sft.models.idefics.images import IdeficsImages, normalise
from sft.models.idefics.packed import PackedIdefics, image_attention_mask
from sft.models.idefics.text import CHAT_TEMPLATE, load_tokenizer
from sft.models.image_transform import load_tiles

PROMPT = Prompt(question="{image}a picture of the", answer=" {answer}.", is_document=True)


def make_query(num_classes: int, num_shots: int) -> Query:
    """A question about an image after shots, with all class names as options."""
    rng = random.Random(0)
    names = list(dict.fromkeys(" ".join(rng.choices(WORDS, k=rng.randint(1, 4))) for _ in range(4 * num_classes)))

    def item(number: int) -> TaskItem:
        noise = np.random.default_rng(number).integers(0, 255, (21, 28, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).resize((448, 336)).save(file, "JPEG")
        return TaskItem(id=number, answers=(), images=(ImageRef(source=file.getvalue()),), cluster=str(number))

    shots = [(item(number), rng.choice(names)) for number in range(1, num_shots + 1)]
    messages = conversation(PROMPT, item(0), shots)
    return Query(Sample(key="0", messages=messages), tuple(map(PROMPT.option, names[:num_classes])))


def forward_per_class(model: PackedIdefics, template: ChatTemplate, asked: Query, number: int) -> list[float]:
    """By a whole forward of transformers for each of the first names."""
    found = []
    for option in asked.options[:number]:
        encoded, (start, end) = template.encode_answer(asked.sample.messages, option)
        tiles = [load_tiles(image.source, template.images) for image in asked.sample.images]  # type: ignore[arg-type]
        pixels = torch.cat([normalise(torch.from_numpy(tile)) for tile in tiles])
        ids_1T = torch.from_numpy(encoded.input_ids)[None]
        with torch.inference_mode():
            logits_TV = model(
                input_ids=ids_1T,
                attention_mask=torch.ones_like(ids_1T),
                image_attention_mask=image_attention_mask([encoded], len(tiles)),
                pixel_values=pixels[None],
            ).logits[0]
        log_probs = logits_TV[start - 1 : end - 1].log_softmax(-1).gather(1, ids_1T[0, start:end, None])
        found.append(float(log_probs.sum()))
    return found


def ours(model: PackedIdefics, template: ChatTemplate, asked: Query) -> list[float]:
    """By `score_answers`."""
    (scores,) = score_answers(model, template, [asked])
    return [score.log_prob for score in scores or ()]


def seconds_of(side: Callable[[], Sequence[float]]) -> tuple[float, Sequence[float]]:
    """CPU seconds of a side, and what it found."""
    started = time.process_time()
    found = side()
    return time.process_time() - started, found


def measure(num_classes: int, num_shots: int, num_timed: int, hidden: int) -> dict[str, Any]:
    """All figures."""
    tokenizer = load_tokenizer(prepared_base())
    model = build_model(hidden, tokenizer.vocab_size)
    source = load_chat_template(shipped_root() / "chat_templates" / CHAT_TEMPLATE)
    template = ChatTemplate(source, tokenizer, IdeficsImages(model.config))
    asked = make_query(num_classes, num_shots)
    ours(model, template, asked._replace(options=asked.options[:2]))  # warms up
    own, found = seconds_of(lambda: ours(model, template, asked))
    per_class, expected = seconds_of(lambda: forward_per_class(model, template, asked, num_timed))
    with mock.patch.object(grouped_attention, "_tree_pays", lambda sizes, num_tokens: False):
        rows, _ = seconds_of(lambda: ours(model, template, asked))
    return {
        "ratios": {"forward_per_class": per_class / num_timed * num_classes / own, "rows_per_class": rows / own},
        "difference": float(np.abs(np.array(found[:num_timed]) - np.array(expected)).max()),
        "cpu_seconds": {"ours": own, "rows_per_class": rows, "forward_per_class": per_class / num_timed * num_classes},
        "prompt_tokens": len(template.encode_prompt(asked.sample.messages).input_ids),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--timed-classes", type=int, default=10)
    parser.add_argument("--hidden-size", type=int, default=512)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(arguments.classes, arguments.shots, arguments.timed_classes, arguments.hidden_size)
    if arguments.json:
        json.dump(figures, sys.stdout)
        print()
        return
    for name, ratio in figures["ratios"].items():
        print(f"{name:20} {ratio:6.1f}")
    print(f"difference           {figures['difference']:.1e}")
    print(
        f"{arguments.classes} names, {arguments.shots} shots, a prompt of {figures['prompt_tokens']} tokens; "
        f"{figures['cpu_seconds']['ours']:.1f} CPU s; {figures['parameters'] / 1e6:.0f} M parameters"
    )


if __name__ == "__main__":
    main()
