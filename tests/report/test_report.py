"""The page about a run: true to its files, whatever state the run is in, and safe whatever its texts are."""

import base64
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import status_of, visible
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from sft.core.errors import UserError
from sft.report.charts import Axis, Series, chart
from sft.report.numbers import NBSP, duration, percent, plain, scientific
from sft.report.page import answers, render
from sft.report.panels import binned
from sft.report.run_files import held_out, read_run, source_totals
from sft.report.selection_text import selection_words
from sft.runs.status import RunStatus

HOSTILE = "</script><script>document.title='owned'</script><img src=https://a.org/x onerror=\"document.title='owned'\">"
RECIPE = """
model: {path: shipped:tiny_base}
data:
  store: %s
  sequence_length: 64
  validation: {share: 0.1}
  mixture:
    - {name: pictures, share: 75, datasets: [{dataset: easy_vqa}]}
    - {name: "<b>talk</b>", share: 25, datasets: [{dataset: messages, path: talk}]}
training: {max_steps: 40, tokens_per_step: 128, learning_rate: 1.0e-3}
output_dir: nowhere
"""
TALK = "<b>talk</b>"


def line(step):
    """A step of metrics.jsonl: three quarters of the tokens are pictures, half of the trained ones."""
    loss = 8 / step
    return {
        "step": step, "time": 1.7e9 + step, "loss": loss, "tokens": 120, "trained_tokens": 40, "dirty_samples": 0,
        "sources": {
            "pictures": {"loss": loss, "tokens": 90, "trained_tokens": 20},
            TALK: {"loss": loss, "tokens": 30, "trained_tokens": 20},
        },
        "learning_rate": 1e-3, "grad_norm": None if step == 3 else 1.0, "tokens_per_second": 60.0,
        "peak_memory_bytes": 2**30,
    }  # fmt: skip


def jpeg():
    file = io.BytesIO()
    Image.fromarray(np.full((40, 60, 3), 128, np.uint8)).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


def validation(loss):
    return {
        "pictures": {"loss": loss, "trained_tokens": 30},
        TALK: {"loss": None if loss > 8 else loss, "trained_tokens": 10},
    }


def generations(answer, **more):
    return [
        {"key": f"easy_vqa/1{HOSTILE}", "prompt": f"<image>What is it? {HOSTILE}", "answer": answer, **more},
        {"key": "talk/2", "prompt": "And <image> in words?", "answer": "x" * 300, **more, "images": []},
    ]


