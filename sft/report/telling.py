"""What a run tells in words: which checkpoint was selected and why, and answers before and after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sft.report.charts import percent
from sft.report.reading import Line, Run


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


# --------------------------------------------------------------------------------------------------------- selection


def score_of(selection: Line, checkpoint: str) -> Line:
    return next(score for score in selection["scores"] if score["checkpoint"] == checkpoint)


def score_text(score: float, selection: Line) -> str:
    return f"{score:.3f}" if selection["by"] == "loss" else percent(score)


def between(interval: Sequence[float] | None, selection: Line) -> str:
    return " to ".join(score_text(limit, selection) for limit in interval) if interval else ""


def selection_words(run: Run) -> Iterable[str]:
    """Which checkpoint was selected, why, and how sure that is."""
    chosen = run.selection
    if not chosen:
        return
    score = score_of(chosen, chosen["selected"])
    limits = f" (95 % interval {between(score['interval'], chosen)})" if score.get("interval") else ""
    yield f"{chosen['selected']} was selected: {_reason(chosen)} {score_text(score['score'], chosen)}{limits}."
    questions, reported = chosen.get("questions", (0, 0))
    ranks = " and ".join(chosen.get("ranks", ()))
    if reported:
        kind = "samples" if chosen["by"] == "loss" else "questions"
        of = f"{reported:,} {kind} about {chosen.get('images', 0):,} images or texts"
        half = f", which are not the {questions:,} that chose" if chosen.get("chosen_on") == "half" else ""
        mean = f", the mean of ranking by {ranks}" if " and " in ranks else f", by {ranks}" if ranks else ""
        yield f"Figures are of {of} of {chosen['benchmark']}{mean}{half}."
    if chosen["best"] != chosen["selected"]:
        yield f"The best by the card's rule, the highest figure alone, would be {chosen['best']}."
    if chosen.get("cross_fitted") is not None:
        worth = score_text(chosen["cross_fitted"], chosen)
        limits = between(chosen.get("cross_fitted_interval"), chosen)
        limits = f" ({limits})" if limits else ""
        yield f"Chosen on one half and scored on the other, the choice is worth {worth}{limits}."


def _reason(chosen: Line) -> str:
    extreme = "lowest held-out loss" if chosen["by"] == "loss" else "highest score"
    if chosen["rule"] == "earliest_not_worse":
        return "it is the earliest that cannot be told apart from the best, and has"
    if chosen["selected"] != chosen["best"]:
        return "it is the best of those that still have their weights, and has"
    if chosen.get("chosen_on") == "half":
        return f"it has the {extreme} on the half that chose, and on the other"
    return f"it has the {extreme},"


def scores(run: Run) -> Iterable[dict[str, Any]]:
    """Rows of the table of checkpoints."""
    chosen = run.selection
    if not chosen:
        return
    for score in chosen["scores"]:
        yield {
            "name": score["checkpoint"],
            "score": score_text(score["score"], chosen),
            "interval": between(score.get("interval"), chosen),
            "p_best": "" if score.get("p_best") is None else percent(score["p_best"]),
            "is_selected": score["checkpoint"] == chosen["selected"],
            "is_tied": score["checkpoint"] in chosen["tied"],
            "is_gone": not score.get("has_weights", True),
        }


# ----------------------------------------------------------------------------------------------------------- answers


def answers(run: Run) -> Iterable[Answer]:
    """The fixed held-out questions: what the base said, what the model says, what the data say."""
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
