"""Every key of a recipe, with its meaning under it. scripts/build_reference.py makes docs/recipes.md of this file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, model_validator

from sft.core.files import location
from sft.core.sample import MAX_PIXELS, Orientation, Policy, TrainOn
from sft.core.shipped import PREFIX
from sft.recipe.engines import AUTO, ENGINES, AskedEngine, Engine
from sft.recipe.evaluation import EvaluationConfig
from sft.recipe.fields import Beta, Decay, Number, OneOrMore, Positive, Rate, Section, Seed, Share
from sft.recipe.model import INLINE_FAMILIES, INLINE_LENGTH, ModelConfig
from sft.recipe.optimizers import OPTIMIZERS, Optimizer, OptimizerName

BUILT_BENCHMARKS = ("easy_vqa",)
"""Benchmarks that are built here rather than downloaded (sft/evaluation/tasks/mmbench/from_easy_vqa.py)."""


def as_section(value: Any) -> Any:
    """Return `reference` as `{store: reference}`."""
    return {"store": value} if isinstance(value, str) else value


ImageStore = Literal["embed", "reference"]
MOST_PIXELS = 178_956_970  # Pillow opens no larger image
WARMUP_SHARE = 0.03
"""Part of the steps that warm-up takes under `training.epochs`, if nothing is said: that of LLaVA's recipes."""


def _listed(table: Mapping[str, Optimizer] | Mapping[str, Engine]) -> str:
    """Return `name`: its meaning, for each entry of a table."""
    return " ".join(f"`{name}`: {entry.meaning}." for name, entry in table.items())


class DatasetConfig(Section):
    dataset: str
    """Adapter: a module of sft/data/datasets/, or the dotted name of your own module."""
    path: str | None = None
    """Raw files. May be left out where the adapter brings its data."""
    split: str = "train"
    """Which part of the raw data."""
    options: dict[str, Any] = {}  # noqa: RUF012  # pydantic copies it
    """Settings of the adapter: keyword arguments of its `rows` and `to_sample`."""

    @property
    def store_name(self) -> str:
        """Name of the prepared store: the adapter and a digest of path, split and options. The path is that of the
        file, however it is spelled, relative to the current directory where it is in it."""
        if self.path is None or self.path.startswith(PREFIX):
            return self._named(self.path)
        path, here = location(Path(self.path).expanduser()), Path.cwd()
        return self._named(str(path.relative_to(here) if path.is_relative_to(here) else path))

    def store_in(self, folder: str) -> Path:
        """Return where the store is in a folder of stores; earlier versions named it by the path as it is spelled."""
        own, earlier = Path(folder) / self.store_name, Path(folder) / self._named(self.path)
        return own if own.exists() or not earlier.exists() else earlier

    def _named(self, path: str | None) -> str:
        asked = json.dumps([path, self.split, self.options], sort_keys=True)
        return f"{self.dataset.rsplit('.', 1)[-1]}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"


class SourceConfig(Section):
    name: str
    """Name of the source in tables, logs and metrics."""
    share: Share
    """Share of the mixture, in `data.share_unit`. All shares sum to 1, or to 100."""
    datasets: Annotated[tuple[DatasetConfig, ...], Field(min_length=1)]
    """Prepared one by one, joined in proportion to their size."""
    max_epochs: Annotated[float, Field(gt=0)] | None = None
    """How often the source may be repeated."""
    when_exhausted: Literal["stop", "reweight"] = "stop"
    """After `max_epochs`: `stop` training, or `reweight`: leave its share to the other sources."""


