"""The section `evaluation` of a recipe: how benchmarks are asked, and which of them choose."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sft.recipe.fields import Positive, Section, Seed

Scoring = Literal[
    "letter",  # the option whose letter is the likeliest answer
    "text",  # the option whose full text is
    "generate",  # the option that the generated answer names
]
Rule = Literal[
    "best",  # the highest score, the earlier of equals: how the idefics-9b-instruct card chose
    "earliest_not_worse",  # the earliest that cannot be told apart from the best
]


class ShotsConfig(Section):
    number: Annotated[int, Field(ge=0)] = 0
    """How many are shown before each question."""
    select: Literal["random", "rices", "groups"] = "random"
    """`random`: drawn for each question, as the card did. `rices`: those whose images are most alike. `groups`: the
    questions of a group have the same ones, which costs less."""
    support: str | None = None
    """Where they come from: a split of the benchmark, or another folder or TSV of its layout. Left out: `train`; of
    MMBench's layout, a tenth of the benchmark's images, which are then not evaluated."""
    groups: Positive = 32
    """Number of groups under `groups`."""
    features: str | None = None
    """A folder or hub id of CLIP that says under `rices` which images are alike. Left out: the tower of the model."""
    seed: Seed | None = None
    """Seed of the draws. Left out: that of `evaluation`."""

    @model_validator(mode="after")
    def _check(self) -> ShotsConfig:
        if self.features and self.select != "rices":
            raise ValueError("shots.features says which images are alike; set select: rices")
        return self


class EvaluationConfig(Section):
    benchmark: str | None = None
    """What chooses the checkpoint: an MMBench TSV; a .jsonl of your own questions with short answers; the folder of
    another task's files; or `easy_vqa`, which is built from the package's test images."""
    by: str | tuple[str, ...] | None = None
    """The task that chooses: multiple-choice questions of MMBench's layout (`mmbench`), questions of your own with
    short answers (`exact_match`), the `loss` on what data.validation holds out, or another of `idefics-sft tasks list`.
    `NAME=PATH` names data of its own. Several choose together. Left out: `exact_match` for a .jsonl, `mmbench` for
    other benchmarks, `loss` without one."""
    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = None
    """What each of several tasks counts in the choice, by its name. Left out: its reliability, the share of the
    differences between checkpoints that is not noise."""
    not_worse_than_base: tuple[str, ...] = ()
    """Tasks that the base is evaluated on too, named as in `by`. A checkpoint that is significantly worse than the base
    on one of them is marked, and is not selected."""
    split: str | None = None
    """The part of a benchmark to evaluate, if it has several; left out, the first in `idefics-sft tasks list`."""
    rule: Rule = "best"
    """Which checkpoint is selected. `best`: the highest score, the earlier of equals, as the idefics-9b-instruct card
    did. `earliest_not_worse`: the earliest that cannot be told apart from the best."""
    every_steps: Positive | None = None
    """Steps between evaluations during training, which waits for them. Left out: `idefics-sft select` evaluates after
    it."""
    patience: Positive | None = None
    """Training stops when so many evaluations in a row bring no better score."""
    protocol: Literal["card", "vanilla", "circular"] = "circular"
    """`circular`: a question counts when every rotation of its options is answered right. `vanilla`: the first one.
    `card`: every row of the file by itself, as the released instruct checkpoints were chosen."""
    ranks: Annotated[tuple[Scoring, ...], Field(min_length=1)] = ("letter",)
    """How an option is chosen: by the likelihood of its letter, of its text, or by the generated answer."""
    shots: Annotated[int, Field(ge=0)] | ShotsConfig = 0
    """Answered questions shown before each question: how many, or a section that says which."""
    support: str | None = None
    """The same as `shots.support`."""
    prompt: Literal["chat", "base", "instruct"] | None = None
    """The words around a question: those of training (`chat`), or those by which `base` and `instruct` models of the
    card were evaluated. Left out: the first that `idefics-sft tasks show` names."""
    num_beams: Positive = 1
    """Beams of generated answers. The card's figures are of 3."""
    max_questions: Positive | None = None
    """Evaluate a seeded part of the benchmark of at most so many questions, by whole images."""
    seed: Seed = 0
    """Seed of that part, of the shots, and of the draws that say how sure the choice is."""

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        if self.protocol == "card" and self.ranks != ("letter",):
            raise ValueError("protocol card ranks letters; set ranks: [letter]")
        return self

    @property
    def asked_shots(self) -> ShotsConfig:
        """The shots as a section."""
        shots = self.shots if isinstance(self.shots, ShotsConfig) else ShotsConfig(number=self.shots)
        return shots.model_copy(update={"support": shots.support or self.support})
