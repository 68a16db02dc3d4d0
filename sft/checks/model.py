"""Checks of a model: its tokenizer is the one it was trained with, it sees, and our forward equals transformers'."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sft.batches.collate import collate
from sft.checks.environment import free_memory
from sft.checks.finding import Finding
from sft.core.precision import device, torch_dtype
from sft.core.sample import Batch, ImageRef, Message, PlacedSample, Sample
from sft.models.chat_template import ChatTemplate
from sft.models.family import ModelFamily
from sft.models.lora import is_adapter_folder
from sft.models.open_model import find_base, load_for_inference

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
"""Largest difference of the logits of two correct forwards, as a share of the largest logit. Measured: 0.2 and more
with wrong attention; with right attention 1e-6 in float32 and 0.01 in bfloat16."""

CHAT = (
    Message(role="user", content=(ImageRef(source=b""), "Describe this image.")),
    Message(role="assistant", content=("A dog.",)),
    Message(role="user", content=("What is it?",)),
    Message(role="assistant", content=("A dog.",)),
)
"""The conversation whose ids a family may know (`ModelFamily.golden_ids`)."""


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode, and the samples of its checks: one question about two images, and a text.

    The question is asked twice about the first image: its two results differ by rounding alone, and that of the other
    image must differ by more.
    """

    family: ModelFamily
    model: nn.Module
    template: ChatTemplate
    precision: str

    @cached_property
    def samples(self) -> list[PlacedSample]:
        """Short conversations about images 0, 1 and 0, and one about none."""
        return [*(self._placed(CHAT, (image,)) for image in (0, 1, 0)), self._placed(CHAT[2:], ())]

    def _placed(self, messages: Sequence[Message], images: tuple[int, ...]) -> PlacedSample:
        return PlacedSample(self.template.encode(Sample(key="check", messages=tuple(messages))), images, source=0)

    @cached_property
    def batch(self) -> Batch:
        """All samples as one pack, with every token but the first trained."""
        size = self.family.image_size(self.model.config)
        on = next(self.model.parameters()).device
        return collate([self.samples], lambda number: noise(number, size), train_on="all", image_size=size).to(on)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the autocast of training."""
        dtype = torch_dtype(self.precision)
        return torch.autocast(self.batch.input_ids_T.device.type, dtype, enabled=dtype != torch.float32)

    @cached_property
    def packed(self) -> tuple[float, list[Tensor]]:
        """The loss of our forward, and its logits (T - 1, V) of each sample."""
        with torch.no_grad(), self.autocast():
            output = self.model(batch=self.batch)
        lengths = [len(sample.encoded.input_ids) - 1 for sample in self.samples]
        return float(output.loss), list(output.logits_PV.split(lengths))

    @cached_property
    def plain(self) -> list[Tensor]:
        """The same logits by transformers' own forward, sample by sample."""
        batch, result = self.batch, []
        with torch.no_grad(), self.autocast():
            for segment in range(len(self.samples)):
                own_T = batch.segment_ids_T == segment
                logits_TV = self.family.plain_logits(
                    self.model, batch.input_ids_T[own_T], batch.image_ids_T[own_T], batch.pixel_values_NCHW
                )
                result.append(logits_TV[:-1].float())
        return result

    @property
    def finite(self) -> bool:
        """Whether all logits are finite."""
        return all(bool(logits.isfinite().all()) for logits in self.packed[1])


def load_subject(path: str | Path) -> Subject:
    """Load a model folder, a folder of adapters or a hub id: in float32 where there is memory for it, so that correct
    forwards differ by little.

    Raises:
        UserError: see `load_for_inference`.
    """
    base = Path(find_base(Path(path)) if is_adapter_folder(path) else path)
    stored = sum(file.stat().st_size for file in base.glob("*.safetensors"))  # in bfloat16, as a rule
    fits = base.is_dir() and 2.5 * stored < free_memory(device())
    loaded = load_for_inference(path, precision="float32" if fits else "auto")
    precision = "bfloat16" if loaded.autocast else "float32"
    return Subject(loaded.family, loaded.model, loaded.template, precision)


def noise(number: int, size: int) -> NDArray[np.uint8]:
    """Return an image (3, size, size) of noise that depends on its number alone."""
    return np.random.default_rng(number).integers(0, 256, (3, size, size), dtype=np.uint8)


