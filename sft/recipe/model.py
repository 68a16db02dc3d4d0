"""The section `model` of a recipe: the base, and which parts of it are trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sft.recipe.fields import Positive, Rate, Section

INLINE_FAMILIES = {"idefics2": 12, "idefics3": 1, "smolvlm": 1}
"""Families of this tree whose images are part of the text, of which some defaults are others; for each what images
may weigh in a pack for a token of it. Every tile has more tokens than that, but those of Idefics2, which weigh their
patches, may be large: a split image of the largest size weighs 24,500."""

INLINE_LENGTH = 8192
"""Tokens of their packs: 2,048 hold one split image of SmolVLM-256M and none of Idefics3-8B."""


class LoraSettings(Section):
    r: Positive = 16
    """Rank of an adapter."""
    alpha: Rate = 32.0
    """An adapter's output is scaled by `alpha / r`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """On the input of the adapters, in training."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("language", "cross_attention")
    """Linear layers that get an adapter: of a whole group, or of its attention or its MLPs only. Their names are the
    family's (docs/training.md). Left out where images are part of the text (idefics3): `language`."""


class ImageSettings(Section):
    longest_edge: Annotated[Positive, Field(le=4096)] | None = None
    """Pixels of the longer edge that an image is scaled to, up or down, before it is cut into tiles; in idefics2 down
    only. 4,096 at most."""
    shortest_edge: Positive | None = None
    """Pixels that an edge has at least, of idefics2."""
    split: bool | None = None
    """Whether an image is cut. If not, it is one tile that shows the whole."""


class ModelConfig(Section):
    path: str
    """Base model: a folder, a hub id, or `shipped:tiny_base`; or a folder of adapters, to train them further."""
    family: str = "idefics"
    """Kind of model: a folder of sft/models/, or the dotted name of a package of your own."""
    images: ImageSettings | None = None
    """How images are cut, where they are part of the text (idefics3): as the base does, but for what is set here. It is
    written into preprocessor_config.json of all checkpoints."""
    mode: Literal["full", "lora", "qlora"] = "full"
    """How it is trained. `full`: the weights themselves, as the idefics-9b-instruct card says. `lora`: low-rank
    adapters of frozen weights. `qlora`: the same, with the frozen weights in 4 bits."""
    trainable: tuple[str, ...] | None = None
    """Groups whose weights themselves are trained. Left out: all of them in `full` mode, and in `lora` and `qlora` only
    the extra rows (embedding and head of the special tokens), which are always trained there. Their names are the
    family's (docs/training.md)."""
    lora: LoraSettings | None = None
    """The adapters of `lora` and `qlora`."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Fill in what the mode implies, so that the recipe in a run's folder has it."""
        if not isinstance(values, dict) or values.get("mode") not in ("lora", "qlora"):
            return values
        trainable = values.get("trainable") or ()
        if isinstance(trainable, list | tuple) and "extra_rows" not in trainable:
            trainable = (*trainable, "extra_rows")
        lora = {} if values.get("lora") is None else values["lora"]
        if isinstance(lora, dict) and str(values.get("family")) in INLINE_FAMILIES:
            lora = {"targets": ("language",)} | lora
        return values | {"trainable": trainable, "lora": lora}

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.lora is None:
            if self.trainable == ():
                raise ValueError("trainable is empty; name at least one group")
            return self
        if self.mode == "full":
            raise ValueError("lora is set, but mode is full; set mode to lora or qlora, or leave lora out")
        both = sorted(set(self.trainable or ()) & {target.partition(".")[0] for target in self.lora.targets})
        if both:
            cure = "train its weights or adapters of them, not both"
            raise ValueError(f"trainable and lora.targets both name {both[0]}; {cure}")
        return self

    @property
    def image_settings(self) -> dict[str, Any]:
        """What is said of images, by its keys."""
        return self.images.model_dump(exclude_none=True) if self.images else {}

    @property
    def trained_groups(self) -> frozenset[str] | None:
        """Groups of which something is trained, weights or adapters of them; None: all of them."""
        if self.trainable is None:
            return None
        targets = self.lora.targets if self.lora else ()
        return frozenset((*self.trainable, *(target.partition(".")[0] for target in targets)))