class ValidationConfig(Section):
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the images (of the samples, where they have none) of every source that is held out; at least one."""
    path: str | None = None
    """Conversations of your own, in the form of the `messages` dataset; their images are held out of every source."""

    @model_validator(mode="after")
    def _check(self) -> ValidationConfig:
        if (self.share is None) == (self.path is None):
            raise ValueError("validation needs either `share` or `path`")
        return self


class ImagesConfig(Section):
    store: ImageStore = "embed"
    """`embed`: image bytes are copied into the store. `reference`: image files stay where they are, and must stay."""
    orientation: Orientation = "apply"
    """`apply`: images are turned as their EXIF says and as a viewer shows them. `ignore`: they are as they are stored,
    for data that were annotated so."""
    max_pixels: Annotated[int, Field(gt=0, le=MOST_PIXELS), Number] = MAX_PIXELS
    """Images of more pixels are skipped: 50 and 64 megapixels of a telephone are taken, 108 are not. While it is
    decoded, one of 50 megapixels takes up to 0.2 GB as JPEG, 0.5 GB as PNG, 0.9 GB as WebP."""


class DataConfig(Section):
    store: str = "stores"
    """Folder of the prepared datasets."""
    mixture: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    """The sources."""
    share_unit: Literal["tokens", "trained_tokens", "samples"] = "tokens"
    """What a share counts. Under answers-only training a third of the tokens can be over half of the gradient."""
    train_on: TrainOn = "assistant"
    """Which tokens are trained. `assistant`: the answers. `all`: every token after the first, as in 2023. Turns that
    the data mark as not to be learned are never trained."""
    sequence_length: Positive = 2048
    """Tokens of a pack. Left out where images are part of the text (idefics3): 8192."""
    max_images_per_pack: Positive = 24
    """Distinct images of a pack; where they are cut, their tiles. Left out where images are part of the text
    (idefics3): as many as there are tokens, which allow fewer. Of idefics2 their patches, of 14 x 14 pixels; left out,
    12 for each token."""
    max_samples_per_image_per_pack: Positive = 4
    """How many samples about one image may share a pack, and so one encoding of the image. 1: no sharing."""
    even_packs: bool = False
    """Whether packs are filled with about the same weight of images each, since ranks wait for the dearest. Left out
    where images are part of the text (idefics3): true."""
    long_conversations: Policy = "prefix"
    """A conversation that does not fit a pack keeps its first turns (`prefix`), becomes several, each of which opens
    with the system text and the images shown before (`split`), or is left out (`drop`). Documents are always split,
    between paragraphs or before an image."""
    pack_isolation: bool = True
    """Whether the samples of a pack are isolated. `false`: they see each other, as in 2023."""
    validation: ValidationConfig | None = None
    """What is held out of training. An image held out of one source is held out of all."""
    verify: Literal["decode", "header"] = "decode"
    """How images are checked when they are prepared: `decode` each once, or read its `header` only (web scale)."""
    images: Annotated[ImagesConfig, BeforeValidator(as_section, json_schema_input_type=ImageStore | ImagesConfig)] = (
        ImagesConfig()
    )
    """How images are stored and seen. `images: reference` is short for `images: {store: reference}`."""
    augment: Literal["crop", "none"] = "none"
    """Augmentation of training images. `crop`: a random box of nine tenths or more of the image, another at each step,
    as the idefics-9b-instruct card's transform does. `none`: the whole image."""
    feature_cache: bool = False
    """Keep the output of the vision tower and the resampler for each image in the store, in float16, so that no image
    is encoded twice. For adapters (`model.mode` lora, qlora) and wherever neither of the two is trained. It takes disk,
    164 KB an image at idefics-9b; `idefics-sft plan` says how much."""
    max_dirty_samples: Annotated[int, Field(ge=0)] = 100
    """Training stops when more samples than this have an image that was sound when prepared and is damaged now. Up to
    this number such an image is black, and its samples are not trained on."""
    num_workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that make batches and decode images. 0: the training process does it between two steps. Left out: with
    a GPU up to 4, as far as there are cores besides one for each training process; without one 0, since the model needs
    the cores."""
    worker_timeout: Positive = 120
    """Seconds that training waits for a batch of a worker before it stops and names the samples being worked on."""
    max_skip_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Preparation stops when more than this share of a dataset's records is bad."""
    max_record_bytes: Positive = 64 * 1024 * 1024
    """Raw records over this size are skipped."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        total = sum(source.share for source in self.mixture)
        if not any(abs(total / whole - 1) <= 0.001 for whole in (1, 100)):
            raise ValueError(f"shares sum to {total:g}; they must sum to 1 or to 100")
        if self.feature_cache and self.augment != "none":
            raise ValueError(f"feature_cache keeps whole images, and augment is {self.augment}; leave one of them out")
        names = [source.name for source in self.mixture]
        if len(set(names)) < len(names):
            raise ValueError(f"two sources are called {max(names, key=names.count)!r}; names must differ")
        return self

    @property
    def shares(self) -> tuple[float, ...]:
        """Shares as fractions of 1."""
        total = sum(source.share for source in self.mixture)
        return tuple(source.share / total for source in self.mixture)


class GroupConfig(Section):
    learning_rate: Rate | None = None
    """Peak learning rate; `training.learning_rate` if left out. It decays in the same proportion."""
    weight_decay: Decay | None = None
    """`training.weight_decay` if left out. Parameters that m4's rule does not decay stay undecayed."""


