"""One pack as the model is given it: what `idefics-sft inspect` shows.

    recipe, sources ─ the same plan as in training ─> Pack ─ collate ─> Batch ─ describe ─> dict ─> terminal, page, JSON

The description is read off the Batch, not off the samples behind it: what is shown is what is trained.
"""

from __future__ import annotations

import io
import json
from base64 import b64encode
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, groupby, islice, pairwise, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from sft.batches.collate import Shown, collate
from sft.batches.image_source import StoredImages
from sft.batches.look_ahead import look_ahead
from sft.batches.pack_stream import Planner
from sft.core.errors import UserError, nearest
from sft.core.sample import IGNORE_INDEX, Batch, Pack, SkipSample, Tiling
from sft.data.sources import Sources
from sft.models.chat_template import IMAGE, ChatTemplate
from sft.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

PAGE = Path(__file__).with_name("inspect_pack.html")
_PLACE = "{description}"
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer prints for the first bytes of a character


def inspect_pack(
    recipe: Recipe, sources: Sources, template: ChatTemplate, *, number: int = 0, source: str | None = None
) -> dict[str, Any]:
    """Describe pack `number` of a run, counted from 0; with `source`, the first from there on with a sample of it.

    An image that cannot be read any more is black, as in training, and what shows it is not trained on.

    Raises:
        UserError: the run has no such pack.
    """
    data = recipe.data
    number, pack = find_pack(recipe, sources, number, source)
    step = number // recipe.packs_per_step + 1
    placed = [sources.sample(item) for item in pack.items]
    crop = (recipe.seed, step) if data.augment == "crop" else None
    problems: dict[int, str] = {}

    def note(image: int, skip: SkipSample) -> None:
        problems[image] = f"{skip.reason}: {skip.detail}" if skip.detail else skip.reason

    images = StoredImages(sources.reader, template.images, crop, on_failure=note)
    batch = collate([placed], images, train_on=data.train_on, pack_isolation=data.pack_isolation, forgive_images=True)
    shown = Shown.of(dict.fromkeys(image for sample in placed for image in sample.images), images)
    return {
        "pack": number,
        "step": step,
        "steps": _steps(recipe, sources),
        "train_on": data.train_on,
        "pack_isolation": data.pack_isolation,
        **describe(
            batch,
            template,
            lengths=[len(sample.encoded.input_ids) for sample in placed],
            source_names=[config.name for config in data.mixture],
            sequence_length=data.sequence_length,
            problems=[problems.get(image) for image in shown.numbers],
        ),
    }


def find_pack(recipe: Recipe, sources: Sources, number: int, source: str | None) -> tuple[int, Pack]:
    """Return the pack that training draws as number `number`, or the first from there on with a sample of `source`.

    Raises:
        UserError: there is none.
    """
    names = [config.name for config in recipe.data.mixture]
    if source is not None and source not in names:
        raise UserError(f"--source {source}: no such source{nearest(source, names)} (sources: {', '.join(names)})")
    total = _steps(recipe, sources) * recipe.packs_per_step
    if not 0 <= number < total:
        raise UserError(f"--pack {number}: the run has {total:,} packs, numbered from 0")
    planner = Planner(sources.sources, recipe.data, packs_per_step=recipe.packs_per_step, seed=recipe.seed)
    for found, pack in islice(enumerate(chain.from_iterable(planner.windows())), number, total):
        if source is None or any(names[item.source] == source for item in pack.items):
            return found, pack
    if source is None:
        raise UserError(f"--pack {number}: the mixture is exhausted before it")
    raise UserError(f"--source {source}: no pack from --pack {number} to the last holds a sample of it")


def _steps(recipe: Recipe, sources: Sources) -> int:
    return recipe.training.max_steps or int(look_ahead(recipe, sources.sources)["steps"])


