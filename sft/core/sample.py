"""The nouns: what an adapter makes, what the template encodes, what is packed and what the model is given.

    raw row ─adapter─> Sample ─chat template─> EncodedSample ─mixture, packing─> Pack ─collate─> Batch ─model─> loss

Shape letters, here and wherever tensors are named:
    T  tokens of a micro-batch, its packs laid one after another without padding
    N  distinct images of a micro-batch
    K  tiles of these images that have one size
    R  image states: the vectors that the vision tower and what follows it make of the images, laid end to end
    E  size of an image state
    C, H, W  channels, height, width
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:  # so that the command line starts without torch
    import numpy as np
    import torch
    from torch import Tensor


IGNORE_INDEX = -100  # label of a position that is not trained, as in torch's `cross_entropy`

NO_SOURCE = -1  # the source of a dummy, whose loss counts nothing

Role = Literal[
    "system",  # text that sets the scene; IDEFICS-1 has no name for this role, it is printed as it is
    "user",
    "assistant",
    "document",  # a web document or an image-text pair of the pre-training replay: no role is printed
]
TrainOn = Literal["assistant", "all"]
Policy = Literal["prefix", "split", "drop"]
"""What is done with a conversation that does not fit a pack (`sft.data.truncate`)."""
Orientation = Literal["apply", "ignore"]
MAX_PIXELS = 65_000_000
"""Pixels of an image: telephones take 50 million (8,192 x 6,144) and 64 million (9,248 x 6,936)."""


class SkipSample(Exception):  # noqa: N818  (a decision, not an error)
    """This record is left out. `reason` is a fixed phrase, so that records can be counted by it. `filtered` marks a
    record that is sound but left out by a policy of its dataset; it does not count as dirty. `detail` says what was
    found, for the list of skips: the name of the missing image. `where` is the file and line, of a record that never
    was a row."""

    def __init__(self, reason: str, *, filtered: bool = False, detail: str = "", where: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.filtered = filtered
        self.detail = detail
        self.where = where

    @property
    def explained(self) -> str:
        """The reason, with the detail in brackets."""
        return f"{self.reason} ({self.detail})" if self.detail else self.reason

    def __reduce__(self) -> tuple[object, ...]:
        return partial(SkipSample, filtered=self.filtered, detail=self.detail, where=self.where), (self.reason,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """How encoded images become pixels (`sft.core.images`)."""

    orientation: Orientation = "apply"
    """`apply`: they are turned as their EXIF says and as a viewer shows them. `ignore`: they are as stored."""
    max_pixels: int = MAX_PIXELS
    """Images of more pixels are refused."""


AS_SHOWN = Decoding()  # what is asked of a model outside of prepared data is seen as a viewer shows it


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRef:
    """An image that is not opened yet: a file or its encoded bytes. Light to hold and to send to a worker."""

    source: Path | bytes
    size: tuple[int, int] | None = None
    """Width and height in pixels as it is seen, where they are known without opening the image."""
    decoding: Decoding = AS_SHOWN


class Tiling(NamedTuple):
    """How an image is cut for the vision tower: into a grid of tiles of one size and a small copy of the whole, or,
    with 0 rows and columns, into one tile that shows the whole."""

    rows: int
    columns: int
    height: int  # height of a tile in pixels
    width: int  # width of a tile in pixels
    sizes: tuple[tuple[int, int], ...] = ()
    """Height and width of what each tile shows, where they differ: the rest of a tile, on the right and at the bottom,
    is padding. Empty where tiles are full."""

    @property
    def num_tiles(self) -> int:
        """Tiles of the grid and the one that shows the whole image."""
        return self.rows * self.columns + 1

    @property
    def tile_sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of what each tile shows."""
        return self.sizes or ((self.height, self.width),) * self.num_tiles


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn. `content` is text and images in reading order."""

    role: Role
    content: tuple[str | ImageRef, ...]
    is_trained: bool = True
    """False for a turn that the data mark as not to be learned: nothing of its text has a label."""


def question_and_answer(question: Sequence[str | ImageRef], answer: str) -> tuple[Message, ...]:
    """Return the two messages of a question, with its images, and its answer."""
    return Message(role="user", content=tuple(question)), Message(role="assistant", content=(answer,))


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One conversation or one document. `key` names it in every log and error: `easy_vqa/train/questions/17`."""

    key: str
    messages: tuple[Message, ...]

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """All images in reading order."""
        return tuple(item for message in self.messages for item in message.content if isinstance(item, ImageRef))


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedSample:
    """A sample as token ids, with what is trained and where images stand, all by `sft.models.chat_template`."""

    key: str
    input_ids: np.ndarray
    """int64 (tokens,)"""
    trained_spans: tuple[tuple[int, int], ...]
    """Half-open token ranges that answers-only training predicts (design decision 10)."""
    image_positions: tuple[int, ...]
    """Where the tokens of each image begin, in reading order."""
    image_weights: tuple[int, ...] = ()
    """What each image counts towards the cap of a pack (`Caps.image_weight`); empty: 1 each."""
    withheld_spans: tuple[tuple[int, int], ...] = ()
    """Half-open token ranges of turns that are not to be learned (`Message.is_trained`): never predicted."""

    def trained_ranges(self, train_on: TrainOn) -> tuple[tuple[int, int], ...]:
        """Return the token ranges that are predicted: the answers, or `all` after the first that are not withheld."""
        if train_on == "assistant":
            return self.trained_spans
        borders = [1, *(border for span in self.withheld_spans for border in span), len(self.input_ids)]
        return tuple(zip(borders[::2], borders[1::2], strict=True))