class TrainingConfig(Section):
    max_steps: Positive | None = None
    """Optimizer steps. Either this or `epochs` is required."""
    epochs: Annotated[float, Field(gt=0), Number] | None = None
    """In place of `max_steps`: training ends when it has gone so many times through the first source of `data.mixture`.
    The other sources give their shares until then. It may be a fraction, like 0.5."""
    tokens_per_step: Positive
    """Tokens of an optimizer step: a whole number of packs."""
    micro_batch_packs: Positive = 1
    """Packs that go through the model at once."""
    learning_rate: Rate
    """Peak, after warm-up."""
    final_learning_rate: Decay | None = None
    """Learning rate at the last step's end, 0 if left out; the decay between is linear."""
    decay_steps: Positive | None = None
    """In place of `final_learning_rate`: the step at which the linear decay would reach 0. Training may stop before."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps of linear warm-up: step n of them has n / `warmup_steps` of the peak. Left out: none with `max_steps`, 3 %
    of the steps with `epochs`."""
    optimizer: OptimizerName = Field(default="adamw", description=_listed(OPTIMIZERS))
    weight_decay: Decay = 0.1
    """Weight decay, without norms, biases, gates and the resampler (m4's rule)."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    groups: dict[str, GroupConfig] = {}  # noqa: RUF012
    """Learning rate and weight decay of single groups of parameters, by the family's names."""
    clip: Rate = 1.0
    """Largest norm of the gradient."""
    z_loss: Decay = 0.0
    """Weight of the squared logarithm of the softmax's denominator, which keeps logits small. 1e-3 in the
    pre-training of idefics-9b, 0 in its instruction fine-tuning."""
    normalisation: Literal["token_mean", "micro_batch_mean"] = "token_mean"
    """What a step's loss is. `token_mean`: the mean over all its trained tokens. `micro_batch_mean`: the mean over its
    micro-batches of their own means, as in 2023; a token then counts more in a micro-batch with few of them."""
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of computing; trained weights stay float32. `auto`: bfloat16 where the processor has it, else float16
    with a gradient scaler on a GPU, else float32."""
    gradient_checkpointing: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Recompute activations in the backward pass: less memory, about a third more work. `true`, or the share of the
    layers, evenly spread, that do so; `idefics-sft plan` shows the memory and work of each share."""
    report_to: Annotated[tuple[Literal["trackio", "wandb", "tensorboard"], ...], OneOrMore] = ()
    """Trackers that get every line of metrics.jsonl: one, or a list. Their packages are installed separately."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Drop a constant that recipes of earlier runs have as a key; fill in that `max_steps` brings no warm-up."""
        if not isinstance(values, dict):
            return values
        retired = {"max_nonfinite_steps"} if values.get("max_nonfinite_steps") == 3 else set()
        values = {key: value for key, value in values.items() if key not in retired}
        has_none = values.get("max_steps") is not None and values.get("warmup_steps") is None
        return values | ({"warmup_steps": 0} if has_none else {})

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.max_steps is None and self.epochs is None:
            raise ValueError("max_steps or epochs is required; epochs: 3 is usual")
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError("max_steps and epochs both say when training ends; leave one out")
        if self.decay_steps is None:
            return self
        if self.max_steps is None:
            raise ValueError("decay_steps goes with max_steps; with epochs set final_learning_rate, or leave it out")
        if self.final_learning_rate is not None:
            raise ValueError("final_learning_rate and decay_steps both say how the learning rate ends; leave one out")
        if self.decay_steps < self.max_steps:
            found = f"decay_steps {self.decay_steps} is before max_steps {self.max_steps}"
            raise ValueError(f"{found}: the last steps would train nothing")
        return self

    @property
    def steps(self) -> int:
        """Optimizer steps, of settings with `max_steps`."""
        assert self.max_steps is not None
        return self.max_steps

    def of_steps(self, steps: int) -> TrainingConfig:
        """Return the settings of a training that ends at a step, as planned: warm-up and decay are of so many steps.
        Raise ValueError where its warm-up lasts longer."""
        warmup = ceil(WARMUP_SHARE * steps) if self.warmup_steps is None else self.warmup_steps
        if warmup >= steps > 1:
            raise ValueError(f"training.warmup_steps is {warmup}, and training ends after {steps} steps; lower it")
        return self.model_copy(update={"max_steps": steps, "warmup_steps": min(warmup, steps - 1)})


