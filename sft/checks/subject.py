"""A model to be checked: a few short samples, and their logits by our forward and by transformers' own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from sft.batches.collate import collate
from sft.batches.image_source import NoiseImages
from sft.checks.environment import free_memory
from sft.core.precision import device, torch_dtype
from sft.core.sample import Batch, ImageRef, Message, PlacedSample, Sample
from sft.models.chat_template import ChatTemplate
from sft.models.family import Family
from sft.models.loaded_model import find_base, load_for_inference
from sft.models.lora import is_adapter_folder
from sft.models.loss import trained_positions
from sft.models.packed_model import PackedModel

CHAT = (
    Message(role="user", content=(ImageRef(source=b""), "Describe this image.")),
    Message(role="assistant", content=("A dog.",)),
    Message(role="user", content=("What is it?",)),
    Message(role="assistant", content=("A dog.",)),
)
"""The conversation whose ids a family may know (`sft.models.family.Text.golden_ids`)."""


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode, and the samples of its checks: one question about two images, and a text. The
    question is asked twice about the first image: its two results differ by rounding alone, and that of the other image
    must differ by more."""

    family: Family
    model: PackedModel
    template: ChatTemplate
    precision: str

    @property
    def noise(self) -> NoiseImages:
        """The images."""
        return NoiseImages(self.template.images)

    @cached_property
    def samples(self) -> list[PlacedSample]:
        """Short conversations about images 0, 1 and 0, and one about none."""
        return [*(self._placed(CHAT, (image,)) for image in (0, 1, 0)), self._placed(CHAT[2:], ())]

    def _placed(self, messages: Sequence[Message], images: tuple[int, ...]) -> PlacedSample:
        encoded = self.template.encode(Sample(key="check", messages=with_size(messages, self.noise.size)))
        return PlacedSample(encoded, images, source=0)

    @cached_property
    def batch(self) -> Batch:
        """All samples as one pack, with every token but the first trained."""
        on = next(self.model.parameters()).device
        return collate([self.samples], self.noise, train_on="all").to(on)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the autocast of training."""
        dtype = torch_dtype(self.precision)
        return torch.autocast(self.batch.input_ids_T.device.type, dtype, enabled=dtype != torch.float32)

    @cached_property
    def positions(self) -> list[Tensor]:
        """The trained positions of each sample, counted from its first token: all but the last, and but those before
        a token that stands for an image state."""
        positions_P = trained_positions(self.batch.labels_T)
        segments_P = self.batch.segment_ids_T[positions_P]
        lengths = [len(sample.encoded.input_ids) for sample in self.samples]
        starts = accumulate(lengths, initial=0)
        return [positions_P[segments_P == n] - start for n, start in zip(range(len(lengths)), starts, strict=False)]

    @cached_property
    def packed(self) -> tuple[float, list[Tensor]]:
        """The loss of our forward, and its logits (P, V) at the trained positions of each sample."""
        with torch.no_grad(), self.autocast():
            output = self.model(batch=self.batch)
        return float(output.loss), list(output.logits_PV.split([len(own_P) for own_P in self.positions]))

    @cached_property
    def plain(self) -> list[Tensor]:
        """The same logits by transformers' own forward, sample by sample."""
        with torch.no_grad(), self.autocast():
            logits = (self.model.plain_logits(self.batch, segment) for segment in range(len(self.samples)))
            return [own_TV[own_P].float() for own_TV, own_P in zip(logits, self.positions, strict=True)]

    @property
    def finite(self) -> bool:
        """Whether all logits are finite."""
        return all(bool(logits.isfinite().all()) for logits in self.packed[1])


def load_subject(path: str | Path) -> Subject:
    """Load a model folder, a folder of adapters or a hub id, by `load_for_inference`: in float32 where there is memory
    for it, so that correct forwards differ by little."""
    base = Path(find_base(Path(path)) if is_adapter_folder(path) else path)
    stored = sum(file.stat().st_size for file in base.glob("*.safetensors"))  # in bfloat16, as a rule
    fits = base.is_dir() and 2.5 * stored < free_memory(device())
    loaded = load_for_inference(path, precision="float32" if fits else "auto")
    precision = "bfloat16" if loaded.autocast else "float32"
    return Subject(loaded.family, loaded.model, loaded.template, precision)


def with_size(messages: Sequence[Message], size: tuple[int, int]) -> tuple[Message, ...]:
    """Return messages whose images have a size, so that nobody opens them to learn it."""

    def sized(item: str | ImageRef) -> str | ImageRef:
        return replace(item, size=size) if isinstance(item, ImageRef) else item

    return tuple(replace(message, content=tuple(map(sized, message.content))) for message in messages)
