#!/usr/bin/env python3
"""How fast SmolVLM trains here, beside the published notebook's way, at the same losses; and what a tile costs.

    scripts/bench/bench_families.py [--json] [--rounds 2] [--samples 8] [--threads 1] [--precision float32] [--fast]

A random SmolVLM of 14 M parameters with the proportions of SmolVLM-256M: an image of 640x480 is 13 tiles and costs its
tower as much as ten thousands of text tokens cost the language model. Tiles have 96 pixels where the released model has
512, and 9 states where it has 64. The tower is frozen, as in the notebook, and everything else is trained. Pictures are
640x480, 480x640 and 500x500 (13, 13 and 17 tiles); each sample is a question about one with a short answer.

    shared     four questions about each picture       unshared   a picture each
    text       samples of 20 to 300 tokens without pictures
    cached     `unshared` with states from the feature cache (`data.feature_cache`), the connector frozen on both sides

    notebook   the published notebook, repaired: Idefics3Processor pads a batch to its longest sample, transformers' own
               forward and loss over all logits; labels are ours, since its own train the question too; at its batch
               size of 4 and at the best of 1, 2, 4, 8
    ours       `model(batch=...)`, packs of 1,408 tokens, which hold as many pictures as 8,192 of the released model

A pass is forward and backward over all samples and a step of fused AdamW with a learning rate of 0, so that all sides
always have the same weights: the bench fails where the loss of a pass differs by more than 1e-5 (1e-3 in bfloat16).
Inputs are made beforehand. Sides alternate; figures are medians of CPU seconds of this process; larger is better for
us.

    best_batch, own_batch   the notebook's CPU seconds / ours
    inputs        the notebook's CPU seconds from JPEG bytes to a batch / ours
    memory        peak of ours / the notebook's at its own batch, each in a process of its own, less what is there after
                  loading: weights, gradients and optimizer states
    parts         CPU milliseconds forward and backward of each part of a pass, ours and the notebook's at its own batch
    tile          CPU milliseconds of a tile in tower and connector, the same in text tokens of this machine, and what
                  dealing counts it as, per forward and backward of both (the tower's here is forward alone)
    mmbench       four options about a picture of 17 tiles: one forward per option / `score_answers`, and the largest
                  difference of a log-probability
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from bench_mmbench import WORDS
from bench_pixels import jpegs
from measuring import cpu_medians, forget_peak, peak_bytes, print_figures
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from training_sides import pack
from transformers import (
    Idefics3Processor,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from sft.batches.collate import collate
from sft.batches.image_source import OpenedImages
from sft.core.sample import IGNORE_INDEX, Batch, Caps, ImageRef, Message, PlacedSample, Sample
from sft.core.shipped import shipped_root
from sft.evaluation.rank_answers import score_answers
from sft.evaluation.task import Query
from sft.models.chat_template import ChatTemplate, load_chat_template
from sft.models.idefics3.images import TiledImages
from sft.models.idefics3.packed import PackedSmolVLM
from sft.models.idefics3.text import CHAT_TEMPLATES, END_OF_UTTERANCE, FAKE, GLOBAL, IMAGE
from sft.models.inline_model import normalise
from sft.models.loss import summed_loss, trained_positions

START, TILE, LONGEST_EDGE, ROWS = "<|im_start|>", 96, 384, 4_608
OWN_BATCH, BATCHES = 4, (1, 2, 4, 8)
SIZES = ((640, 480), (480, 640), (500, 500))
SAMPLES_PER_IMAGE = {"shared": 4, "unshared": 1, "text": 0}
CAPS = Caps(tokens=1408, image_weight=10_000, samples_per_image=4)
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-3}


# ------------------------------------------------------------------------------------------------ model and samples


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and the words of the samples; rows and columns are a token each, as SmolVLM-256M has them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<pad>", START], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" ".join(WORDS), "User: Assistant:"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=START, pad_token="<pad>")
    grid = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer.add_tokens([FAKE, IMAGE, END_OF_UTTERANCE, GLOBAL, *grid], special_tokens=True)
    tokenizer.eos_token = END_OF_UTTERANCE
    return tokenizer


class Bench:
    """The model as ours and as transformers', of the same weights; the template; pictures."""

    def __init__(self, precision: str) -> None:
        self.autocast = precision == "bfloat16"
        tokenizer = build_tokenizer()
        torch.manual_seed(0)
        text = dict(
            model_type="llama", vocab_size=ROWS, hidden_size=256, intermediate_size=688, num_hidden_layers=8,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192, pad_token_id=0,
        )  # fmt: skip
        vision = dict(
            hidden_size=256, patch_size=8, image_size=TILE, num_hidden_layers=6, num_attention_heads=4,
            intermediate_size=1024,
        )  # fmt: skip
        config = SmolVLMConfig(
            text_config=text, vision_config=vision, scale_factor=4, pad_token_id=0, use_cache=False,
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        )  # fmt: skip
        self.plain = SmolVLMForConditionalGeneration(config.from_dict(config.to_dict()))
        config.preprocessor = {"size": {"longest_edge": LONGEST_EDGE}, "max_image_size": {"longest_edge": TILE}}
        self.packed = PackedSmolVLM(config)
        self.packed.use_grouped_attention()
        self.plain.load_state_dict(self.packed.state_dict(), assign=True)
        source = load_chat_template(shipped_root() / "chat_templates" / CHAT_TEMPLATES[START])
        self.images = TiledImages(config)
        self.template = ChatTemplate(source, tokenizer, self.images)
        self.processor = Idefics3Processor(
            Idefics3ImageProcessorPil(size={"longest_edge": LONGEST_EDGE}, max_image_size={"longest_edge": TILE}),
            tokenizer,
            image_seq_len=self.images.states_per_tile,
        )
        self.refs = [ImageRef(source=jpegs("photo", SIZES[number % 3], 1)[0]) for number in range(24)]
        self.optimizers: dict[int, torch.optim.Optimizer] = {}

    def train(self, model: torch.nn.Module, frozen: Sequence[str] = ("vision_model",)) -> torch.optim.Optimizer:
        """An optimizer of everything but some parts, with gradients and states in place."""
        for name, weight in model.train().named_parameters():
            weight.requires_grad_(not any(f".{part}." in name for part in frozen))
        if id(model) not in self.optimizers:
            trained = [weight for weight in model.parameters() if weight.requires_grad]
            for weight in trained:
                weight.grad = torch.zeros_like(weight)
            self.optimizers[id(model)] = torch.optim.AdamW(trained, lr=0.0, fused=True)
            self.optimizers[id(model)].step()
        return self.optimizers[id(model)]

    def context(self) -> Any:
        """Autocast where it is asked for."""
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()

    def sample(self, seed: int, image: int | None, question: int, answer: int) -> PlacedSample:
        """A question and an answer of so many words, about a picture if any."""
        rng = random.Random(seed)
        asked, said = (" ".join(rng.choices(WORDS, k=number)) for number in (question, answer))
        shown = () if image is None else (self.refs[image],)
        messages = (Message(role="user", content=(*shown, asked)), Message(role="assistant", content=(said,)))
        encoded = self.template.encode(Sample(key=str(seed), messages=messages))
        return PlacedSample(encoded, () if image is None else (image,), 0)

    def samples(self, workload: str, number: int) -> list[PlacedSample]:
        """The samples of a workload in a random order."""
        rng, each = random.Random(0), SAMPLES_PER_IMAGE[workload]
        if not each:
            lengths = [rng.randint(20, 300) for _ in range(2 * number)]
            return [self.sample(seed, None, length // 2, length // 3) for seed, length in enumerate(lengths)]
        found = [self.sample(s, s // each, rng.randint(6, 16), rng.randint(2, 24)) for s in range(number)]
        rng.shuffle(found)
        return found


# ------------------------------------------------------------------------------------------------------------ sides


class Padded(NamedTuple):
    """Arguments of transformers' forward, its loss included."""

    inputs: dict[str, Any]


Step = Callable[[Any], Tensor]


def notebook_inputs(bench: Bench, members: Sequence[PlacedSample]) -> dict[str, Tensor]:
    """What the notebook's collator gives the model, without labels."""
    texts = [bench.template.tokenizer.decode(sample.encoded.input_ids) for sample in members]
    texts = [text.replace(states_of(bench, sample), IMAGE) for text, sample in zip(texts, members, strict=True)]
    pictures = [
        [Image.open(io.BytesIO(bench.refs[image].source)).convert("RGB") for image in sample.images]  # type: ignore[arg-type]
        for sample in members
    ]
    images = {"images": pictures} if any(pictures) else {}
    return dict(bench.processor(text=texts, **images, padding=True, add_special_tokens=False, return_tensors="pt"))


def states_of(bench: Bench, sample: PlacedSample) -> str:
    """The text that stands for a picture once it is cut."""
    for image in sample.images:
        size = Image.open(io.BytesIO(bench.refs[image].source)).size  # type: ignore[arg-type]
        ids = bench.images.token_ids(bench.template.tokenizer, bench.images.tiling(*size))
        return str(bench.template.tokenizer.decode(ids))
    return IMAGE


def notebook(bench: Bench, samples: Sequence[PlacedSample], size: int, trained: int) -> list[Padded]:
    """Batches of `size` samples. Their pixels are ours, up to 2 / 255 different, so that losses can be compared."""
    batches = []
    for first in range(0, len(samples), size):
        members = samples[first : first + size]
        inputs = notebook_inputs(bench, members)
        labels_BT = torch.full_like(inputs["input_ids"], IGNORE_INDEX)
        for row, sample in enumerate(members):
            ids, places = torch.from_numpy(sample.encoded.input_ids), inputs["attention_mask"][row].nonzero()[:, 0]
            assert torch.equal(inputs["input_ids"][row, places], ids), "the processor has the same tokens"
            for start, end in sample.encoded.trained_ranges("assistant"):
                labels_BT[row, places[start:end]] = ids[start:end]
            for own in ours_of(bench, [[sample]], 1)[0].tiles if sample.images else ():
                inputs["pixel_values"][row, : len(own)] = normalise(own)
        batches.append(Padded({**inputs, "labels": labels_BT, "num_items_in_batch": torch.tensor(trained)}))
    return batches


def ours_of(bench: Bench, packs: Sequence[Sequence[PlacedSample]], trained: int) -> list[Batch]:
    """The batch of each pack."""
    source = OpenedImages(bench.refs, bench.images)
    return [collate([members], source, train_on="assistant", num_trained_tokens=trained) for members in packs]


def run_pass(
    bench: Bench, model: torch.nn.Module, batches: Sequence[Any], frozen: Sequence[str] = ("vision_model",)
) -> float:
    """Forward and backward over all micro-batches, and a step; the loss of the pass."""
    optimizer, total = bench.train(model, frozen), 0.0
    for batch in batches:
        with bench.context():
            output = model(batch=batch) if isinstance(batch, Batch) else model(**batch.inputs)
        output.loss.backward()
        total += float(output.loss.detach())
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return total


def num_trained(samples: Sequence[PlacedSample]) -> int:
    """Tokens of answers."""
    return sum(end - start for s in samples for start, end in s.encoded.trained_ranges("assistant"))


# -------------------------------------------------------------------------------------------------------- measuring


def compare(bench: Bench, workload: str, number: int, rounds: int, batches: Sequence[int]) -> dict[str, Any]:
    """All sides on a workload.

    Raises:
        SystemExit: the loss of a pass differs between sides.
    """
    is_cached = workload == "cached"
    samples = bench.samples("unshared" if is_cached else workload, number)
    trained, frozen = num_trained(samples), ("vision_model", *(["connector"] if is_cached else []))
    made = {size: notebook(bench, samples, size, trained) for size in batches}
    packs = ours_of(bench, pack(samples, CAPS), trained)
    packs = [with_features(bench, batch) for batch in packs] if is_cached else packs
    losses: dict[str, float] = {}

    def side(name: str, model: torch.nn.Module, own: Sequence[Any]) -> Callable[[], None]:
        return lambda: losses.update({name: run_pass(bench, model, own, frozen)})

    sides = {"ours": side("ours", bench.packed, packs)}
    sides |= {f"notebook_{size}": side(f"notebook_{size}", bench.plain, own) for size, own in made.items()}
    seconds = medians(sides, rounds)
    precision = "bfloat16" if bench.autocast else "float32"
    difference = max(abs(loss / losses["ours"] - 1) for loss in losses.values())
    if difference > TOLERANCE[precision]:
        sys.exit(f"{workload}: the loss differs by {difference:.1e} between the sides: {losses}")
    best = min((name for name in seconds if name != "ours"), key=seconds.__getitem__)
    real = sum(len(sample.encoded.input_ids) for sample in samples)
    return {
        "ratios": {
            "best_batch": seconds[best] / seconds["ours"],
            "own_batch": seconds[f"notebook_{OWN_BATCH}"] / seconds["ours"],
        },
        "best": int(best.removeprefix("notebook_")),
        "loss_difference": difference,
        "answer_tokens_per_second": {name: trained / value for name, value in seconds.items()},
        "tokens_per_second": {name: real / value for name, value in seconds.items()},
    }


def medians(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """CPU seconds, sides in turns. From the second round on only ours, the notebook's own batch and its fastest."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        fastest = min((name for name in sides if name != "ours"), key=lambda name: min(seconds[name], default=0))
        for name in sides if not turn else dict.fromkeys(("ours", f"notebook_{OWN_BATCH}", fastest)):
            started = time.process_time()
            sides[name]()
            seconds[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def with_features(bench: Bench, batch: Batch) -> Batch:
    """A batch with the states that the feature cache would hold, in place of tiles."""
    with torch.no_grad():
        return replace(batch, features_RE=bench.packed.encode_images(batch.tiles, batch.tilings), tiles=())


def inputs(bench: Bench, samples: Sequence[PlacedSample], rounds: int) -> float:
    """From JPEG bytes to a batch: the notebook's CPU seconds / ours."""
    groups = [samples[first : first + OWN_BATCH] for first in range(0, len(samples), OWN_BATCH)]
    packs = pack(samples, CAPS)
    sides = {
        "notebook": lambda: [notebook_inputs(bench, members) for members in groups],
        "ours": lambda: [[normalise(tiles) for tiles in batch.tiles] for batch in ours_of(bench, packs, 1)],
    }
    seconds = cpu_medians(sides, rounds)
    return seconds["notebook"] / seconds["ours"]


def parts(bench: Bench, samples: Sequence[PlacedSample], rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """CPU milliseconds of the parts of a pass, and what a tile costs."""
    trained = num_trained(samples)
    packs, padded = ours_of(bench, pack(samples, CAPS), trained), notebook(bench, samples, OWN_BATCH, trained)
    bench.train(bench.packed), bench.train(bench.plain)
    runs = {"ours": packed_parts(bench, packs), "notebook": padded_parts(bench, padded)}
    sides = {f"{side} {name}": run for side, own in runs.items() for name, run in own.items()}
    seconds = cpu_medians(sides, rounds)
    found = {side: {name: 1e3 * seconds[f"{side} {name}"] for name in own} for side, own in runs.items()}
    tiles, tokens = sum(len(batch.tiles[0]) for batch in packs), sum(len(batch.input_ids_T) for batch in packs)
    of_tile = (found["ours"]["tower"] + found["ours"]["connector"]) / tiles
    tile = {
        "milliseconds": of_tile,
        "in_text_tokens": of_tile / (found["ours"]["text"] / tokens),
        "dealt_as_tokens": bench.images.cost_in_tokens / 3,
    }
    return found, tile


def forward_backward(bench: Bench, run: Callable[[], Tensor]) -> None:
    """One part of a pass; the sum of its result goes backward where it is trained."""
    with bench.context():
        result = run()
    if result.requires_grad:
        (result if not result.ndim else result.sum()).backward()


def each(bench: Bench, run: Callable[..., Tensor], *columns: Sequence[Any]) -> Callable[[], None]:
    """A part of a pass over all micro-batches, whose arguments are in columns."""

    def part() -> None:
        for row in zip(*columns, strict=True):
            forward_backward(bench, lambda row=row: run(*row))

    return part


def packed_parts(bench: Bench, batches: Sequence[Batch]) -> dict[str, Callable[[], None]]:
    """The parts of ours."""
    own = bench.packed
    tower, connector, text = own.model.vision_model, own.model.connector, own.model.text_model
    patches = [tower(pixel_values=normalise(batch.tiles[0])).last_hidden_state.detach() for batch in batches]
    embeds = [text.embed_tokens(batch.input_ids_T).detach().requires_grad_() for batch in batches]
    reads = [trained_positions(batch.labels_T) for batch in batches]
    hidden = [torch.randn(len(read), 256, requires_grad=True) for read in reads]

    def of_head(hidden_PD: Tensor, read: Tensor, batch: Batch) -> Tensor:
        return summed_loss(own.lm_head(hidden_PD), batch.labels_T[read + 1], torch.ones(len(read)))[0]

    return {
        "tower": each(bench, lambda batch: tower(pixel_values=normalise(batch.tiles[0])).last_hidden_state, batches),
        "connector": each(bench, connector, patches),
        "text": each(bench, own.decode, embeds, batches, reads),
        "head and loss": each(bench, of_head, hidden, reads, batches),
    }


def padded_parts(bench: Bench, batches: Sequence[Padded]) -> dict[str, Callable[[], None]]:
    """The parts of the notebook's way."""
    own = bench.plain
    tower, connector, text = own.model.vision_model, own.model.connector, own.model.text_model
    shown = [batch.inputs["pixel_values"].flatten(0, 1) for batch in batches]
    shown = [pixels[(pixels != 0).flatten(1).any(1)] for pixels in shown]
    patches = [tower(pixel_values=pixels).last_hidden_state.detach() for pixels in shown]
    embeds = [text.embed_tokens(batch.inputs["input_ids"]).detach().requires_grad_() for batch in batches]
    hidden = [torch.randn_like(one, requires_grad=True) for one in embeds]

    def of_text(embeds_BTD: Tensor, batch: Padded) -> Tensor:
        mask_BT = batch.inputs["attention_mask"]
        output = text(inputs_embeds=embeds_BTD, attention_mask=mask_BT, use_cache=False)
        return torch.as_tensor(output.last_hidden_state)

    def of_head(hidden_BTD: Tensor, batch: Padded) -> Tensor:
        labels_BT, number = batch.inputs["labels"], batch.inputs["num_items_in_batch"]
        logits_BTV = own.lm_head(hidden_BTD)
        loss = own.loss_function(logits_BTV, labels_BT, vocab_size=ROWS, num_items_in_batch=number)
        return torch.as_tensor(loss)

    return {
        "tower": each(bench, lambda pixels: tower(pixel_values=pixels).last_hidden_state, shown),
        "connector": each(bench, connector, patches),
        "text": each(bench, of_text, embeds, batches),
        "head and loss": each(bench, of_head, hidden, batches),
    }


def mmbench(bench: Bench, rounds: int) -> dict[str, float]:
    """Four options about a picture of 17 tiles."""
    rng, model = random.Random(0), bench.packed
    options = tuple(" ".join(rng.choices(WORDS, k=number)) for number in (1, 3, 2, 5))
    message = Message(role="user", content=(bench.refs[2], " ".join(rng.choices(WORDS, k=30))))
    query = Query(Sample(key="q", messages=(message,)), options)
    encoded = [bench.template.encode_answer(query.sample.messages, option) for option in options]
    (batch,) = ours_of(bench, [[PlacedSample(encoded[0][0], (2,), 0)]], 1)
    pixels = normalise(batch.tiles[0])[None]

    def per_option() -> list[float]:
        return list(map(log_prob, encoded))

    @torch.inference_mode()
    def log_prob(one: Any) -> float:
        ids, (start, end) = torch.from_numpy(one[0].input_ids), one[1]
        logits_TV = bench.plain(input_ids=ids[None], pixel_values=pixels).logits[0]
        log_probs_TV = logits_TV[start - 1 : end - 1].log_softmax(-1)
        return float(log_probs_TV.gather(1, ids[start:end, None]).sum())

    def ours() -> list[float]:
        return [score.log_prob for score in score_answers(model, bench.template, [query])[0] or ()]

    bench.packed.eval(), bench.plain.eval()
    seconds = cpu_medians({"ours": ours, "per option": per_option}, rounds)
    difference = np.abs(np.array(ours()) - np.array(per_option())).max()
    return {"ratio": seconds["per option"] / seconds["ours"], "difference": float(difference)}


def memory(name: str, arguments: argparse.Namespace) -> int:
    """Bytes on top of what is there after loading, of the largest micro-batch; in a process of its own."""
    command = [sys.executable, __file__, "--memory", name, "--samples", str(arguments.samples)]
    command += ["--precision", arguments.precision]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _memory(bench: Bench, name: str, number: int) -> int:
    samples = bench.samples("unshared", number)
    model = bench.packed if name == "ours" else bench.plain
    made: Iterator[Any] = iter(
        ours_of(bench, pack(samples, CAPS), 1) if name == "ours" else notebook(bench, samples, OWN_BATCH, 1)
    )
    largest = max(made, key=lambda batch: len(getattr(batch, "input_ids_T", ())) or batch.inputs["labels"].numel())
    bench.train(model)
    forget_peak()
    loaded = peak_bytes()
    for _ in range(2):
        run_pass(bench, model, [largest])
    return peak_bytes() - loaded


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    bench = Bench(arguments.precision)
    number, rounds = arguments.samples, arguments.rounds
    few = 2 if arguments.fast else 4
    figures: dict[str, Any] = {"ratios": {}}
    for workload in (*SAMPLES_PER_IMAGE, "cached"):
        batches = (1, OWN_BATCH) if arguments.fast or workload == "cached" else BATCHES
        found = compare(bench, workload, number, rounds, batches)
        figures["ratios"][workload] = found.pop("ratios")
        figures[workload] = found
        print(f"{workload}: {figures['ratios'][workload]}", file=sys.stderr)
    samples = bench.samples("unshared", number)
    figures["ratios"]["inputs"] = inputs(bench, samples[:few], rounds)
    if not arguments.fast:
        used = figures["memory_bytes"] = {name: memory(name, arguments) for name in ("ours", "notebook")}
        figures["ratios"]["memory"] = used["ours"] / used["notebook"]
    figures["parts"], figures["tile"] = parts(bench, samples[:few], 1)
    figures["mmbench"] = mmbench(bench, 1)
    figures["ratios"]["mmbench"] = figures["mmbench"]["ratio"]
    figures["parameters"] = sum(weight.numel() for weight in bench.packed.parameters())
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=TOLERANCE, default="float32")
    parser.add_argument("--fast", action="store_true", help="4 samples, one round, no memory: not to be quoted")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.fast:
        arguments.samples, arguments.rounds = 4, 1
    if arguments.memory:
        print(_memory(Bench(arguments.precision), arguments.memory, arguments.samples))
        return
    figures = measure(arguments)
    print(json.dumps(figures)) if arguments.json else print_figures(figures)


if __name__ == "__main__":
    main()
