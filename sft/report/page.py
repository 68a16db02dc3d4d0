"""The page and its parts, in the order in which a person asks, and the answers before and after training.

Every text of a run goes through the template's escaping; there is no script in the page, and its policy allows none.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sft.core.files import write_atomically
from sft.report.numbers import GIB, duration, percent, plain
from sft.report.panels import (
    HUES,
    category_panels,
    loss_panels,
    score_panels,
    shots_panels,
    source_panels,
    speed_panels,
)
from sft.report.run_files import Run, held_out, read_run, series, source_totals
from sft.report.selection_text import benchmark_rows, score_of, score_text, scores, selection_words

FILE = "report.html"


def report(run_dir: Path, output: Path | None = None) -> Path:
    """Write the page of a run, to RUN/report.html if `output` is left out; raise UserError as `read_run` does."""
    file = output or run_dir / FILE
    write_atomically(file, render(read_run(run_dir)))
    return file


def render(run: Run) -> str:
    """Return the page as HTML."""
    return render_template("page.html.jinja", view(run))


def render_template(name: str, values: Mapping[str, Any], *folders: Path) -> str:
    """Return a template, of this folder or of `folders`, with the values that it prints."""
    environment = Environment(
        loader=FileSystemLoader([Path(__file__).parent, *folders]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "plain": plain}
    return environment.get_template(name).render(values)


def view(run: Run) -> dict[str, Any]:
    """Return the values that the template prints."""
    totals, chosen = source_totals(run), run.selection
    return {
        "name": run.path.resolve().name,
        "run": shlex.quote(str(run.path)),
        "status": run.status.status,
        "status_text": run.status.status + ", can be resumed" * (run.status.status == "stopped"),
        "about": _about(run),
        "figures": list(_key_figures(run)),
        "problems": list(_problems(run)),
        "selection": chosen,
        "conclusions": list(selection_words(chosen) if chosen else _conclusions(run)),
        "scores": list(scores(chosen)) if chosen else [],
        "benchmark_rows": list(benchmark_rows(chosen)) if chosen else [],
        "score_panels": [*score_panels(run), *shots_panels(run)],
        "category_panels": list(category_panels(chosen)) if chosen else [],
        "answers": list(answers(run)),
        "loss_panels": list(loss_panels(run)),
        "source_panels": list(source_panels(run)),
        "speed_panels": list(speed_panels(run)),
        "sources": totals,
        "hues": {source.name: HUES[number % len(HUES)] for number, source in enumerate(totals)},
        "share_unit": run.recipe.data.share_unit.replace("_", " "),
        "environment": _environment(run),
        "recipe": yaml.safe_dump(run.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        "made": f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC",
    }


# ---------------------------------------------------------------------------------------------------------- the head


def _about(run: Run) -> str:
    """Return what was trained, on one line."""
    model, data = run.recipe.model, run.recipe.data
    how = {"full": "all weights", "lora": "LoRA", "qlora": "LoRA over 4 bits"}[model.mode]
    if model.mode == "full" and model.trainable is not None:
        how = ", ".join(name.replace("_", " ") for name in model.trainable)
    trained = "answers are trained" if data.train_on == "assistant" else "all tokens are trained"
    return f"{model.path} · {how} · {trained} · {len(data.mixture)} source{'s' * (len(data.mixture) != 1)}"


def _conclusions(run: Run) -> Iterator[str]:
    """Yield how the held-out loss moved: what can be said before a checkpoint is selected."""
    if len(loss := held_out(run)) > 1:
        (first, before), (last, after) = loss[0], loss[-1]
        yield f"The held-out loss went from {before:.3f} at step {first:,.0f} to {after:.3f} at step {last:,.0f}."


def _key_figures(run: Run) -> Iterable[tuple[str, str]]:
    status = run.status
    step = max(status.step, run.lines[-1]["step"] if run.lines else 0)
    yield f"{step:,}", f"of {status.max_steps:,} steps"
    tokens = sum(line["tokens"] for line in run.lines)
    yield plain(tokens), "tokens"
    # Of a run that is being trained, run.json knows but what it began with.
    in_steps = sum(line["tokens"] / line["tokens_per_second"] for line in run.lines if line.get("tokens_per_second"))
    if seconds := max(status.seconds, in_steps):
        yield duration(seconds), "of training"
    if speeds := series(run.lines, "tokens_per_second"):
        yield plain(round(sorted(speed for _, speed in speeds)[len(speeds) // 2])), "tokens/s, median step"
    if memory := series(run.lines, "peak_memory_bytes"):
        yield f"{max(size for _, size in memory) / GIB:.3g} GiB", "memory at the peak"
    if run.selection:
        chosen = score_of(run.selection, run.selection["selected"])
        yield score_text(chosen["score"], run.selection), f"{run.selection['selected']}, selected"
    elif at_end := held_out(run):
        yield f"{at_end[-1][1]:.3f}", f"held-out loss, step {at_end[-1][0]:,.0f}"


def _problems(run: Run) -> Iterable[str]:
    """Yield what a person should know before reading on."""
    status = run.status
    if status.status == "running":
        yield (
            "This run is being trained, or was killed. The page shows what it has written so far; "
            "the same command updates it."
        )
    if status.status == "failed":
        yield f"Failed after step {status.step:,}: {status.why or 'the reason was not recorded'}"
    if status.status == "stopped":
        yield f"Stopped after step {status.step:,}; `idefics-sft train {shlex.quote(str(run.path))}` resumes it."
    if not run.lines:
        yield "No step was finished, so there is nothing to draw."
    for name, reason in (status.failed_evaluations or {}).items():
        yield f"{name}: failed, training went on: {reason}"
    if run.nonfinite_steps:
        yield f"{run.nonfinite_steps:,} steps had a loss or gradient that was not finite, and were left out."
    if dirty := sum(line.get("dirty_samples", 0) for line in run.lines):
        yield f"{dirty:,} samples were not trained on: an image of theirs could not be read any more."


# ----------------------------------------------------------------------------------------------------------- answers


class Said(NamedTuple):
    """An answer to a question."""

    who: str
    text: str
    is_after: bool = False
    """Whether it is the one to look at."""


class Answer(NamedTuple):
    """A fixed held-out question with the answers to it."""

    key: str
    prompt: str
    images: Sequence[str]
    answers: Sequence[Said]


def answers(run: Run) -> Iterable[Answer]:
    """Yield the fixed held-out questions with the answers of the base, of the model and of the data."""
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


# -------------------------------------------------------------------------------------------------------------- data


def _environment(run: Run) -> list[tuple[str, str]]:
    status, times = run.status, [line["time"] for line in run.lines if "time" in line]
    found = [("folder", str(run.path))]
    if times:
        begun, ended = (datetime.fromtimestamp(at, UTC) for at in (times[0], times[-1]))
        day = "" if begun.date() == ended.date() else f"{ended:%d %B %Y}, "
        found.append(("first and last step", f"{begun:%d %B %Y, %H:%M} to {day}{ended:%H:%M} UTC"))
    checkpoints = ", ".join([f"{len(run.checkpoints)}", *(f"the last {c}" for c in run.checkpoints[-1:])])
    found += [("hardware", status.hardware), ("precision", status.precision), ("checkpoints", checkpoints)]
    found += (status.versions or {}).items()
    return [(name, value) for name, value in found if value]
