"""Questions that are answered in words: what tasks of this kind have in common, whatever their files and metric."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sft.core.errors import UserError
from sft.core.sample import ImageRef, Message, Sample
from sft.evaluation.task import PromptedTask, Query

MAX_NEW_TOKENS = 15
"""Of an answer, as HuggingFaceM4 asked VQA (evaluation config, `max_new_tokens`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenQuestion:
    """A question, the images shown with it, and the answers that people gave."""

    id: int | str
    text: str
    answers: tuple[str, ...]
    images: tuple[ImageRef, ...]
    cluster: str
    """The same for questions about one image."""
    image_sha256: str = ""
    category: str = ""
    where: str = ""
    """File and line, for messages."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The user's turn: images, then the question."""
        return (Message(role="user", content=(*self.images, self.text)),)


class OpenQuestions(PromptedTask[OpenQuestion]):
    """A task whose questions are answered in words, to the prompt that the model was trained with. Its file provides
    `items` and `score`."""

    how = "generate"
    unit = "questions"
    max_new_tokens = MAX_NEW_TOKENS
    support: Sequence[OpenQuestion] = ()
    """Questions with answers that may be shown before one that is asked."""
    seed: int = 0
    """Draws the shots."""

    def queries(self, item: OpenQuestion) -> list[Query]:
        """Return the question after its shots, each with the answer that most people gave."""
        turns = [
            message
            for shot in self.shots_of(item)
            for message in (*shot.prompt, Message(role="assistant", content=(most_common(shot.answers),)))
        ]
        return [Query(Sample(key=f"{self.benchmark}/{item.id}", messages=(*turns, *item.prompt)))]

    def shots_of(self, item: OpenQuestion) -> list[OpenQuestion]:
        """Return the answered questions that are shown before one, none about its image. They are drawn by seed,
        benchmark and question alone, so that they are the same for every model, order and number of processes."""
        if not self.shots:
            return []
        rng = random.Random(f"shots {self.seed} {self.benchmark} {item.id}")
        drawn = rng.sample(range(len(self.support)), min(len(self.support), self.shots + self._most_about_an_image))
        return [shot for n in drawn if (shot := self.support[n]).cluster != item.cluster][: self.shots]

    @cached_property
    def _most_about_an_image(self) -> int:
        return max(Counter(question.cluster for question in self.support).values())

    def check_images(self) -> None:
        """
        Raises:
            UserError: an image file is not there.
        """
        files = dict.fromkeys(image.source for question in self.items for image in question.images)
        if missing := [file for file in files if isinstance(file, Path) and not file.is_file()]:
            raise UserError(f"{missing[0]}: no such image; {len(missing):,} of {len(files):,} are missing")

    def check_shots(self) -> None:
        """
        Raises:
            UserError: there are fewer questions to show than are asked for.
        """
        if self.shots and len(self.support) - self._most_about_an_image < self.shots:
            raise UserError(f"{self.benchmark}: shots: {self.shots} are asked for, of {len(self.support)} questions")


def most_common(answers: Sequence[str]) -> str:
    """Return the answer that was given most often, the first of equals."""
    return Counter(answers).most_common(1)[0][0]
