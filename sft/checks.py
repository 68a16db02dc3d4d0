"""Does this machine, and this model, do what training takes for granted? Each check gives a `Finding`.

environment        versions, device, bfloat16, bitsandbytes, free disk        doctor
check_model        tokens, weights, gates, images, loss, gradients, attention doctor --model
before_training    what of it one small forward can tell, and the disk        every training
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from packaging.requirements import Requirement
from packaging.version import Version
from torch import Tensor, nn

from sft.chat_template import ChatTemplate
from sft.collate import PlacedSample, collate
from sft.errors import RunError, UserError
from sft.inference import find_base, load_for_inference
from sft.lora import has_adapters, is_adapter_folder
from sft.models import ModelFamily, get_family
from sft.precision import choose_precision, device, has_bfloat16, torch_dtype
from sft.recipe import Recipe
from sft.sample import Batch, ImageRef, Message, Sample
from sft.shipped import shipped_root

LIBRARIES = ("torch", "transformers", "trl", "accelerate", "peft", "bitsandbytes", "datasets")
"""Whose versions can change what is trained."""

GIB = 1024**3
LITTLE_DISK = GIB
"""Less than this is free: not even the quickstart's stores and checkpoints fit."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
"""How far logits of two correct forwards may be apart, as a share of the largest. Wrong attention was seen at 0.2 and
more; right attention at 1e-6 in float32 and 0.01 in bfloat16."""

CHAT = (
    Message(role="user", content=(ImageRef(source=b""), "Describe this image.")),
    Message(role="assistant", content=("A dog.",)),
    Message(role="user", content=("What is it?",)),
    Message(role="assistant", content=("A dog.",)),
)
"""The conversation whose ids a family may know (`ModelFamily.golden_ids`)."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check has found."""

    name: str
    result: Literal["ok", "warning", "failed", "skipped"]
    found: str
    advice: str = ""
    of_input: bool = False
    """Whether a failure is that of what the user gave: `UserError` stops a training then, else `RunError`."""


def raise_failed(findings: Iterable[Finding]) -> None:
    """
    Raises:
        UserError: naming the first that failed, if it is the user's input that is wrong.
        RunError: naming the first that failed, if it is not.
    """
    for finding in findings:
        if finding.result == "failed":
            kind = UserError if finding.of_input else RunError
            raise kind(line_of(finding))


def line_of(finding: Finding) -> str:
    """`name: what was found; what to do`."""
    return f"{finding.name}: {finding.found}" + (f"; {finding.advice}" if finding.advice else "")


# -------------------------------------------------------------------------------------------------- the environment


def environment(folder: Path) -> list[Finding]:
    """Everything that needs no model. `folder`: where runs are to be written."""
    return [*check_versions(), check_device(), check_precision(), check_bitsandbytes(), check_free_disk(folder)]


