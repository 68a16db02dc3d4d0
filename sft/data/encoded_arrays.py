"""Encoded once: the token ids of a prepared dataset as flat memory-mapped arrays.

One folder per (tokenizer, template, limits, code version). Row i owns
`input_ids[token_offsets[i]:token_offsets[i + 1]]`, and likewise its trained spans and its images. It is a sample of the
store, or the part of one that fits a pack (`sft.data.truncate`): `samples[i]` says of which. Mixture, packing and
inspection read nothing but these arrays.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.core.files import discard, mapped, read_ahead, staged, whole_file
from sft.core.parallel import ordered_map
from sft.core.sample import EncodedSample, TrainOn
from sft.data.store import Store
from sft.data.truncate import Limits, Truncation
from sft.models.chat_template import ChatTemplate

VERSION = 6  # raised when the same sample could encode to other arrays
INDEX = "index.json"
BLOCK_SAMPLES = 4096  # samples that are encoded at once, by one process

_OFFSETS_OF = {
    "input_ids": "token_offsets",
    "trained_spans": "span_offsets",
    "withheld_spans": "withheld_offsets",
    "image_rows": "image_offsets",
}
_ARRAY_OF = {offsets: name for name, offsets in _OFFSETS_OF.items()}
_NUMBERS = ("num_trained", "num_untrainable", "samples")
_ARRAYS = (*_OFFSETS_OF, *_ARRAY_OF, "image_positions", "image_weights", *_NUMBERS)


class EncodedSamples:
    """The encoded samples of one prepared dataset."""

    def __init__(self, path: Path) -> None:
        self.path = path
        index = json.loads((path / INDEX).read_text())
        self.changes: dict[str, int] = index["changes"]  # how many samples that do not fit a pack, by what was done
        self.total_tokens: int = index["tokens"]
        self._has_untrainable: bool = index["has_untrainable"]  # whether `train_on: all` leaves tokens out
        self._is_weighted: bool = index["is_weighted"]  # whether an image weighs anything but 1
        self._array = {name: mapped(path / f"{name}.bin", np.dtype(dtype)) for name, dtype in index["dtypes"].items()}
        for name in ("trained_spans", "withheld_spans"):
            self._array[name] = self._array[name].reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._array["token_offsets"]) - 1

    def __getitem__(self, row: int) -> EncodedSample:
        return EncodedSample(
            key=self.key(row),
            input_ids=self._of(row, "input_ids", "token_offsets").astype(np.int64),
            trained_spans=tuple(tuple(span) for span in self._of(row, "trained_spans", "span_offsets").tolist()),
            image_positions=tuple(self._of(row, "image_positions", "image_offsets").tolist()),
            image_weights=tuple(self._of(row, "image_weights", "image_offsets").tolist()),
            withheld_spans=tuple(tuple(span) for span in self._of(row, "withheld_spans", "withheld_offsets").tolist()),
        )

    def key(self, row: int) -> str:
        """Return a name for the sample of the store that a row comes from."""
        return f"{self.path.parents[1].name}/{self._array['samples'][row]}"

    @property
    def samples(self) -> NDArray[np.int64]:
        """The store's row of the sample that each row comes from; never falling."""
        return self._array["samples"]

    def image_rows(self, row: int) -> tuple[int, ...]:
        """Return the rows of the sample's images in the store, in reading order."""
        return tuple(self._of(row, "image_rows", "image_offsets").tolist())

    def _of(self, row: int, name: str, offsets: str) -> NDArray[Any]:
        start, end = self._array[offsets][row : row + 2]
        part: NDArray[Any] = self._array[name][start:end]
        return part

    @property
    def all_rows(self) -> NDArray[np.int64]:
        """0, 1, 2, …, for whoever is about to look at all of them."""
        self.read_ahead()
        return np.arange(len(self))

    def read_ahead(self) -> None:
        """Tell the operating system that all rows are about to be read."""
        for numbers in self._array.values():
            read_ahead(numbers)

    def num_tokens(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens of each of some samples."""
        offsets = self._array["token_offsets"]
        return np.asarray(offsets[rows + 1] - offsets[rows])

    def num_trained(self, rows: NDArray[np.int64], train_on: TrainOn) -> NDArray[np.int64]:
        """Return the trained tokens of each sample: not the first, nor image states, nor turns not to be learned."""
        if train_on == "assistant":
            return np.asarray(self._array["num_trained"][rows])
        all_but_first = self.num_tokens(rows) - 1
        return all_but_first - self._array["num_untrainable"][rows] if self._has_untrainable else all_but_first

    @property
    def num_images(self) -> int:
        """Images of all samples, shown."""
        return len(self._array["image_rows"])

    def images(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the image rows of some samples, one sample after another, and how many each has."""
        places, numbers = self._image_places(rows)
        return np.asarray(self._array["image_rows"][places]), numbers

    def image_weights(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return what each of these images counts towards the cap of a pack, one sample after another."""
        places, _ = self._image_places(rows)
        return np.asarray(self._array["image_weights"][places]) if self._is_weighted else np.ones_like(places)

    def _image_places(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        offsets = self._array["image_offsets"]
        starts, numbers = offsets[rows], offsets[rows + 1] - offsets[rows]
        places = np.repeat(starts - np.concatenate(([0], np.cumsum(numbers)))[:-1], numbers) + np.arange(numbers.sum())
        return places, np.asarray(numbers)


def encode_samples(
    samples: Store,
    template: ChatTemplate,
    path: Path,
    *,
    limits: Limits | None = None,
    num_proc: int = 1,
    on_progress: Callable[[int], None] = lambda samples: None,
) -> EncodedSamples:
    """Encode samples into `path`, in bounded memory; what is there already is opened as it is. What is over `limits` is
    shortened, split or left out. Each block is a file of its own until all are there, so that after a kill none is
    encoded twice."""
    if (path / INDEX).is_file():
        return EncodedSamples(path)
    folder = path.with_name(f".{path.name}.blocks")
    borders = [*range(0, len(samples), BLOCK_SAMPLES), len(samples)]
    blocks = [
        _Block(samples, start, stop, template, limits, folder / f"{start:010d}-{stop:010d}.npz")
        for start, stop in pairwise(borders)
    ]
    missing = [block for block in blocks if not block.file.is_file()]
    done = len(samples) - sum(block.stop - block.start for block in missing)
    for num_samples in ordered_map(_write_block, missing, num_proc):
        done += num_samples
        on_progress(done)
    _join_blocks([block.file for block in blocks], template, path)
    discard(folder)
    return EncodedSamples(path)


def _join_blocks(blocks: Sequence[Path], template: ChatTemplate, path: Path) -> None:
    ends = dict.fromkeys(_OFFSETS_OF, 0)  # where each of the arrays of all blocks ends so far
    has_untrainable = is_weighted = False
    changes: Counter[str] = Counter()
    id_type = _id_type(template)
    with staged(path) as folder, ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in _ARRAYS}
        for offsets in _OFFSETS_OF.values():
            files[offsets].write(np.zeros(1, np.int64).tobytes())
        for file in blocks:
            with np.load(file) as stored:
                block = dict(stored)
            changes.update(json.loads(block.pop("changes").item()))
            for name, array in block.items():
                shift = ends.get(_ARRAY_OF.get(name, ""), 0)  # offsets count within the block; everything else stays
                files[name].write((array + shift).tobytes())
            for name in _OFFSETS_OF:
                ends[name] += len(block[name])
            has_untrainable |= bool(block["num_untrainable"].any())
            is_weighted |= bool((block["image_weights"] != 1).any())
        index = {
            "tokens": ends["input_ids"],
            "has_untrainable": has_untrainable,
            "is_weighted": is_weighted,
            "changes": dict(sorted(changes.items())),
            "dtypes": {name: (id_type if name == "input_ids" else np.dtype(np.int64)).str for name in _ARRAYS},
        }
        (folder / INDEX).write_text(json.dumps(index) + "\n")


@dataclass(frozen=True)
class _Block:
    samples: Store
    start: int
    stop: int
    template: ChatTemplate
    limits: Limits | None
    file: Path  # where its arrays are kept until all blocks are there


def _id_type(template: ChatTemplate) -> np.dtype[Any]:
    return np.dtype(np.uint16 if len(template.tokenizer) <= 2**16 else np.uint32)


def _write_block(block: _Block) -> int:
    """Write the arrays of some samples, with offsets that count from the first of them; return how many samples."""
    truncation = Truncation(block.template, block.limits)
    pieces = [
        (row, piece)
        for row, (sample, image_rows) in enumerate(block.samples.stored_samples(block.start, block.stop), block.start)
        for piece in truncation.pieces(sample, image_rows)
    ]
    encoded = [piece.encoded for _, piece in pieces]
    image_rows = [piece.image_rows for _, piece in pieces]
    ids = np.concatenate([np.empty(0, np.int64), *(e.input_ids for e in encoded)])
    num_trained = [sum(end - max(start, 1) for start, end in e.trained_spans) for e in encoded]
    arrays: dict[str, Any] = {
        "input_ids": ids.astype(_id_type(block.template)),
        "token_offsets": np.cumsum([len(e.input_ids) for e in encoded], dtype=np.int64),
        "trained_spans": np.array([span for e in encoded for span in e.trained_spans], np.int64).reshape(-1, 2),
        "span_offsets": np.cumsum([len(e.trained_spans) for e in encoded], dtype=np.int64),
        "withheld_spans": np.array([span for e in encoded for span in e.withheld_spans], np.int64).reshape(-1, 2),
        "withheld_offsets": np.cumsum([len(e.withheld_spans) for e in encoded], dtype=np.int64),
        "image_positions": np.array([p for e in encoded for p in e.image_positions], np.int64),
        "image_weights": np.array([weight for e in encoded for weight in e.image_weights], np.int64),
        "image_rows": np.array([row for rows in image_rows for row in rows], np.int64),
        "image_offsets": np.cumsum([len(rows) for rows in image_rows], dtype=np.int64),
        "num_trained": np.array(num_trained, np.int64),
        "num_untrainable": np.array([_num_untrainable(e, block.template) for e in encoded], np.int64),
        "samples": np.array([row for row, _ in pieces], np.int64),
        "changes": np.array(json.dumps(truncation.changes)),
    }
    with whole_file(block.file) as file:
        np.savez(file, **arrays)
    return block.stop - block.start


def _num_untrainable(encoded: EncodedSample, template: ChatTemplate) -> int:
    """Return how many tokens but the first `train_on: all` does not train: image states, turns not to be learned."""
    token_id = template.images.state_token_id
    is_state = encoded.input_ids == token_id if token_id is not None else np.zeros(len(encoded.input_ids), bool)
    for start, end in encoded.withheld_spans:
        is_state[start:end] = True
    return int(np.count_nonzero(is_state))


def encoding_name(template: ChatTemplate, limits: Limits) -> str:
    """Return the name of the folder that holds what this template and tokenizer encode within these limits."""
    size = f"{limits.tokens}-tokens-{limits.image_weight}-images"
    return f"{template.fingerprint}-v{VERSION}-{size}-{limits.long_conversations}"
