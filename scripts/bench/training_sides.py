"""The workloads of bench_training.py, and the sides that it lets train on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.idefics.processing_idefics import IdeficsProcessor

from sft.batches.collate import collate
from sft.batches.declared_sizes import CARD
from sft.batches.image_source import GivenImages
from sft.batches.packing import Bundle, pack_window
from sft.core.sample import IGNORE_INDEX, Batch, Caps, EncodedSample, PackItem, PlacedSample
from sft.models.idefics import text
from sft.models.idefics.images import IdeficsImages, normalise

VOCABULARY, IMAGE_SIZE = 32_000, 224
FAKE, IMAGE, END_OF_UTTERANCE = VOCABULARY, VOCABULARY + 1, VOCABULARY + 2
CAPS = Caps(tokens=1024, image_weight=24, samples_per_image=4)


# ------------------------------------------------------------------------------------------------------ workloads


def make_samples(number: int, samples_per_image: int) -> list[PlacedSample]:
    """Samples in a random order; each is its own source, so that its loss can be told."""
    num_texts = round(0.45 * number)
    samples = []
    for index in range(number):
        kind = "ultrachat" if index < num_texts else ("svit", "llava_instruct", "svit", "svit")[index % 4]
        stated, has_image = CARD[kind], kind != "ultrachat"
        length = stated.median_tokens * np.exp(stated.spread * np.random.default_rng(index).standard_normal())
        length = min(int(length if has_image else length / 4), CAPS.tokens)
        encoded = text_of(index, length, stated.trained_share, has_image)
        images = ((index - num_texts) // samples_per_image,) if has_image else ()
        samples.append(PlacedSample(encoded, images, source=index))
    return [samples[index] for index in np.random.default_rng(0).permutation(number)]


def text_of(seed: int, length: int, trained_share: float, has_image: bool) -> EncodedSample:
    """`<s>`, an image if any, words, `<end_of_utterance>`, `</s>`; the last words are trained."""
    ids = np.random.default_rng(seed).integers(3, VOCABULARY, length)
    ids[0], ids[-2], ids[-1] = 1, END_OF_UTTERANCE, 2
    if has_image:
        ids[2:5] = FAKE, IMAGE, FAKE
    start = length - max(int(trained_share * length), 3)
    return EncodedSample(
        key=str(seed),
        input_ids=ids,
        trained_spans=((max(start, 5), length),),
        image_positions=(3,) if has_image else (),
    )


def pixels_of(image: int) -> np.ndarray:
    """Noise, uint8 (3, 224, 224)."""
    return np.random.default_rng(image).integers(0, 256, (3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)


def pack(samples: Sequence[PlacedSample], caps: Caps = CAPS) -> list[list[PlacedSample]]:
    """By the toolkit's own rules: samples about an image stay together."""
    groups: dict[Any, list[int]] = {}
    for row, sample in enumerate(samples):
        groups.setdefault(sample.images or row, []).append(row)
    bundles = []
    for rows in groups.values():
        lengths = [len(samples[row].encoded.input_ids) for row in rows]
        pieces = [rows] if sum(lengths) <= caps.tokens else [[row] for row in rows]
        for piece in pieces:
            tokens = sum(len(samples[row].encoded.input_ids) for row in piece)
            bundles.append(
                Bundle(tuple(PackItem(0, row) for row in piece), tokens, dict.fromkeys(samples[piece[0]].images, 1))
            )
    for number in range(1, len(samples) + 1):
        packs, left = pack_window([], bundles, number, caps, np.random.default_rng(0))
        if not left:
            break
    return [[samples[item.sample] for item in pack.items] for pack in packs]


# ---------------------------------------------------------------------------------------------------------- sides


class Work(NamedTuple):
    """What a side computes in a micro-batch."""

    tokens: int
    images: int
    positions: int
    """That reach the head."""
    pairs: int
    """Of tokens in self-attention."""
    looks: int
    """Pairs of a token and an image in cross-attention."""


@dataclass
class Side:
    """One way to train: micro-batches made beforehand, and the loss of each sample in one of them."""

    model: torch.nn.Module
    micro_batches: list[Any]
    work: list[Work]
    losses: Callable[[torch.nn.Module, Any], tuple[Tensor, Tensor, Tensor]]
    """Of a micro-batch: the loss to go backward from, the loss of each position, the sample it belongs to."""


class PlainBatch(NamedTuple):
    """Arguments of transformers' forward, labels, and the sample of each token."""

    inputs: dict[str, Tensor]
    labels_BT: Tensor
    sources_BT: Tensor
    num_trained: int


def plain_losses(model: torch.nn.Module, batch: PlainBatch) -> tuple[Tensor, Tensor, Tensor]:
    """The loss that transformers 5.23 has no working one of, over all logits."""
    logits_BTV = model(**batch.inputs, use_cache=False).logits[:, :-1]
    targets = batch.labels_BT[:, 1:].flatten()
    losses = F.cross_entropy(logits_BTV.float().flatten(0, 1), targets, ignore_index=IGNORE_INDEX, reduction="none")
    return losses.sum() / batch.num_trained, losses.detach(), batch.sources_BT[:, 1:].flatten()