def tested_versions() -> dict[str, str]:
    """Library -> the version that this toolkit is tested with, by constraints.txt."""
    lines = (shipped_root() / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def check_versions() -> list[Finding]:
    """Each library beside the tested version, and beside the lowest that this package allows."""
    tested = tested_versions()
    allowed = {r.name: r.specifier for r in map(Requirement, requires("idefics-sft") or ()) if r.marker is None}
    findings = []
    for name in LIBRARIES:
        pinned, specifier = tested[name], allowed[name]
        advice = f'pip install "{name}=={pinned}"'
        try:
            installed = Version(version(name))
        except PackageNotFoundError:
            findings.append(Finding(name=name, result="failed", found="not installed", advice=advice))
            continue
        if not specifier.contains(installed.base_version, prereleases=True):
            findings.append(Finding(name=name, result="failed", found=f"{installed}, needs {specifier}", advice=advice))
        elif installed.public != pinned:
            findings.append(
                Finding(name=name, result="warning", found=f"{installed}, tested with {pinned}", advice=advice)
            )
        else:
            findings.append(Finding(name=name, result="ok", found=str(installed)))
    return findings


def check_device() -> Finding:
    """What is computed on, and its memory."""
    chosen = device()
    if chosen.type == "cuda":
        free, total = torch.cuda.mem_get_info(chosen)
        others = f", 1 of {torch.cuda.device_count()}" if torch.cuda.device_count() > 1 else ""
        name = f"{torch.cuda.get_device_name(chosen)}{others}"
        return Finding(name="device", result="ok", found=f"{name}: {free / GIB:.1f} of {total / GIB:.1f} GiB free")
    found = f"CPU, {os.cpu_count()} cores, {_free_memory(chosen) / GIB:.1f} GiB of memory free"
    return Finding(name="device", result="ok", found=found)


def _free_memory(of: torch.device) -> int:
    """Bytes that can be allocated: of the GPU, or of this machine."""
    if of.type == "cuda":
        return int(torch.cuda.mem_get_info(of)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_precision() -> Finding:
    """Whether the device computes bfloat16 itself, and what `training.precision: auto` takes."""
    native = "native" if has_bfloat16(device()) else "not native"
    return Finding(
        name="bfloat16", result="ok", found=f"{native}; precision auto takes {choose_precision('auto', device())}"
    )


def check_bitsandbytes() -> Finding:
    """4-bit weights as QLoRA stores them, and an 8-bit optimizer, really computed on this device.

    A forward with gradients, one without, and one with again: on CPUs with avx512_bf16 bitsandbytes 0.50.2 fails at the
    third, if it is left to repack weights.
    """
    name = "bitsandbytes on this device"
    try:
        with torch.random.fork_rng(devices=[]):  # the seed of a training is not touched
            wrong = _wrong_with_bitsandbytes(device())
    except Exception as error:  # whatever a library without code for the device raises: RuntimeError, OSError, …
        wrong = f"{type(error).__name__}: {_first_line(error)}"
    if wrong:
        advice = "model.mode qlora and the 8-bit optimizers do not work here; `python -m bitsandbytes` tells more"
        return Finding(name=name, result="failed", found=wrong, advice=advice)
    return Finding(name=name, result="ok", found=f"4-bit weights and 8-bit AdamW work on {device().type}")


def _wrong_with_bitsandbytes(on: torch.device) -> str:
    import bitsandbytes as bnb

    torch.manual_seed(0)
    weight, inputs = torch.randn(64, 128), torch.randn(4, 128).to(on)
    layer = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer.support_avx512bf16_for_cpu = False  # as `idefics.load_model` sets it
    layer.to(on)
    stored = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    if (stored.cpu() - weight).abs().mean() > 0.15 * weight.abs().mean():  # 0.09 of it is what nf4 rounds away
        return "4-bit weights are not what was quantised"
    expected = inputs @ stored.T + layer.bias
    for training in (True, False, True):
        layer.train(training)
        with torch.set_grad_enabled(training):
            given = inputs.clone().requires_grad_(training)
            output = layer(given)
        if (output - expected).abs().max() > 0.01 * expected.abs().max():
            return "a product with 4-bit weights is wrong"
        if training:
            output.sum().backward()
            if given.grad is None or (given.grad - stored.sum(0)).abs().max() > 0.01 * stored.sum(0).abs().max():
                return "the gradient of a product with 4-bit weights is wrong"
    moved = nn.Parameter(torch.ones(64, 64, device=on))  # 4,096 elements: fewer keep float32 states
    moved.grad = torch.ones_like(moved)
    bnb.optim.AdamW8bit([moved], lr=0.5, weight_decay=0.0).step()
    if (moved.detach() - 0.5).abs().max() > 0.05:
        return "a step of 8-bit AdamW is wrong"
    return ""


def check_free_disk(folder: Path) -> Finding:
    """What is free where runs would be written."""
    free = shutil.disk_usage(_existing(folder)).free
    found = f"{free / 1e9:.1f} GB; a checkpoint of idefics-9b takes 17.9 GB"
    if free < LITTLE_DISK:
        return Finding(
            name="free disk", result="warning", found=found, advice="set output_dir and data.store elsewhere"
        )
    return Finding(name="free disk", result="ok", found=found)


def _existing(path: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


# --------------------------------------------------------------------------------------------------------- a model


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode, and what is asked of it: one question about two images, and a text.

    The first image is asked about twice. What its two answers differ by is rounding; the other's must differ by more.
    """

    family: ModelFamily
    model: nn.Module
    template: ChatTemplate
    precision: str

    @cached_property
    def samples(self) -> list[PlacedSample]:
        """Short conversations: images 0, 1 and 0, and none."""
        return [*(self._placed(CHAT, (image,)) for image in (0, 1, 0)), self._placed(CHAT[2:], ())]

    def _placed(self, messages: Sequence[Message], images: tuple[int, ...]) -> PlacedSample:
        return PlacedSample(self.template.encode(Sample(key="check", messages=tuple(messages))), images, source=0)

    @cached_property
    def batch(self) -> Batch:
        """All samples as one pack, every token after the first trained."""
        size = self.family.image_size(self.model.config)
        on = next(self.model.parameters()).device
        return collate([self.samples], lambda number: noise(number, size), train_on="all", image_size=size).to(on)

    def autocast(self) -> AbstractContextManager[object]:
        """What training computes in."""
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
        """Whether all logits are numbers."""
        return all(bool(logits.isfinite().all()) for logits in self.packed[1])


def load_subject(path: str | Path, family: str = "idefics") -> Subject:
    """A model folder, a folder of adapters or a hub id as a subject: in float32 where there is memory for it, since
    what is compared differs by rounding alone then.

    Raises:
        UserError: as `load_for_inference`.
    """
    base = Path(find_base(Path(path)) if is_adapter_folder(path) else path)
    stored = sum(file.stat().st_size for file in base.glob("*.safetensors"))  # in bfloat16, as a rule
    fits = base.is_dir() and 2.5 * stored < _free_memory(device())
    loaded = load_for_inference(path, family=family, precision="float32" if fits else "auto")
    precision = "bfloat16" if loaded.autocast else "float32"
    return Subject(get_family(family), loaded.model, loaded.template, precision)


def noise(number: int, size: int) -> NDArray[np.uint8]:
    """An image of noise that depends on its number alone."""
    return np.random.default_rng(number).integers(0, 256, (3, size, size), dtype=np.uint8)


def check_model(subject: Subject) -> Iterator[Finding]:
    """All checks of a model, one after another. Where weights are no numbers, the rest has nothing to go by."""
    yield check_tokens(subject)
    weights = check_weights(subject)
    yield weights
    if weights.result == "failed":
        names = ("gates", "image changes logits", "loss", "gradients of the extra rows", "grouped attention")
        yield from (Finding(name=name, result="skipped", found="weights are not finite") for name in names)
        return
    yield check_gates(subject)
    yield check_image(subject)
    yield check_loss(subject, _plain_loss(subject), "transformers' logits")
    yield check_extra_rows(subject)
    yield check_attention(subject)


def check_tokens(subject: Subject) -> Finding:
    """A chat has the ids that the model was trained with, where they are known, and follows the rules of LLaMA-1 where
    they are not.

    transformers 5 can rebuild a tokenizer by other rules without a word: 32 tokens in place of 35 for a short chat.
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
    """What a vocabulary that is not LLaMA-1's must hold to all the same."""
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
    if written != "".join(text.split()):
        return f"a chat comes back as {written!r}"
    return ""


def check_weights(subject: Subject) -> Finding:
    """Every weight is a number."""
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
    """Cross-attention gets through: a model whose gates are all zero has not learned to see."""
    largest = max((float(gate.abs().max()) for gate in _gates(subject)), default=0.0)
    if largest == 0.0:
        advice = "train model.trainable: [gates, …], and give it images to learn from"
        return Finding(name="gates", result="warning", found="all are 0: no image has any effect yet", advice=advice)
    return Finding(name="gates", result="ok", found=f"the widest is open by {np.tanh(largest):.3g}")


def check_image(subject: Subject) -> Finding:
    """Another image changes what the model says next."""
    name = "image changes logits"
    if not subject.finite:
        return _not_finite(name, subject)
    if not any(bool(gate.any()) for gate in _gates(subject)):
        return Finding(name=name, result="skipped", found="the gates are all 0")
    first, other, again = subject.packed[1][:3]
    by_image, by_rounding = float((first - other).abs().max()), float((first - again).abs().max())
    if by_image <= 2 * by_rounding:
        found = f"two images give logits {by_image:.2g} apart, one image twice {by_rounding:.2g}"
        return Finding(name=name, result="failed", found=found, advice="the base does not see; is it one of IDEFICS?")
    return Finding(name=name, result="ok", found=f"by up to {by_image:.2g}")


def _not_finite(name: str, subject: Subject) -> Finding:
    found = f"logits are not finite in {subject.precision}"
    advice = "set training.precision=float32" if subject.precision != "float32" else "the base is damaged; get it again"
    return Finding(name=name, result="failed", found=found, advice=advice, of_input=True)


def check_loss(subject: Subject, expected: float, what: str) -> Finding:
    """The loss is the mean cross entropy over base and extra vocabulary, each position predicting the next token."""
    if not subject.finite:
        return _not_finite("loss", subject)
    num_rows, width = subject.family.num_rows(subject.model.config), subject.packed[1][0].shape[-1]
    if width != num_rows:
        return Finding(name="loss", result="failed", found=f"{width} logits, the vocabulary has {num_rows} tokens")
    loss = subject.packed[0]
    found = f"{loss:.5f}, cross entropy of {what} {expected:.5f}"
    if abs(loss - expected) > TOLERANCE[subject.precision if what != "our logits" else "float32"] * expected:
        return Finding(name="loss", result="failed", found=found, advice="a bug, or an untested version of a library")
    return Finding(name="loss", result="ok", found=found)


def _cross_entropy(subject: Subject, logits: Sequence[Tensor]) -> float:
    """By its definition, in float64, of the samples' own tokens."""
    total, count = 0.0, 0
    for sample, logits_TV in zip(subject.samples, logits, strict=True):
        targets_T = torch.from_numpy(sample.encoded.input_ids[1:]).to(logits_TV.device)
        chosen_T = logits_TV.double().log_softmax(-1).gather(-1, targets_T[:, None])
        total, count = total - float(chosen_T.sum()), count + len(targets_T)
    return total / count


def _plain_loss(subject: Subject) -> float:
    return _cross_entropy(subject, subject.plain)


def check_extra_rows(subject: Subject) -> Finding:
    """A backward reaches every row of the extra vocabulary, in the embedding and in the head."""
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
    """Samples in one pack, attended by groups, give the logits that transformers gives each by itself."""
    name = "grouped attention"
    ours, plain = subject.packed[1], subject.plain
    apart = max(float((a - b).abs().max()) for a, b in zip(ours, plain, strict=True))
    largest = max(float(b.abs().max()) for b in plain)
    found = f"logits up to {apart:.2g} from those of sdpa, sample by sample; the largest is {largest:.3g}"
    if not apart <= TOLERANCE[subject.precision] * largest:
        return Finding(name=name, result="failed", found=found, advice="a bug, or an untested version of a library")
    return Finding(name=name, result="ok", found=found)


# ------------------------------------------------------------------------------------------------- before training


def check_writable(folder: Path) -> None:
    """Whether a run can be written there. Nothing is made.

    Raises:
        UserError: it cannot.
    """
    place = _existing(folder)
    if not place.is_dir():
        raise UserError(f"output_dir {folder}: {place} is a file; choose another output_dir")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"output_dir {folder}: {place} cannot be written to; choose another output_dir")


@dataclass(frozen=True, kw_only=True)
class Room:
    """Bytes that the checkpoints of a run take."""

    snapshot: int
    """Weights, or adapters: what is evaluated."""
    state: int
    """What a run goes on from; 0 where none is written."""
    total: int
    """All of them, when the run ends."""

    @property
    def one(self) -> int:
        """A checkpoint."""
        return self.snapshot + self.state


def room_for(recipe: Recipe, family: ModelFamily, model: nn.Module) -> Room:
    """What a run will write: full runs keep bfloat16 weights, others what they train in float32; the state has float32
    weights and two moments of what is trained."""
    trained = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if ".lora_" in name or (family.group_of(name) in recipe.model.trainable and ".base_layer." not in name)
    )
    everything = sum(parameter.numel() for parameter in model.parameters())
    snapshot = 4 * trained if has_adapters(model) else 2 * everything
    kept = int(getattr(recipe.checkpoints, "keep_state", 0))  # a key that not every version of a recipe has
    moments = 8 if recipe.training.optimizer == "adamw" else 2
    state = (4 + moments) * trained if kept else 0
    snapshots = -(-recipe.training.max_steps // recipe.checkpoints.every_steps)
    if recipe.checkpoints.keep_weights == "best+last":
        snapshots = min(snapshots, 3)  # the best, the selected and the newest
    states = min(snapshots, kept + 1)  # the newest is whole before the oldest goes
    return Room(snapshot=snapshot, state=state, total=snapshots * snapshot + states * state)


def check_room(folder: Path, room: Room) -> Finding:
    """Whether the checkpoints fit the disk. What the folder holds of checkpoints already is counted as free: they are
    replaced, or are among those counted."""
    held = sum(file.stat().st_size for file in (folder / "checkpoints").rglob("*") if file.is_file())
    free = shutil.disk_usage(_existing(folder)).free + held
    found = f"{free / 1e9:.3g} GB for {folder}, a checkpoint takes {room.one / 1e9:.3g} GB"
    if free < room.one:
        advice = "make room, or choose another output_dir"
        return Finding(name="free disk", result="failed", found=found, advice=advice, of_input=True)
    if free < room.total:
        advice = (
            f"all of them take {room.total / 1e9:.3g} GB: raise checkpoints.every_steps, or set keep_weights=best+last"
        )
        return Finding(name="free disk", result="warning", found=found, advice=advice)
    return Finding(name="free disk", result="ok", found=found)


def before_training(
    recipe: Recipe, family: ModelFamily, model: nn.Module, template: ChatTemplate, run_dir: Path
) -> list[str]:
    """Check the model that is about to be trained, by one forward of about a hundred tokens; return the warnings.

    The random numbers of training are not touched. Where this is the only process the model goes to its device.

    Raises:
        UserError: what the user gave is wrong: weights, tokenizer, too little disk.
        RunError: this machine or these versions of the libraries compute something else than they should.
    """
    findings = [_versions_in_a_line(), check_room(run_dir, room_for(recipe, family, model))]
    if recipe.model.mode == "qlora" or recipe.training.optimizer != "adamw":
        findings.append(check_bitsandbytes())
    raise_failed(findings)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and next(model.parameters()).device != device():
        model.to(device())
    was_training = model.training
    subject = Subject(family, model.eval(), template, choose_precision(recipe.training.precision, device()))
    for check in (check_tokens, check_weights, check_gates, check_image, _check_own_loss):
        findings.append(check(subject))
        raise_failed(findings[-1:])
    model.train(was_training)
    return [line_of(finding) for finding in findings if finding.result == "warning"]


def _check_own_loss(subject: Subject) -> Finding:
    return check_loss(subject, _cross_entropy(subject, subject.packed[1]), "our logits")


def _versions_in_a_line() -> Finding:
    """The versions of all libraries as one finding."""
    findings = check_versions()
    failed = [finding for finding in findings if finding.result == "failed"]
    others = [finding for finding in findings if finding.result == "warning"]
    told = "; ".join(f"{finding.name} {finding.found}" for finding in failed or others)
    advice = "`idefics-sft doctor` says what to install"
    if failed or others:
        return Finding(name="versions", result="failed" if failed else "warning", found=told, advice=advice)
    return Finding(name="versions", result="ok", found="those this toolkit is tested with")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
