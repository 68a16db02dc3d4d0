#!/usr/bin/env python3
"""How much cheaper a benchmark is ranked than by what one would write first, and that the answers are the same.

    scripts/bench/bench_mmbench.py [--json] [--questions 6] [--rounds 3] [--hidden-size 512] [--new-tokens 15]

A random IDEFICS with the proportions of idefics-9b: a quarter of its language layers, an eighth of its widths, so that
an image costs as many text tokens as there (`image_cost_in_tokens`: 23 there, printed here), gates open; made questions
in circular form: four options, four rotations, an image of 448 x 336 pixels each. float32, one thread; sides alternate;
a ratio is of medians of CPU seconds of this process, larger is better for us.

    forward_per_option  one forward of transformers for the four letters of a row, four sequences with their image, all
                        logits: how the released checkpoints were chosen; `difference` is the largest between its
                        log-probabilities of a token and ours
    generate            IdeficsProcessor and `generate`, greedy, eight rows at a time, --new-tokens tokens a row (15 is
                        what HuggingFaceM4 evaluated with)

Beside them, the same for full option texts (`forward_per_text`), and `generate_one`: one token a row, what a letter
costs at the least.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, IdeficsConfig
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.idefics.processing_idefics import IdeficsProcessor

from sft.core.sample import ImageRef
from sft.core.shipped import shipped_root
from sft.evaluation.rank_answers import score_answers
from sft.evaluation.task import Query
from sft.evaluation.tasks.mmbench.protocols import compared, query
from sft.evaluation.tasks.mmbench.questions import Row, all_rotations
from sft.models.chat_template import ChatTemplate, load_chat_template
from sft.models.idefics.images import IdeficsImages, normalise
from sft.models.idefics.packed import PackedIdefics
from sft.models.idefics.text import CHAT_TEMPLATE, END_OF_UTTERANCE, FAKE, IMAGE, load_tokenizer
from sft.models.idefics.weights import weights
from sft.models.image_transform import load_tiles

WORDS = """
the a this that which what color shape object person animal left right of in on under picture image shown below above
large small red green blue most likely two three behind front near between following statement correct describes
relation scene weather season emotion function property number position city style
""".split()  # noqa: SIM905


def build_model(hidden: int, vocab_size: int) -> PackedIdefics:
    """An IDEFICS of idefics-9b's proportions: hidden 4096, 32 layers, tower 1280 x 32, resampler 6 x 16 x 96."""
    torch.manual_seed(0)
    scale = hidden / 4096
    config = IdeficsConfig(
        vocab_size=vocab_size, additional_vocab_size=3, hidden_size=hidden, num_hidden_layers=8,
        num_attention_heads=hidden // 64, intermediate_size=int(11008 * scale), cross_layer_interval=4,
        alpha_type="float", alpha_initializer="ones", use_resampler=True, qk_layer_norms=True, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, max_position_embeddings=2048,
        vision_config=dict(
            embed_dim=int(1280 * scale), image_size=224, patch_size=14, num_hidden_layers=8,
            num_attention_heads=max(1, int(16 * scale)), intermediate_size=int(5120 * scale),
        ),
        perceiver_config=dict(
            use_resampler=True, resampler_n_latents=64, resampler_depth=2, resampler_n_heads=max(1, int(16 * scale)),
            resampler_head_dim=96, qk_layer_norms_perceiver=True,
        ),
    )  # fmt: skip
    model = PackedIdefics(config)
    model.use_grouped_attention()
    return model.eval()


def make_rows(num_questions: int) -> list[Row]:
    """Questions of the lengths MMBench has, each with an image of its own, in all rotations."""
    rng = random.Random(0)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    rows = []
    for index in range(num_questions):
        noise = np.random.default_rng(index).normal(128, 40, (21, 28, 3)).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).resize((448, 336), Image.Resampling.BICUBIC).save(file, "JPEG", quality=88)
        row = Row(
            index=index, question=words(6, 14) + "?", hint=words(20, 40) if index % 4 == 0 else "",
            letters=("A", "B", "C", "D"), options=tuple(words(1, 9) for _ in "ABCD"), answer="A", category="",
            l2_category="", image=ImageRef(source=file.getvalue()), image_sha256=str(index),
        )  # fmt: skip
        rows.append(row)
    return [row for question in all_rotations(rows) for row in question.rotations]


# -------------------------------------------------------------------------------------------------------- sides


def requests(rows: Sequence[Row], rank: Any) -> list[Query]:
    """What is asked of each row."""
    return [Query(query(row, "circular", rank), compared(row, "circular", rank)) for row in rows]


def distinct_tokens(model: PackedIdefics, template: ChatTemplate, rows: Sequence[Row]) -> int:
    """Tokens that the forwards for the letters hold, where beginnings are shared."""
    totals: list[int] = []
    score_answers(
        model,
        template,
        requests(rows, "letter"),
        on_progress=lambda done, total: totals.append(total),
    )
    return totals[-1]


def ours(model: PackedIdefics, template: ChatTemplate, rows: Sequence[Row], rank: Any) -> list[list[float]]:
    """By `score_answers`: the mean log-probability of the answer's tokens."""
    scores = score_answers(model, template, requests(rows, rank))
    return [[score.log_prob / score.num_tokens for score in row or ()] for row in scores]


