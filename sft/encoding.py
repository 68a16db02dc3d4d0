"""Encoded once: the token ids of a prepared dataset as flat memory-mapped arrays.

One folder per (tokenizer, template, code version). Sample i owns `input_ids[token_offsets[i]:token_offsets[i + 1]]`,
and likewise its trained spans and its images. Mixture, packing and inspection read nothing but these arrays.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.chat_template import ChatTemplate
from sft.sample import EncodedSample, Sample, TrainOn

VERSION = 1
"""Raised when the same sample could encode to other arrays."""


class EncodedSamples:
    """The encoded samples of one prepared dataset."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._array = {file.stem: np.load(file, mmap_mode="r") for file in path.glob("*.npy")}

    def __len__(self) -> int:
        return len(self._array["token_offsets"]) - 1

    def __getitem__(self, row: int) -> EncodedSample:
        return EncodedSample(
            key=f"{self.path.parents[1].name}/{row}",
            input_ids=self._of(row, "input_ids", "token_offsets").astype(np.int64),
            trained_spans=tuple(tuple(span) for span in self._of(row, "trained_spans", "span_offsets").tolist()),
            image_positions=tuple(self._of(row, "image_positions", "image_offsets").tolist()),
        )

    def image_rows(self, row: int) -> tuple[int, ...]:
        """Rows of the sample's images in the store, in reading order."""
        return tuple(self._of(row, "image_rows", "image_offsets").tolist())

    def _of(self, row: int, name: str, offsets: str) -> NDArray[Any]:
        start, end = self._array[offsets][row : row + 2]
        part: NDArray[Any] = self._array[name][start:end]
        return part

    @cached_property
    def num_tokens(self) -> NDArray[np.int64]:
        """Tokens of each sample."""
        return np.asarray(np.diff(self._array["token_offsets"]))

    def num_trained(self, train_on: TrainOn) -> NDArray[np.int64]:
        """Trained tokens of each sample; the first token never is."""
        if train_on == "all":
            return self.num_tokens - 1
        spans = self._array["trained_spans"]
        lengths = np.concatenate(([0], np.cumsum(spans[:, 1] - np.maximum(spans[:, 0], 1))))
        return np.asarray(np.diff(lengths[self._array["span_offsets"]]))

    @property
    def images(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Image rows of all samples in one array, and where each sample's begin."""
        return self._array["image_rows"], self._array["image_offsets"]


def encode_samples(
    samples: Iterable[tuple[Sample, tuple[int, ...]]], template: ChatTemplate, path: Path
) -> EncodedSamples:
    """Encode samples, each with the rows of its images, into `path`; what is there already is opened as it is."""
    if (path / "index.json").is_file():
        return EncodedSamples(path)
    staging = path.with_name(f".{path.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    encoded, rows = [], []
    for sample, image_rows in samples:
        encoded.append(template.encode(sample))
        rows.append(image_rows)
    id_type = np.uint16 if len(template.tokenizer) <= 2**16 else np.uint32
    arrays = {
        "input_ids": np.concatenate([e.input_ids for e in encoded]).astype(id_type),
        "token_offsets": _offsets([len(e.input_ids) for e in encoded]),
        "trained_spans": np.array([span for e in encoded for span in e.trained_spans], dtype=np.int64).reshape(-1, 2),
        "span_offsets": _offsets([len(e.trained_spans) for e in encoded]),
        "image_positions": np.array([p for e in encoded for p in e.image_positions], dtype=np.int64),
        "image_rows": np.array([row for image_rows in rows for row in image_rows], dtype=np.int64),
        "image_offsets": _offsets([len(image_rows) for image_rows in rows]),
    }
    for name, array in arrays.items():
        np.save(staging / f"{name}.npy", array)
    index = {"version": VERSION, "samples": len(encoded), "tokens": int(arrays["token_offsets"][-1])}
    (staging / "index.json").write_text(json.dumps(index) + "\n")
    shutil.rmtree(path, ignore_errors=True)  # a folder without its index
    staging.rename(path)
    return EncodedSamples(path)


def fingerprint(template: ChatTemplate) -> str:
    """Name of the folder that holds what this template and tokenizer encode."""
    return f"{template.fingerprint}-v{VERSION}"


def _offsets(lengths: list[int]) -> NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(np.array(lengths, dtype=np.int64))))
