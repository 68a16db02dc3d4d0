"""What benchmarks of visual question answering have in common: prompts, stop words, and VQA accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

from sft.core.errors import UserError
from sft.core.metric import Metric
from sft.core.sample import ImageRef
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
        return [_item(question, answered.get(number, {}), image_of) for number, question in asked.items()]


def _records(file: Path, key: str) -> dict[int, dict[str, Any]]:
    with official_layout(file):
        return {record["question_id"]: record for record in read_json(file)[key]}


def _item(question: Mapping[str, Any], annotation: Mapping[str, Any], image_of: Callable[[int], Path]) -> TaskItem:
    answers = annotation.get("answers", ())
    marks = [(one.get("answer_confidence"), one.get("answer_id")) for one in answers]
    return TaskItem(
        id=question["question_id"],
        text=question["question"].strip(),
        answers=tuple(one["answer"] for one in answers),
        images=(ImageRef(source=image_of(question["image_id"])),),
        cluster=f"image {question['image_id']}",
        category=annotation.get("answer_type", ""),
        data={"marks": marks},
    )