def forward_per_option(
    model: PackedIdefics, template: ChatTemplate, rows: Sequence[Row], rank: Any
) -> list[list[float]]:
    """By a whole forward of transformers for each option, those of a row in one batch."""
    found = []
    for row in rows:
        messages = query(row, "circular", rank).messages
        encoded = [template.encode_answer(messages, answer) for answer in compared(row, "circular", rank)]
        ids_BT = pad_sequence([torch.from_numpy(sample.input_ids) for sample, _ in encoded], batch_first=True)
        mask_BT = pad_sequence([torch.ones(len(sample.input_ids)).long() for sample, _ in encoded], batch_first=True)
        image_mask_BTN = torch.zeros(*ids_BT.shape, 1)
        image_mask_BTN[:, encoded[0][0].image_positions[0] :] = 1
        assert isinstance(row.image.source, bytes)
        pixels = normalise(torch.from_numpy(load_tiles(row.image.source, template.images)))
        with torch.inference_mode():
            logits_BTV = model(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                image_attention_mask=image_mask_BTN,
                pixel_values=pixels.expand(len(encoded), 1, -1, -1, -1),
            ).logits
        found.append(
            [
                logits_TV[start - 1 : end - 1].log_softmax(-1).gather(1, ids_T[start:end, None]).mean().item()
                for logits_TV, ids_T, (_, (start, end)) in zip(logits_BTV, ids_BT, encoded, strict=True)
            ]
        )
    return found


def generated(model: PackedIdefics, processor: IdeficsProcessor, rows: Sequence[Row], new_tokens: int) -> list[str]:
    """By processor and `generate`, as the model card shows."""
    stops = processor.tokenizer.convert_tokens_to_ids(["</s>", END_OF_UTTERANCE])
    bad = [[processor.tokenizer.convert_tokens_to_ids(token)] for token in (FAKE, IMAGE)]
    config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, bad_words_ids=bad, eos_token_id=stops,
        pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    texts = []
    for first in range(0, len(rows), 8):
        prompts = []
        for row in rows[first : first + 8]:
            (message,) = query(row, "circular", "generate").messages
            assert isinstance(row.image.source, bytes)
            image = Image.open(io.BytesIO(row.image.source)).convert("RGB")
            prompts.append(["User:", image, str(message.content[1]), "<end_of_utterance>", "\nAssistant:"])
        inputs = processor(text=prompts, add_end_of_utterance_token=False, return_tensors="pt", padding="longest")
        with torch.inference_mode():
            output_BT = model.generate(**inputs, generation_config=config)
        texts += processor.batch_decode(output_BT[:, -new_tokens:], skip_special_tokens=True)
    return texts


# ------------------------------------------------------------------------------------------------------ measuring


def run(sides: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """CPU seconds, median over rounds in which the sides alternate, and what each side found in the last."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, Any] = {}
    for _ in range(rounds):
        for name, side in sides.items():
            started = time.process_time()
            found[name] = side()
            seconds[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}, found


def measure(num_questions: int, rounds: int, hidden: int, new_tokens: int) -> dict[str, Any]:
    """All figures."""
    tokenizer = load_tokenizer(prepared_base())
    model = build_model(hidden, tokenizer.vocab_size)
    source = load_chat_template(shipped_root() / "chat_templates" / CHAT_TEMPLATE)
    template = ChatTemplate(source, tokenizer, IdeficsImages(model.config))
    processor = IdeficsProcessor(IdeficsImageProcessorPil(image_size=224), tokenizer)
    rows = make_rows(num_questions)
    sides: dict[str, Callable[[], Any]] = {
        "letters": lambda: ours(model, template, rows, "letter"),
        "forward_per_option": lambda: forward_per_option(model, template, rows, "letter"),
        "generate": lambda: generated(model, processor, rows, new_tokens),
        "generate_one": lambda: generated(model, processor, rows, 1),
        "texts": lambda: ours(model, template, rows, "text"),
        "forward_per_text": lambda: forward_per_option(model, template, rows, "text"),
    }
    for side in (sides["letters"], sides["generate_one"]):
        side()  # warms caches up
    seconds, found = run(sides, rounds)
    pairs = {"letter": ("letters", "forward_per_option"), "text": ("texts", "forward_per_text")}
    differences = {
        rank: float(np.abs(np.array(found[one]) - np.array(found[other])).max()) for rank, (one, other) in pairs.items()
    }
    lengths = [len(template.encode_prompt(query(row, "circular", "letter").messages).input_ids) for row in rows]
    return {
        "ratios": {
            "forward_per_option": seconds["forward_per_option"] / seconds["letters"],
            "generate": seconds["generate"] / seconds["letters"],
            "generate_one": seconds["generate_one"] / seconds["letters"],
            "forward_per_text": seconds["forward_per_text"] / seconds["texts"],
        },
        "difference": differences,
        "cpu_seconds": seconds,
        "rows": len(rows),
        "prompt_tokens": sum(lengths),
        "distinct_tokens": distinct_tokens(model, template, rows),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image_cost_in_tokens": IdeficsImages(model.config).cost_in_tokens,
    }


def prepared_base() -> Path:
    """The shipped base with <end_of_utterance>, for its tokenizer."""
    folder = Path(tempfile.mkdtemp()) / "base"
    weights.prepare_base(shipped_root() / "tiny_base", folder)
    return folder


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(arguments.questions, arguments.rounds, arguments.hidden_size, arguments.new_tokens)
    if arguments.json:
        json.dump(figures, sys.stdout)
        print()
        return
    for name, ratio in figures["ratios"].items():
        print(f"{name:20} {ratio:6.2f}")
    for rank, difference in figures["difference"].items():
        print(f"difference, {rank:8} {difference:.1e}")
    print(
        f"{figures['rows']} rows, {figures['prompt_tokens']:,} tokens, {figures['distinct_tokens']:,} computed; "
        f"{figures['parameters'] / 1e6:.0f} M parameters, an image costs {figures['image_cost_in_tokens']:.0f} tokens"
    )


if __name__ == "__main__":
    main()
