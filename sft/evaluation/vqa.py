"""What benchmarks of visual question answering have in common: prompts, stop words, and VQA accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

from sft.core.errors import UserError
from sft.core.metric import Metric
from sft.core.sample import ImageRef
from sft.data.formats import Row
from sft.evaluation.copies import first, texts
from sft.evaluation.metrics.vqa_accuracy import Variant, vqa_accuracy
from sft.evaluation.official_files import official_layout, read_json
from sft.evaluation.prompts import Prompt, TaskItem
from sft.evaluation.questions import OpenQuestions
from sft.evaluation.task import Answer

INSTRUCTION = "\nAnswer the question using a single word or phrase."
"""After each question of a chat, as LLaVA-1.5 and lmms-eval ask."""


class VQA(OpenQuestions):
    """VQA accuracy in the variant of HuggingFaceM4, which evaluated IDEFICS; the others are among the figures."""

    metric = Metric(name="VQA accuracy (m4)")
    prompts: ClassVar[Mapping[str, Prompt]] = {
        "chat": Prompt(question="{image}{text}" + INSTRUCTION),
        "base": Prompt(
            prefix="Instruction: provide an answer to the question. Use the image to answer.\n",
            question="Image:{image}Question: {text} Answer:",
            answer=" {answer}\n",
            is_document=True,
        ),
    }
    has_copies = True
    primed = 2
    stop_words = ("Question", "User", "Image", "task", "What", "Who", "When", "Where", "Why", "How")

    def score(self, item: TaskItem, answers: Sequence[Answer]) -> float:
        """Return the VQA accuracy of an answer."""
        return vqa_accuracy(answers[0].text, item.answers, variant="m4")

    def figures(self, item: TaskItem, answers: Sequence[Answer]) -> dict[str, float]:
        """Return the accuracy in all variants."""
        marks = item.data.get("marks")
        return {
            f"VQA accuracy ({variant})": vqa_accuracy(answers[0].text, item.answers, variant=variant, marks=marks)
            for variant in get_args(Variant)
            if item.answers
        }

    def from_copy(self, rows: Sequence[Row]) -> list[TaskItem]:
        """Return the questions of the rows of a copy."""
        records = [row | {"answers": texts(row, "answers", "answer")} for row in rows]
        numbers = [first(row, "question_id", "index") for row in rows]
        clusters = [f"image {row.get('image_id', row['image'].name)}" for row in rows]
        return list(map(vqa_item, records, [row["image"] for row in rows], numbers, clusters))


def read_vqa(questions: Path, annotations: Path | None, image_of: Callable[[int], Path]) -> list[TaskItem]:
    """Return the questions of two files of VQA's layout, joined by their numbers, in the order of the first; without
    answers where there is no file of annotations.

    Raises:
        UserError: a file is missing or not of the official layout, or a question has no answers.
    """
    asked = _records(questions, "questions")
    answered = _records(annotations, "annotations") if annotations else {}
    if annotations and (missing := [number for number in asked if not answered.get(number, {}).get("answers")]):
        raise UserError(f"{annotations}: question {missing[0]} has no answers; take files of one release")
    with official_layout(questions):
        records = [question | answered.get(number, {}) for number, question in asked.items()]
        images = [record["image_id"] for record in records]
        return list(map(vqa_item, records, map(image_of, images), asked, [f"image {image}" for image in images]))


def _records(file: Path, key: str) -> dict[int, dict[str, Any]]:
    with official_layout(file):
        return {record["question_id"]: record for record in read_json(file)[key]}


def vqa_item(record: Mapping[str, Any], image: Path, number: int | str, cluster: str) -> TaskItem:
    """Return a question with people's answers: texts, or records with a text and marks."""
    given = record.get("answers") or ()
    marks = [(one.get("answer_confidence"), one.get("answer_id")) for one in given if not isinstance(one, str)]
    return TaskItem(
        id=number,
        text=record["question"].strip(),
        answers=tuple(one if isinstance(one, str) else one["answer"] for one in given),
        images=(ImageRef(source=image),),
        cluster=cluster,
        category=record.get("answer_type") or "",
        data={"marks": marks or None},
    )
