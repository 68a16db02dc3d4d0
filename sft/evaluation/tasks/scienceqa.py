"""ScienceQA: multiple-choice questions of school science. Those with an image are asked, as the card did.

Needs the official files of https://scienceqa.github.io (CC BY-NC-SA 4.0):

    problems.json    pid_splits.json    test/<number>/image.png    val/…    train/…

The card's prompts rank the letters A to E for every question, however many choices it has; in a chat only the letters
of its choices are ranked. How the card wrote hint, question and choices into one text is not known; the form of its
MMBench prompt is taken. Shots come from `train`, with their solution after the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from sft.core.sample import ImageRef
from sft.data.formats import Row
from sft.evaluation.copies import texts
from sft.evaluation.official_files import official_layout, read_json
from sft.evaluation.prompts import Prompt, TaskItem
from sft.evaluation.questions import RankedQuestions
from sft.evaluation.task import Typical

LETTERS = "ABCDE"


class ScienceQA(RankedQuestions):
    """Accuracy on the questions of ScienceQA that have an image."""

    name = "scienceqa"
    splits = ("test", "val", "train")
    typical = Typical(items={"test": 2_017}, query=100, shot=195, options=5, shots=(0, 4))
    has_copies = True
    prompts: ClassVar[Mapping[str, Prompt]] = {
        "chat": Prompt(question="{image}{text}Answer with the letter of the right choice."),
        "instruct": Prompt(
            prefix="The user asks a multiple-choice question and the assistant uses the image to answer.\n",
            question="{image}{text}",
            answer="The best answer is {answer}. {solution}",
        ),
        "base": Prompt(
            question="{image}{text}Answer: The best answer is", answer=" {answer}. {solution}\n", is_document=True
        ),
    }

    def read(self, folder: Path, split: str) -> list[TaskItem]:
        """Return the questions of a split that have an image, in the order of pid_splits.json."""
        problems, splits = read_json(folder / "problems.json"), read_json(folder / "pid_splits.json")
        with official_layout(folder / "problems.json"):
            return [
                _item(number, problems[number], folder / split / number / problems[number]["image"])
                for number in splits[split]
                if problems[number].get("image")
            ]

    def from_copy(self, rows: Sequence[Row]) -> list[TaskItem]:
        """Return the questions of a copy that have an image, by their places where it does not number them."""
        shown = [(number, row) for number, row in enumerate(rows) if row["image"].is_file()]
        return [_item(row.get("id", row.get("index", number)), _problem(row), row["image"]) for number, row in shown]

    def options_of(self, item: TaskItem) -> tuple[str, ...]:
        """Return the letters of the choices, or all letters where the card's prompts are used."""
        return item.options if self.style == "chat" else tuple(LETTERS)


def _problem(row: Row) -> dict[str, Any]:
    """Return an official record, of a table with a column for each choice and a letter as the answer too."""
    choices = texts(row, "choices") if "choices" in row else [row[letter] for letter in LETTERS if row.get(letter)]
    answer = str(row["answer"])
    return row | {"choices": choices, "answer": LETTERS.index(answer) if answer in LETTERS else int(answer)}


def _item(number: Any, problem: Mapping[str, Any], image: Path) -> TaskItem:
    choices = [f"{letter}: {_one_break(choice)}" for letter, choice in zip(LETTERS, problem["choices"], strict=False)]
    hint = [f"Context: {_one_break(problem['hint'])}"] if problem.get("hint") else []
    lines = [*hint, f"Question: {_one_break(problem['question'])}", "Possible answers:", *choices]
    return TaskItem(
        id=int(number),
        text="\n".join(lines) + "\n",
        options=tuple(LETTERS[: len(choices)]),
        answers=(LETTERS[problem["answer"]],),
        images=(ImageRef(source=image),),
        cluster=f"question {number}",
        category=problem.get("subject") or "",
        fields={"solution": problem.get("solution") or ""},
    )


def _one_break(text: str) -> str:
    """Return a text with empty lines taken out, as HuggingFaceM4 did."""
    return text.strip().replace("\n\n", "\n")


TASK = ScienceQA