def packed_losses(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Ours."""
    output = model(batch=batch)
    return output.loss, output.token_losses_P, output.source_ids_P


def notebook(model: torch.nn.Module, samples: Sequence[PlacedSample], size: int) -> Side:
    """Batches of `size` samples as `IdeficsProcessor` makes them."""
    processor = IdeficsProcessor(IdeficsImageProcessorPil(image_size=IMAGE_SIZE), word_tokenizer())
    trained = num_trained(samples)
    batches, work = [], []
    for first in range(0, len(samples), size):
        members = samples[first : first + size]
        inputs = processor(
            text=[prompt(sample, processor.tokenizer) for sample in members],
            padding="longest",
            add_end_of_utterance_token=False,
            return_tensors="pt",
        )
        labels_BT = torch.full_like(inputs["input_ids"], IGNORE_INDEX)
        for row, sample in enumerate(members):
            own = sample.encoded.input_ids
            assert inputs["input_ids"][row, -len(own) :].tolist() == own.tolist(), "the processor has the same tokens"
            for start, end in sample.encoded.trained_spans:
                labels_BT[row, start - len(own) : (end - len(own)) or None] = torch.from_numpy(own[start:end])
        sources_BT = torch.tensor([[sample.source] for sample in members]).expand_as(labels_BT)
        batches.append(PlainBatch(dict(inputs), labels_BT, sources_BT, trained))
        rows, length = labels_BT.shape
        images = inputs["pixel_values"].shape[1]
        work.append(Work(rows * length, rows * images, rows * length, rows * length**2, rows * length * images))
    return Side(model, batches, work, plain_losses)


def naive_packing(model: torch.nn.Module, samples: Sequence[PlacedSample]) -> Side:
    """Packs under a dense mask, every image encoded as often as it is shown."""
    batches, work = [], []
    for members in pack(samples):
        alone = [sample._replace(images=tuple((sample.source, image) for image in sample.images)) for sample in members]  # type: ignore[misc]
        batch = as_batch(alone, num_trained(samples), lambda shown: pixels_of(shown[1]))  # type: ignore[index]
        tokens = torch.arange(len(batch.input_ids_T))
        same_TT = batch.segment_ids_T[:, None] == batch.segment_ids_T
        may_see_TT = same_TT & (tokens[:, None] >= tokens)
        mask_TT = torch.zeros(may_see_TT.shape).masked_fill(~may_see_TT, torch.finfo(torch.float32).min)
        pixels_NCHW = batch.tiles[0] if batch.tiles else torch.zeros(1, 3, 224, 224).byte()
        looks_TN = batch.image_ids_T[:, None] == torch.arange(len(pixels_NCHW))
        inputs = {
            "input_ids": batch.input_ids_T[None],
            "attention_mask": mask_TT[None, None],
            "position_ids": batch.position_ids_T[None],
            "pixel_values": normalise(pixels_NCHW)[None],
            "image_attention_mask": looks_TN.long()[None],
        }
        batches.append(PlainBatch(inputs, batch.labels_T[None], batch.source_ids_T[None], batch.num_trained_tokens))
        length, images = looks_TN.shape
        work.append(Work(length, images, length, length**2, length * images))
    return Side(model, batches, work, plain_losses)


def ours(model: torch.nn.Module, samples: Sequence[PlacedSample]) -> Side:
    """The toolkit: a pack a micro-batch."""
    batches = [as_batch(members, num_trained(samples), pixels_of) for members in pack(samples)]
    return Side(model, batches, [needed(batch) for batch in batches], packed_losses)


def needed(batch: Batch) -> Work:
    """Causal pairs inside samples, each token's own image, trained positions."""
    lengths = torch.bincount(batch.segment_ids_T)
    return Work(
        tokens=len(batch.input_ids_T),
        images=batch.num_images,
        positions=int((batch.labels_T != IGNORE_INDEX).sum()),
        pairs=int((lengths * (lengths + 1) // 2).sum()),
        looks=int((batch.image_ids_T >= 0).sum()),
    )


def as_batch(members: Sequence[PlacedSample], num_trained: int, load: Callable[[Any], np.ndarray]) -> Batch:
    """Collate one pack."""
    source = GivenImages(IdeficsImages.of_size(IMAGE_SIZE), lambda image: load(image)[None])
    return collate([members], source, train_on="assistant", num_trained_tokens=num_trained)


def num_trained(samples: Sequence[PlacedSample]) -> int:
    """Trained tokens."""
    return sum(end - start for sample in samples for start, end in sample.encoded.trained_spans)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word an id; nothing is to be learned here, but the processor asks for a tokenizer."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)
    extra = text.EXTRA_TOKENS
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in extra], special_tokens=True)
    return tokenizer


def prompt(sample: PlacedSample, tokenizer: PreTrainedTokenizerFast) -> list[Any]:
    """What the processor wants: texts and pictures in turn. It puts `<s>` and the tokens of an image by itself."""
    ids = sample.encoded.input_ids
    if not sample.images:
        return [tokenizer.decode(ids[1:])]
    picture = Image.fromarray(pixels_of(sample.images[0]).transpose(1, 2, 0))
    return [tokenizer.decode(ids[1:2]), picture, tokenizer.decode(ids[5:])]
