"""Checks of a model: its tokenizer is the one it was trained with, it sees, and our forward equals transformers'."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from sft.checks.finding import Finding
from sft.checks.subject import CHAT, Subject, with_size
from sft.core.sample import Sample
from sft.models import names_of_family

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
"""Largest difference of the logits of two correct forwards, as a share of the largest logit. Measured: 0.2 and more
with wrong attention; with right attention 1e-6 in float32 and 0.01 in bfloat16."""

DAMAGED = "the base is damaged; get it again"
BUG = "a bug, or an untested version of a library"


def check_model(subject: Subject) -> Iterator[Finding]:
    """Run all checks of a model, one after another. Where weights are not finite, the others are skipped."""
    yield check_tokens(subject)
    weights = check_weights(subject)
    yield weights
    if weights.result == "failed":
        names = ("gates", "image changes logits", "loss", "gradients of the extra rows", "grouped attention")
        yield from (Finding(name, "skipped", "weights are not finite") for name in names)
        return
    yield check_gates(subject)
    yield check_image(subject)
    yield check_loss(subject)
    yield check_extra_rows(subject)
    yield check_attention(subject)


def check_tokens(subject: Subject) -> Finding:
    """Check that a chat has the ids that the model was trained with, where they are known, and follows the rules of its
    family's vocabularies where they are not. transformers 5 can rebuild a tokenizer by other rules without a warning:
    32 tokens in place of 35 for a short chat."""
    name, template, config = "token ids", subject.template, subject.model.config
    chat = with_size(CHAT, subject.noise.size)
    ids = template.encode(Sample(key="check", messages=chat)).input_ids.tolist()
    golden = subject.family.text.golden_ids(config)
    if ids == golden:
        return Finding(name, "ok", f"those of idefics-9b-instruct ({len(ids)} golden ids)")
    if golden is None:
        wrong = _wrong_with_tokens(subject, ids)
    else:
        at = next(i for i in range(len(ids) + 1) if ids[: i + 1] != golden[: i + 1])
        own, known = ids[at : at + 3], golden[at : at + 3]
        pieces = template.tokenizer.convert_ids_to_tokens(own)
        wrong = f"{own} {pieces} at {at} of a chat, idefics-9b-instruct was trained with {known}"
    if wrong:
        return Finding(name, "failed", wrong, "take the tokenizer.json of the base model", of_input=True)
    return Finding(name, "ok", "follow the rules of their family; no known ids for this vocabulary")


def _wrong_with_tokens(subject: Subject, ids: Sequence[int]) -> str:
    """Return what is wrong with the ids of a chat, whatever the vocabulary; an empty text if nothing is."""
    tokenizer, num_rows = subject.template.tokenizer, subject.family.text.num_rows(subject.model.config)
    if max(ids) >= num_rows:
        return f"{tokenizer.convert_ids_to_tokens(max(ids))!r} has id {max(ids)}, the model has {num_rows} rows"
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        return f"{tokenizer.unk_token!r} stands in a chat of plain English"
    return subject.family.text.wrong_with_tokens(tokenizer, ids, subject.template.text(CHAT))


def check_weights(subject: Subject) -> Finding:
    """Check that every weight is finite."""
    broken = [name for name, weight in subject.model.named_parameters() if not _is_finite(weight.detach())]
    if broken:
        found = f"{len(broken)} tensors hold NaN or infinity, {broken[0]} among them"
        return Finding("weights", "failed", found, DAMAGED, of_input=True)
    count = sum(weight.numel() for weight in subject.model.parameters())
    return Finding("weights", "ok", f"{count:,} numbers, all finite")


def _is_finite(weight: Tensor) -> bool:
    if not weight.is_floating_point() or not weight.numel():
        return True  # 4-bit weights are bytes
    return all(bool(end.isfinite()) for end in torch.aminmax(weight))


def _gates(subject: Subject) -> list[Tensor]:
    return [p.detach() for n, p in subject.model.named_parameters() if subject.family.weights.group_of(n) == "gates"]


def check_gates(subject: Subject) -> Finding:
    """Check that a gate of cross-attention is open: a model whose gates are all zero has not learned to see."""
    gates = _gates(subject)
    if not gates:
        return Finding("gates", "ok", "there are none: images are part of the text")
    largest = max(float(gate.abs().max()) for gate in gates)
    if largest == 0.0:
        advice = "train model.trainable: [gates, …], and give it images to learn from"
        return Finding("gates", "warning", "all are 0: no image has any effect yet", advice)
    return Finding("gates", "ok", f"the widest is open by {np.tanh(largest):.3g}")


def check_image(subject: Subject) -> Finding:
    """Check that another image changes the logits."""
    name = "image changes logits"
    if not subject.finite:
        return _not_finite(name, subject)
    gates = _gates(subject)
    if gates and not any(bool(gate.any()) for gate in gates):
        return Finding(name, "skipped", "the gates are all 0")
    first, other, again = subject.packed[1][:3]
    by_image, by_rounding = float((first - other).abs().max()), float((first - again).abs().max())
    if by_image <= 2 * by_rounding:
        found = f"two images give logits {by_image:.2g} apart, one image twice {by_rounding:.2g}"
        return Finding(name, "failed", found, "the base does not see; is it one of this family?", of_input=True)
    return Finding(name, "ok", f"by up to {by_image:.2g}")


def _not_finite(name: str, subject: Subject) -> Finding:
    advice = "set training.precision=float32" if subject.precision != "float32" else DAMAGED
    return Finding(name, "failed", f"logits are not finite in {subject.precision}", advice, of_input=True)


def check_loss(subject: Subject, *, by_own_logits: bool = False) -> Finding:
    """Check that the loss is the mean cross entropy of transformers' logits, over base and extra vocabulary, each
    position predicting the next token; or of our own logits, which takes no second forward."""
    if not subject.finite:
        return _not_finite("loss", subject)
    num_rows, width = subject.family.text.num_rows(subject.model.config), subject.packed[1][0].shape[-1]
    if width != num_rows:
        return Finding("loss", "failed", f"{width} logits, the vocabulary has {num_rows} tokens")
    loss = subject.packed[0]
    expected = _cross_entropy(subject, subject.packed[1] if by_own_logits else subject.plain)
    tolerance = TOLERANCE["float32" if by_own_logits else subject.precision]
    whose = "our" if by_own_logits else "transformers'"
    found = f"{loss:.5f}, cross entropy of {whose} logits {expected:.5f}"
    if not abs(loss - expected) <= tolerance * expected:
        return Finding("loss", "failed", found, BUG)
    return Finding("loss", "ok", found)


def _cross_entropy(subject: Subject, logits: Sequence[Tensor]) -> float:
    """Return the mean cross entropy by its definition, in float64, of the samples' own tokens."""
    total, count = 0.0, 0
    for sample, positions_P, logits_PV in zip(subject.samples, subject.positions, logits, strict=True):
        targets_P = torch.from_numpy(sample.encoded.input_ids).to(logits_PV.device)[positions_P + 1]
        chosen_P = logits_PV.double().log_softmax(-1).gather(-1, targets_P[:, None])
        total, count = total - float(chosen_P.sum()), count + len(targets_P)
    return total / count


def check_extra_rows(subject: Subject) -> Finding:
    """Check that a backward reaches every row of the extra vocabulary, in the embedding and in the head."""
    name, model = "gradients of the extra rows", subject.model
    if "extra_rows" not in names_of_family(subject.family.name).groups:
        return Finding(name, "ok", "there are none: the base has every token")
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    rows = {n: p for n, p in model.named_parameters() if subject.family.weights.group_of(n) == "extra_rows"}
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
        return Finding(name, "failed", f"{without[0] if without else 'there are none'}: none")
    return Finding(name, "ok", f"reach every row of {len(rows)} tensors")


def check_attention(subject: Subject) -> Finding:
    """Check that samples in one pack, attended by groups, have the logits that transformers gives each by itself."""
    name = "grouped attention"
    ours, plain = subject.packed[1], subject.plain
    apart = max(float((a - b).abs().max()) for a, b in zip(ours, plain, strict=True))
    largest = max(float(b.abs().max()) for b in plain)
    found = f"logits up to {apart:.2g} from those of sdpa, sample by sample; the largest is {largest:.3g}"
    if not apart <= TOLERANCE[subject.precision] * largest:
        return Finding(name, "failed", found, BUG)
    return Finding(name, "ok", found)