def write_run(folder, *, status="finished", steps=40, held=True, chosen=True, **more):
    """The folder of a run, by hand."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE % (folder / "stores"))
    versions = {"torch": "2.13.0"}
    RunStatus(
        status=status, step=steps, max_steps=40, seconds=80, tokens=120 * steps, precision="bfloat16",
        versions=versions, **more,
    ).write(folder)  # fmt: skip
    lines = [line(step) for step in range(1, steps + 1)]
    for one in lines[9::10] if held else []:
        one |= {"validation": validation(8 / one["step"]), "generations": generations(f"said at {one['step']}")}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    if held:
        shown = generations("said before", expected=f"right {HOSTILE}", images=[jpeg()])
        shown[1]["images"] = []
        (folder / "before.json").write_text(json.dumps({"validation": validation(9.0), "generations": shown}))
    if chosen:
        (folder / "selection.json").write_text(json.dumps(selection()))
        for rank, hash_ in (("text", "a"), ("letter", "b")):
            for step in (10, 20, 30, 40):
                file = folder / "evaluations" / "shapes" / hash_ / f"checkpoint-{step}.json"
                file.parent.mkdir(parents=True, exist_ok=True)
                summary = {"rank": rank, "protocol": "circular", "accuracy": step / 50, "questions": 100}
                file.write_text(json.dumps(summary | {"interval": [step / 60, step / 45], "chance": 0.25}))
    return folder


def selection():
    scores = [
        {"checkpoint": f"checkpoint-{step}", "step": step, "score": step / 50, "interval": [step / 60, step / 45],
         "p_best": step / 100, "has_weights": step > 10}
        for step in (10, 20, 30, 40)
    ]  # fmt: skip
    category = {"questions": 50, "scores": [0.1, 0.2, 0.3, 0.4], "intervals": [[0, 0.5]] * 4}
    return {
        "by": "mmbench", "rule": "best", "selected": "checkpoint-30", "best": "checkpoint-40", "scores": scores,
        "tied": ["checkpoint-30", "checkpoint-40"], "cross_fitted": 0.55, "cross_fitted_interval": [0.5, 0.6],
        "categories": {"colour": category, HOSTILE: category}, "benchmark": "shapes", "ranks": ["letter", "text"],
        "questions": [100, 100], "images": 60, "chosen_on": "all", "warnings": ["100 questions cannot tell 2 apart"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return read_run(write_run(tmp_path_factory.mktemp("run")))


# ------------------------------------------------------------------------------------------------------------- facts


def test_shares_are_those_that_were_trained_on(run):
    pictures, talk = source_totals(run)
    assert (pictures.asked, pictures.tokens, pictures.tokens_share, pictures.trained_share) == (0.75, 3600, 0.75, 0.5)
    assert (talk.asked, talk.tokens, talk.tokens_share, talk.trained_share) == (0.25, 1200, 0.25, 0.5)
    assert pictures.records is None, "its prepared data are not here"


def test_what_was_left_out_is_told_by_reason(run):
    store = {"samples": 5, "distinct_images": 4, "licence": "MIT", "records": 10}
    stores = [
        store | {"filtered": {"no answer": 2}, "skipped": {}},
        store | {"filtered": {"no answer": 1}, "skipped": {HOSTILE: 7}},
    ]
    pictures, _ = source_totals(replace(run, stores={"pictures": stores, TALK: []}))
    assert (pictures.records, pictures.samples, pictures.images, pictures.licences) == (20, 10, 8, ("MIT",))
    assert (pictures.filtered, pictures.skipped) == ({"no answer": 3}, {HOSTILE: 7})
    page = render(replace(run, stores={"pictures": stores, TALK: []}))
    assert "What was left out" in page and "<td>3</td><td>7</td>" in page, "filtered and skipped are counted apart"


def test_the_most_important_sentence_stands_on_top(run, tmp_path):
    assert '<p class="conclusion">checkpoint-30 was selected' in render(run)
    not_chosen = render(read_run(write_run(tmp_path / "run", chosen=False)))
    assert '<p class="conclusion">The held-out loss went from ' in not_chosen


def test_held_out_loss_begins_with_the_base_and_weighs_by_tokens(run):
    assert held_out(run, TALK)[0] == (10, 0.8), "of the base nothing was known"
    assert held_out(run)[0] == (0, 9.0)
    assert [step for step, _ in held_out(run)] == [0, 10, 20, 30, 40]


def test_answers_are_those_of_the_base_and_of_the_selected_checkpoint(run):
    first, second = answers(run)
    assert [(said.who, said.text, said.is_after) for said in first.answers] == [
        ("before", "said before", False),
        ("step 30, selected", "said at 30", True),
        ("the data", f"right {HOSTILE}", False),
    ]
    assert first.prompt.startswith("What is it?"), "its image is shown"
    assert second.prompt == "And <image> in words?", "a text"


def test_the_choice_is_told_with_its_reason(run):
    assert [sentence.replace(NBSP, " ") for sentence in selection_words(run.selection)] == [
        "checkpoint-30 was selected: it is the best of those that still have their weights, and has 60.0 % "
        "(95 % interval 50.0 % to 66.7 %).",
        "The figures are from 100 questions about 60 images or texts of shapes, ranked by letter and text, the mean "
        "of both.",
        "checkpoint-40 has the highest score.",
        "Cross-fitted, that is, chosen on one half and scored on the other, the choice scores 55.0 % "
        "(50.0 % to 60.0 %).",
    ]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"status": "running", "steps": 7, "chosen": False, "held": False}, "is being trained, or was killed"),
        ({"status": "running", "steps": 0, "chosen": False, "held": False}, "No step was finished"),
        ({"status": "failed", "steps": 3, "chosen": False, "why": f"OOM {HOSTILE}"}, "Failed after step 3: OOM"),
        ({"status": "failed", "steps": 0, "chosen": False, "held": False}, "the reason was not recorded"),
        ({"status": "stopped", "steps": 12}, "Stopped after step 12; `idefics-sft train"),
        ({"failed_evaluations": {"checkpoint-20": "full"}}, "checkpoint-20: failed, training went on: full"),
        ({"held": False, "chosen": False}, "finished"),
        ({"held": False}, "checkpoint-30 was selected"),
    ],
    ids=str,
)
def test_a_run_in_any_state_has_a_page(tmp_path, how, told):
    assert told in render(read_run(write_run(tmp_path / "run", **how)))


def test_the_page_of_a_long_run_is_not_large(run):
    assert len(render(replace(run, lines=[line(step) for step in range(1, 22_001)]))) < 300_000


def test_a_line_on_its_way_is_not_read_and_a_damaged_one_is_told(tmp_path):
    file = write_run(tmp_path / "run") / "metrics.jsonl"
    with file.open("a") as opened:
        opened.write('{"step": 41, "lo')
    assert read_run(tmp_path / "run").lines[-1]["step"] == 40
    file.write_text("{}\nnothing\n")
    with pytest.raises(UserError, match=r"metrics.jsonl:2: damaged"):
        read_run(tmp_path / "run")


def test_the_command_writes_the_page(tmp_path, capsys, refusal):
    run = write_run(tmp_path / "run")
    assert status_of("report", run) == 0
    assert "report.html: " in capsys.readouterr().out
    assert status_of("report", run, "--output", tmp_path / "page.html", "--json") == 0
    size = (tmp_path / "page.html").stat().st_size
    assert json.loads(capsys.readouterr().out) == {"report": str(tmp_path / "page.html"), "bytes": size}
    assert "nothing here" not in refusal("report", tmp_path / "nothing")
    (run / "run.json").write_text("{")
    assert "run.json: damaged, not the status of a run; put a copy of it back" in refusal("report", run)
    (run / "run.json").unlink()
    assert "no run here (no run.json)" in refusal("report", run)


# ------------------------------------------------------------------------------------------------------------ charts


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
@example(879609.9999999999, 1e-06, 5)
def test_ticks_are_round_and_inside(low, span, number):
    axis = Axis(low=low, high=low + span, start=0, end=100)
    ticks = axis.ticks(number)
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in ticks)
    assert len(ticks) <= number + 1


@given(st.floats(1e-6, 1e3), st.floats(10, 1e5))
def test_ticks_of_a_logarithmic_axis_are_inside_and_not_too_many(low, factor):
    ticks = Axis(low=low, high=low * factor, start=0, end=100, is_log=True).ticks(4)
    assert 1 <= len(ticks) <= 13 and all(low <= tick <= low * factor for tick in ticks)


@given(st.lists(st.tuples(st.floats(0, 9), st.integers(1, 99)), min_size=1, max_size=50), st.integers(1, 60))
def test_means_of_stretches_are_those_of_their_tokens(losses, bins):
    points = [(step, loss, weight) for step, (loss, weight) in enumerate(losses)]
    found = binned(points, bins)
    assert len(found) <= bins
    width = -(-len(points) // bins)
    weights = [sum(point[2] for point in points[first : first + width]) for first in range(0, len(points), width)]
    mean = sum(loss * weight for loss, weight in losses) / sum(weights)
    assert sum(y * weight for (_, y), weight in zip(found, weights, strict=True)) / sum(weights) == pytest.approx(mean)


def test_numbers_are_short():
    assert [plain(value) for value in (0, 0.25, 12.5, 4100, 41000, 2.5e6, 2e-5)] == [
        "0", "0.25", "12.5", "4,100", "41k", "2.5M", "2e-5",
    ]  # fmt: skip
    assert [scientific(value) for value in (0, 1.5e-3, 1e-5)] == ["0", "1.5e-3", "1e-5"]
    assert [duration(value) for value in (12, 450, 11520, 183600)] == ["12 s", "7 min 30 s", "3 h 12 min", "2 d 3 h"]
    assert percent(0.963) == f"96.3{NBSP}%"


def test_one_point_and_equal_points_can_be_drawn():
    for points in ([(1, 2.0)], [(1, 0.0), (2, 0.0)], [(5, -1.0), (6, -1.0)]):
        svg = chart([Series(points=points)], label='a "quoted" <label>', format_y=plain)
        assert "<circle" in svg or "<polyline" in svg
        assert "nan" not in svg and "<label>" not in svg


# -------------------------------------------------------------------------------------------------------------- page


def test_nothing_of_a_run_becomes_markup_and_nothing_is_fetched(run):
    text = render(run)
    assert "<script" not in text.lower()
    assert "<b>talk" not in text
    assert re.findall(r"<(?:img|link|iframe|object|embed|base|form)\b[^>]*", text) == re.findall(
        r'<img src="data:image/jpeg;base64,[^>]*', text
    )
    assert "url(" not in text and "@import" not in text


@pytest.fixture
def shown(browser, run, tmp_path):
    """The page of the run, opened; at the end its console must be empty."""
    file = tmp_path / "report.html"
    file.write_text(render(run), encoding="utf-8")
    browser.get_log("browser")
    browser.get(file.as_uri())
    yield browser
    assert browser.get_log("browser") == []


def test_figures_images_and_texts_are_there(shown):
    titles = visible(shown, "figure.card h3")
    assert titles == [
        "Score", "By text", "By letter", "colour", HOSTILE,
        "Loss", "Learning rate", "pictures", TALK, "Speed", "Memory", "Gradient norm",
    ]  # fmt: skip
    for size in visible(shown, "figure.card svg", "clientHeight"):
        assert size > 100
    assert visible(shown, ".answer img", "naturalWidth") == [60]
    assert HOSTILE in visible(shown, ".answer .prompt")[0]
    assert shown.title.endswith("idefics-sft"), "no text of the run has run"
    fetched = shown.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []
    assert len(shown.find_elements("css selector", "svg .ring")) == 5
    assert "trained tokens" in " ".join(visible(shown, ".bars > span"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 390, 820, 1440])
def test_the_page_fits_phones_and_laptops_in_both_schemes(shown, scheme, width):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    shown.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    shown.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        assert shown.execute_script("return document.documentElement.scrollWidth") == width
        background = shown.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, background[4:-1].split(","))) > 382) == (scheme == "light")
        smallest = shown.execute_script(
            "return Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height))"
        )
        assert smallest >= 10, "letters of a chart can be read"
    finally:
        shown.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        shown.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