def check_model(subject: Subject) -> Iterator[Finding]:
    """Run all checks of a model, one after another. Where weights are not finite, the others are skipped."""
    yield check_tokens(subject)
    weights = check_weights(subject)
    yield weights
    if weights.result == "failed":
        names = ("gates", "image changes logits", "loss", "gradients of the extra rows", "grouped attention")
        yield from (Finding(name=name, result="skipped", found="weights are not finite") for name in names)
        return
    yield check_gates(subject)
    yield check_image(subject)
    yield check_loss(subject)
    yield check_extra_rows(subject)
    yield check_attention(subject)


def check_tokens(subject: Subject) -> Finding:
    """Check that a chat has the ids that the model was trained with, where they are known, and follows the rules of
    LLaMA-1 where they are not.

    transformers 5 can rebuild a tokenizer by other rules without a warning: 32 tokens in place of 35 for a short chat.
    """
    name, template, config = "token ids", subject.template, subject.model.config
    ids = template.encode(Sample(key="check", messages=CHAT)).input_ids.tolist()
    golden = subject.family.golden_ids(config)
    advice = "take the tokenizer.json of the base model"
    if golden is not None:
        if ids == golden:
            return Finding(name=name, result="ok", found=f"those of idefics-9b-instruct ({len(ids)} golden ids)")
        at = next(i for i in range(len(ids) + 1) if ids[: i + 1] != golden[: i + 1])
        pieces = template.tokenizer.convert_ids_to_tokens(ids[at : at + 3])
        found = (
            f"{ids[at : at + 3]} {pieces} at {at} of a chat, idefics-9b-instruct was trained with {golden[at : at + 3]}"
        )
        return Finding(name=name, result="failed", found=found, advice=advice, of_input=True)
    wrong = _wrong_with_tokens(template, ids, template.text(CHAT), subject.family.num_rows(config))
    if wrong:
        return Finding(name=name, result="failed", found=wrong, advice=advice, of_input=True)
    return Finding(name=name, result="ok", found="follow the rules of LLaMA-1; no known ids for this vocabulary")


def _wrong_with_tokens(template: ChatTemplate, ids: Sequence[int], text: str, num_rows: int) -> str:
    """Return which rule of LLaMA-1 a vocabulary breaks that is not LLaMA-1's; empty where it keeps them all."""
    tokenizer = template.tokenizer
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    if max(ids) >= num_rows:
        return f"{tokens[ids.index(max(ids))]!r} has id {max(ids)}, the model has {num_rows} rows"
    if tokenizer.unk_token_id in ids:
        return f"{tokenizer.unk_token!r} stands in a chat of plain English"
    for before, index, token in zip(ids, ids[1:], tokens[1:], strict=False):
        if before in special and index not in special and not token.startswith("▁"):
            return f"text after a special token begins with {token!r}, not with '▁'"
    written = "".join(tokens).replace("▁", "").replace("<0x0A>", "").replace("\n", "")
    rendered = "".join(text.split())
    if written != rendered:
        at = next(i for i in range(len(rendered) + 1) if written[: i + 1] != rendered[: i + 1])
        return f"a chat comes back with {written[at : at + 20]!r} where {rendered[at : at + 20]!r} was written"
    return ""


def check_weights(subject: Subject) -> Finding:
    """Check that every weight is finite."""
    broken = [name for name, weight in subject.model.named_parameters() if not _is_finite(weight.detach())]
    if broken:
        found = f"{len(broken)} tensors hold NaN or infinity, {broken[0]} among them"
        advice = "the base is damaged; get it again"
        return Finding(name="weights", result="failed", found=found, advice=advice, of_input=True)
    count = sum(weight.numel() for weight in subject.model.parameters())
    return Finding(name="weights", result="ok", found=f"{count:,} numbers, all finite")


def _is_finite(weight: Tensor) -> bool:
    if not weight.is_floating_point() or not weight.numel():
        return True  # 4-bit weights are bytes
    return all(bool(end.isfinite()) for end in torch.aminmax(weight))


def _gates(subject: Subject) -> list[Tensor]:
    return [p.detach() for n, p in subject.model.named_parameters() if subject.family.group_of(n) == "gates"]


def check_gates(subject: Subject) -> Finding:
    """Check that a gate of cross-attention is open: a model whose gates are all zero has not learned to see."""
    largest = max((float(gate.abs().max()) for gate in _gates(subject)), default=0.0)
    if largest == 0.0:
        advice = "train model.trainable: [gates, …], and give it images to learn from"
        return Finding(name="gates", result="warning", found="all are 0: no image has any effect yet", advice=advice)
    return Finding(name="gates", result="ok", found=f"the widest is open by {np.tanh(largest):.3g}")