class PackItem(NamedTuple):
    """A sample's place in the prepared data: which source, which of its samples."""

    source: int
    sample: int


class Caps(NamedTuple):
    """What a pack may hold."""

    tokens: int
    image_weight: int
    """Sum over its images of what each weighs (`sft.models.family.Images.weight`): for IDEFICS-1 their number."""
    samples_per_image: int
    """Samples that may share an image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """The samples that share one row of `sequence_length` tokens."""

    items: tuple[PackItem, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """A micro-batch: its packs laid one after another in a single row, nothing padded. Labels are not shifted: they
    line up with `input_ids_T` and can be printed beside them. The first label of a sample is IGNORE_INDEX, since the
    token before it belongs to another sample; `collate` names the one exception."""

    input_ids_T: Tensor
    labels_T: Tensor
    position_ids_T: Tensor
    """Restart at 0 at each segment."""
    segment_ids_T: Tensor
    """0, 1, 2, … : tokens attend only tokens of their own segment, at or before them."""
    image_ids_T: Tensor
    """Which of the N images the token looks at; -1 = none."""
    source_ids_T: Tensor
    """Which source of the mixture the token comes from, for losses by source; NO_SOURCE: it only fills a batch."""
    state_ids_T: Tensor
    """Which of the R image states stands in place of the token; -1 = the token itself, always so in a family whose text
    looks at images from the outside (IDEFICS-1)."""
    tiles: tuple[Tensor, ...]
    """uint8 (K, C, H, W), a tensor for each size of tile, in the order of the images; the model normalises them on its
    device. Empty without images. With `features_RE` they are the tiles of the images of `to_encode` only."""
    num_states: tuple[int, ...]
    """How many states each of the N images has. Images are numbered so that those with tiles of one size follow one
    another, each size in the order in which its images are shown."""
    tilings: tuple[Tiling, ...]
    """How each of the N images is cut."""
    num_trained_tokens: int
    """Trained tokens of the whole optimizer step, over all its micro-batches: what the summed loss is divided by."""
    features_RE: Tensor | None = None
    """The states of all images by `sft.batches.feature_cache`: float16, zeros for the images of `to_encode`."""
    to_encode: Mapping[int, int] = field(default_factory=dict)
    """Images whose states are not in the cache: the number of each, and its key."""
    sequences: tuple[Tensor, ...] = ()
    """Sequences that share their beginnings, each the indices of its tokens in the row, on the CPU: tokens attend
    inside these instead of inside segments. Only in evaluation."""
    packs: tuple[tuple[str, ...], ...] = ()
    """Keys of the samples of each pack."""
    pack_ends: tuple[int, ...] = ()
    """How many tokens of the row there are up to the end of each pack."""
    dirty: Mapping[str, str] = field(default_factory=dict)
    """Keys of samples with an image that fails only now, and why: the image is zeros, the samples have no labels."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of all samples."""
        return tuple(key for pack in self.packs for key in pack)

    @property
    def num_images(self) -> int:
        """Distinct images, a dummy's among them."""
        return len(self.num_states)

    def tiles_by_image(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of each image whose tiles are here, and these."""
        numbers = iter(range(self.num_images) if self.features_RE is None else sorted(self.to_encode))
        for tiles_KCHW in self.tiles:
            while len(tiles_KCHW):
                number = next(numbers)  # as their tiles lie, since numbers follow the sizes of tiles
                own = self.tilings[number].num_tiles
                yield number, tiles_KCHW[:own]
                tiles_KCHW = tiles_KCHW[own:]

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch with its tensors on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: value.to(device) for name, value in moved.items() if hasattr(value, "to")}
        return replace(self, tiles=tuple(tiles.to(device) for tiles in self.tiles), **moved)


class PlacedSample(NamedTuple):
    """A sample as it stands in a pack."""

    encoded: EncodedSample
    images: tuple[int, ...]
    """Number of each of its images, in reading order; samples about one image share its number."""
    source: int