def describe(
    batch: Batch,
    template: ChatTemplate,
    *,
    lengths: Sequence[int],
    source_names: Sequence[str],
    sequence_length: int,
    problems: Sequence[str | None] = (),
) -> dict[str, Any]:
    """Describe a pack token by token. `lengths` are those of its samples: without isolation the batch does not say
    where one ends. `problems` are those of its images, in the order of the batch."""
    tokens = list(_tokens(batch, template))
    borders = pairwise(accumulate(lengths, initial=0))
    samples: list[dict[str, Any]] = [
        {
            "key": key,
            "source": source_names[int(batch.source_ids_T[start])],
            "start": start,
            "end": end,
            "trained_tokens": _num_trained(tokens[start:end]),
            "images": [token["image"] for token in tokens[start:end] if token["kind"] == "image"],
            "problem": batch.dirty.get(key),
        }
        for key, (start, end) in zip(batch.keys, borders, strict=True)
    ]
    return {
        "sequence_length": sequence_length,
        "figures": {
            "tokens": len(tokens),
            "trained_tokens": _num_trained(tokens),
            "fill": len(tokens) / sequence_length,
            "trained_share": _num_trained(tokens) / len(tokens),
            "samples": len(samples),
            "images": sum(len(sample["images"]) for sample in samples),
            "distinct_images": batch.num_images,
        },
        "sources": [_source(name, samples) for name in source_names],
        "samples": samples,
        "images": [
            _image(tile_CHW, tiling, template) | {"problem": problem}
            for tile_CHW, tiling, problem in zip_longest(_whole_images(batch), batch.tilings, problems)
        ],
        "tokens": tokens,
    }


def page(description: dict[str, Any]) -> str:
    """Return the description as one HTML page that needs nothing else."""
    data = json.dumps(description).replace("<", r"\u003c")  # no text can close the element that holds it
    return PAGE.read_text(encoding="utf-8").replace(_PLACE, data, 1)


def token_texts(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> Iterator[tuple[str, bool]]:
    """Yield the text that each token adds, and whether it is a special one; joined, they are the text.

    A character of several tokens (bytes) comes with its last one; the others add nothing.
    """
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    for is_special, run in groupby(ids, special.__contains__):
        own = list(run)
        for text in tokenizer.convert_ids_to_tokens(own) if is_special else _run_texts(tokenizer, own):
            yield text, is_special


def _run_texts(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> Iterator[str]:
    """Decode each token after the one before it, since a tokenizer drops the first space of what it decodes."""

    def decode(some: list[int]) -> str:
        return str(tokenizer.decode(some, clean_up_tokenization_spaces=False))

    before = done = 0  # ids[before:done] were given out last
    for end in range(1, len(ids) + 1):
        text = decode(ids[before:end])
        if text.endswith(_UNFINISHED) and end < len(ids):
            yield ""
        else:
            yield text[len(decode(ids[before:done])) :]
            before, done = done, end


def _tokens(batch: Batch, template: ChatTemplate) -> Iterator[dict[str, Any]]:
    ids: list[int] = batch.input_ids_T.tolist()
    names = template.tokenizer.convert_ids_to_tokens(ids)
    columns = (batch.labels_T, batch.position_ids_T, batch.segment_ids_T, batch.image_ids_T, batch.state_ids_T)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    texts = token_texts(template.tokenizer, ids)
    image_token_id = template.tokenizer.convert_tokens_to_ids(IMAGE)
    first_states = {-1, *accumulate(batch.num_states, initial=0)}  # an image is shown once, where its states begin
    for index, name, (text, is_special), (label, position, segment, image, state) in zip(
        ids, names, texts, rows, strict=True
    ):
        is_image = index == image_token_id and state in first_states
        kind = "image" if is_image else "state" if state >= 0 else "special" if is_special else "text"
        yield {
            "id": index,
            "name": name,
            "text": text,
            "kind": kind,
            "label": None if label == IGNORE_INDEX else label,
            "position": position,
            "segment": segment,
            "image": None if image < 0 else image,
        }


def _num_trained(tokens: Sequence[dict[str, Any]]) -> int:
    return sum(token["label"] is not None for token in tokens)


def _source(name: str, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    own = [sample for sample in samples if sample["source"] == name]
    return {
        "name": name,
        "samples": len(own),
        "tokens": sum(sample["end"] - sample["start"] for sample in own),
        "trained_tokens": sum(sample["trained_tokens"] for sample in own),
    }


def _whole_images(batch: Batch) -> Iterator[Tensor]:
    """Yield the tile of each image that shows the whole of it, which is its last."""
    for number, tiles_KCHW in batch.tiles_by_image():
        height, width = batch.tilings[number].tile_sizes[-1]
        yield tiles_KCHW[-1, :, :height, :width]


def _image(tile_CHW: Tensor, tiling: Tiling, template: ChatTemplate) -> dict[str, Any]:
    """Describe an image: how it is cut, what it takes, and its pixels."""
    file, images = io.BytesIO(), template.images
    Image.fromarray(tile_CHW.permute(1, 2, 0).numpy()).save(file, "PNG")
    return tiling._asdict() | {
        "tokens": len(images.token_ids(template.tokenizer, tiling)),
        "work_in_tokens": round(images.weight(tiling) * images.cost_in_tokens),
        "png": b64encode(file.getvalue()).decode(),
    }
