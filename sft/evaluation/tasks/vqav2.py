"""VQAv2: open questions about photographs of COCO, scored by VQA accuracy against the answers of ten people.

One folder holds the official files, as their zips unpack: questions and annotations from visualqa.org (CC BY 4.0),
images from cocodataset.org. For the split `val`:

    v2_OpenEnded_mscoco_val2014_questions.json
    v2_mscoco_val2014_annotations.json
    val2014/COCO_val2014_000000458752.jpg …

`test` and `test-dev` come without answers. Shots come from `train`, whose files are then needed too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft.core.errors import UserError
from sft.core.metric import Metric
from sft.core.sample import ImageRef
from sft.evaluation.draw_images import choose_part
from sft.evaluation.metrics.vqa_accuracy import vqa_accuracy
from sft.evaluation.open_questions import OpenQuestion, OpenQuestions
from sft.evaluation.task import Answer
from sft.evaluation.task_source import TaskSource

PARTS = {"val": "val2014", "train": "train2014", "test-dev": "test-dev2015", "test": "test2015"}
"""Split -> how its files are named."""
INSTRUCTION = "\nAnswer the question using a single word or phrase."
"""After each question, as LLaVA-1.5 and lmms-eval ask."""


class VQAv2(OpenQuestions):
    """VQA accuracy in the variant of HuggingFaceM4, which evaluated IDEFICS."""

    name = "vqav2"
    metric = Metric(name="VQA accuracy (m4)")
    splits = tuple(PARTS)

    def __init__(self, source: TaskSource) -> None:
        """
        Raises:
            UserError: a file or an image is missing, or a file is not of the official layout.
        """
        folder, split, settings = source.path(self.name), source.split(self.splits), source.settings
        self.benchmark = f"vqav2_{split}"
        self.has_answers = not split.startswith("test")
        self.items = choose_part(read_questions(folder, split), settings.max_questions, settings.seed)
        self.check_images()
        self.seed, self.shots = settings.seed, settings.shots
        if self.shots:
            self.support = read_questions(folder, "train")
            self.check_shots()

    def score(self, item: OpenQuestion, answers: Sequence[Answer]) -> float:
        """Return the VQA accuracy of an answer."""
        return vqa_accuracy(answers[0].text, item.answers, variant="m4")


def read_questions(folder: Path, split: str) -> list[OpenQuestion]:
    """Return all questions of a split, in the order of their file; of `test` and `test-dev` without answers.

    Raises:
        UserError: a file is missing, or not of the official layout.
    """
    part, images = PARTS[split], PARTS[split].replace("-dev", "")
    questions = _records(folder / f"v2_OpenEnded_mscoco_{part}_questions.json", "questions")
    annotations: dict[int, dict[str, Any]] = {}
    if not split.startswith("test"):
        annotations = _records(folder / f"v2_mscoco_{part}_annotations.json", "annotations")
        if missing := [number for number in questions if not annotations.get(number, {}).get("answers")]:
            raise UserError(f"{folder}: question {missing[0]} of {split} has no answers; take files of one release")
    try:
        return [
            OpenQuestion(
                id=number,
                text=question["question"].strip() + INSTRUCTION,
                answers=tuple(one["answer"] for one in annotations.get(number, {}).get("answers", ())),
                images=(ImageRef(source=folder / images / f"COCO_{images}_{question['image_id']:012d}.jpg"),),
                cluster=f"image {question['image_id']}",
                category=annotations.get(number, {}).get("answer_type", ""),
            )
            for number, question in questions.items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: a question of {split}, or its annotation, is not of the official layout") from error


def _records(file: Path, key: str) -> dict[int, dict[str, Any]]:
    try:
        return {record["question_id"]: record for record in json.loads(file.read_text(encoding="utf-8"))[key]}
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}; expected the official file of VQAv2") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: expected the official layout, an object with a list of {key!r}") from error


TASK = VQAv2
