"""Answers to the fixed held-out questions, before and after training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sft.report.run_files import Run
from sft.report.selection_text import score_of


class Said(NamedTuple):
    """An answer to a question."""

    who: str
    text: str
    is_after: bool = False
    """Whether it is the one to look at."""


class Answer(NamedTuple):
    """A question with what was answered to it."""

    key: str
    prompt: str
    images: Sequence[str]
    answers: Sequence[Said]


def answers(run: Run) -> Iterable[Answer]:
    """Yield the fixed held-out questions: what the base answered, what the model answers, what the data say."""
    asked = [(line["step"], line["generations"]) for line in run.lines if line.get("generations")]
    before = run.before.get("generations") or []
    if not asked and not before:
        return
    selected = score_of(run.selection, run.selection["selected"])["step"] if run.selection else None
    shown = [one for one in asked if one[0] == selected] or asked[-1:]
    if not before:  # a run from before there was a before.json, or one whose first validation failed
        shown = [*(asked[:1] if asked[0][0] != shown[0][0] else []), *shown]
    for number, question in enumerate(before or shown[0][1]):
        images = question.get("images", [])
        said = [Said("before", question["answer"])] if before else []
        for step, lines in shown:
            who = f"step {step:,}" + ", selected" * (step == selected)
            said += [Said(who, one["answer"], step == shown[-1][0]) for one in lines[number : number + 1]]
        if "expected" in question:
            said.append(Said("the data", question["expected"]))
        prompt = question["prompt"].replace("<image>", "", len(images)).strip()
        yield Answer(question["key"], prompt, images, said)