class DistributedConfig(Section):
    engine: AskedEngine = Field(default="auto", description=f"{_listed(ENGINES)} `auto`: {AUTO}.")


class CheckpointsConfig(Section):
    every_steps: Positive = 1000
    """A checkpoint is written every so many steps, and at the end."""
    keep_state: Positive = 2
    """How many of the newest checkpoints keep the state that a run resumes from."""
    keep_weights: Literal["all", "best+last"] = "all"
    """Which weights are kept. `best+last`: of the evaluated ones, those of the best, the selected and the newest
    checkpoint."""


class Recipe(Section):
    model: ModelConfig
    """What is trained: the base, and which parts of it."""
    data: DataConfig
    """What it is trained on: sources, their shares, packs."""
    training: TrainingConfig
    """How it is trained: steps, learning rate, optimizer, precision."""
    distributed: DistributedConfig = DistributedConfig()
    """Training on several GPUs."""
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    """Which checkpoints are written and kept."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What chooses the checkpoint."""
    output_dir: str
    """Where the run is written. Paths are relative to the current directory."""
    seed: Seed = 0
    """Seed of the data order and of training."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Fill in what the family implies, so that the recipe in a run's folder has it."""
        model, data = (values.get("model"), values.get("data")) if isinstance(values, dict) else (None, None)
        if not isinstance(model, dict) or not isinstance(data, dict):
            return values
        weight = INLINE_FAMILIES.get(str(model.get("family")))
        if weight is None:
            return values
        data = {"sequence_length": INLINE_LENGTH, "even_packs": True} | data
        length = data["sequence_length"]
        most = length * weight if isinstance(length, int) else length
        return values | {"data": {"max_images_per_pack": most} | data}

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        step, pack, micro = self.training.tokens_per_step, self.data.sequence_length, self.training.micro_batch_packs
        if step % pack:
            raise ValueError(f"training.tokens_per_step {step} is not a whole number of packs of {pack} tokens")
        if (step // pack) % micro:
            raise ValueError(f"training.micro_batch_packs {micro} does not divide the {step // pack} packs of a step")
        every, patience = self.evaluation.every_steps, self.evaluation.patience
        if every and every % self.checkpoints.every_steps:
            found = f"{every} is not a multiple of checkpoints.every_steps {self.checkpoints.every_steps}"
            raise ValueError(f"evaluation.every_steps {found}: what is evaluated is a checkpoint")
        if patience and not every:
            raise ValueError("evaluation.patience counts evaluations during training; set evaluation.every_steps too")
        if self.training.max_steps and (self.training.warmup_steps or 0) >= self.training.max_steps:
            raise ValueError("training.warmup_steps must be less than training.max_steps")
        if self.training.epochs and self.data.mixture[0].max_epochs:
            raise ValueError("training.epochs and data.mixture.0.max_epochs both limit the first source; leave one out")
        trained = self.model.trained_groups
        untrained = [] if trained is None else sorted(self.training.groups.keys() - trained)
        if untrained:
            raise ValueError(f"training.groups names {untrained[0]}, of which nothing is trained; see model.trainable")
        return self

    @property
    def packs_per_step(self) -> int:
        """Packs of an optimizer step."""
        return self.training.tokens_per_step // self.data.sequence_length

    @property
    def limited_data(self) -> DataConfig:
        """`data`, in which the first source ends training after `training.epochs`, if that is set."""
        if self.training.epochs is None:
            return self.data
        first, *others = self.data.mixture
        first = first.model_copy(update={"max_epochs": self.training.epochs, "when_exhausted": "stop"})
        return self.data.model_copy(update={"mixture": (first, *others)})

    def to_yaml(self) -> str:
        """Return the whole recipe as YAML, with every default filled in."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