def check_image(subject: Subject) -> Finding:
    """Check that another image changes the logits."""
    name = "image changes logits"
    if not subject.finite:
        return _not_finite(name, subject)
    if not any(bool(gate.any()) for gate in _gates(subject)):
        return Finding(name=name, result="skipped", found="the gates are all 0")
    first, other, again = subject.packed[1][:3]
    by_image, by_rounding = float((first - other).abs().max()), float((first - again).abs().max())
    if by_image <= 2 * by_rounding:
        found = f"two images give logits {by_image:.2g} apart, one image twice {by_rounding:.2g}"
        advice = "the base does not see; is it one of IDEFICS?"
        return Finding(name=name, result="failed", found=found, advice=advice, of_input=True)
    return Finding(name=name, result="ok", found=f"by up to {by_image:.2g}")


def _not_finite(name: str, subject: Subject) -> Finding:
    found = f"logits are not finite in {subject.precision}"
    advice = "set training.precision=float32" if subject.precision != "float32" else "the base is damaged; get it again"
    return Finding(name=name, result="failed", found=found, advice=advice, of_input=True)


def check_loss(subject: Subject) -> Finding:
    """Check that the loss is the mean cross entropy of transformers' logits, over base and extra vocabulary, each
    position predicting the next token."""
    return _check_loss(subject, "transformers' logits", TOLERANCE[subject.precision])


def check_own_loss(subject: Subject) -> Finding:
    """Check the same against our own logits, which takes no second forward."""
    return _check_loss(subject, "our logits", TOLERANCE["float32"])


def _check_loss(subject: Subject, what: str, tolerance: float) -> Finding:
    if not subject.finite:
        return _not_finite("loss", subject)
    num_rows, width = subject.family.num_rows(subject.model.config), subject.packed[1][0].shape[-1]
    if width != num_rows:
        return Finding(name="loss", result="failed", found=f"{width} logits, the vocabulary has {num_rows} tokens")
    loss = subject.packed[0]
    expected = _cross_entropy(subject, subject.packed[1] if what == "our logits" else subject.plain)
    found = f"{loss:.5f}, cross entropy of {what} {expected:.5f}"
    if not abs(loss - expected) <= tolerance * expected:
        return Finding(name="loss", result="failed", found=found, advice="a bug, or an untested version of a library")
    return Finding(name="loss", result="ok", found=found)


def _cross_entropy(subject: Subject, logits: Sequence[Tensor]) -> float:
    """Return the mean cross entropy by its definition, in float64, of the samples' own tokens."""
    total, count = 0.0, 0
    for sample, logits_TV in zip(subject.samples, logits, strict=True):
        targets_T = torch.from_numpy(sample.encoded.input_ids[1:]).to(logits_TV.device)
        chosen_T = logits_TV.double().log_softmax(-1).gather(-1, targets_T[:, None])
        total, count = total - float(chosen_T.sum()), count + len(targets_T)
    return total / count


def check_extra_rows(subject: Subject) -> Finding:
    """Check that a backward reaches every row of the extra vocabulary, in the embedding and in the head."""
    name, model = "gradients of the extra rows", subject.model
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    rows = {n: p for n, p in model.named_parameters() if subject.family.group_of(n) == "extra_rows"}
    model.requires_grad_(False)
    for parameter in rows.values():
        parameter.requires_grad_(True)
    try:
        with subject.autocast():
            model(batch=subject.batch).loss.backward()
        without = [n for n, p in rows.items() if p.grad is None or not p.grad.any(-1).all()]
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
    if without or not rows:
        return Finding(name=name, result="failed", found=f"{without[0] if without else 'there are none'}: none")
    return Finding(name=name, result="ok", found=f"reach every row of {len(rows)} tensors")


def check_attention(subject: Subject) -> Finding:
    """Check that samples in one pack, attended by groups, have the logits that transformers gives each by itself."""
    name = "grouped attention"
    ours, plain = subject.packed[1], subject.plain
    apart = max(float((a - b).abs().max()) for a, b in zip(ours, plain, strict=True))
    largest = max(float(b.abs().max()) for b in plain)
    found = f"logits up to {apart:.2g} from those of sdpa, sample by sample; the largest is {largest:.3g}"
    if not apart <= TOLERANCE[subject.precision] * largest:
        return Finding(name=name, result="failed", found=found, advice="a bug, or an untested version of a library")
    return Finding(name=name, result="ok", found=found)
