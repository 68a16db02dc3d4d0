"""What `mix` reports is what the planner gives, counted by hand, and it stays readable."""

import io
import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from helpers.planning import Toy
from rich.console import Console

from sft.batches.look_ahead import describe_data, look_ahead, planned
from sft.batches.mixture_report import mix
from sft.batches.pack_stream import Planner
from sft.cli.mix import show
from sft.cli.terminal import console
from sft.core.shipped import recipe_path
from sft.recipe import load_recipe

STEPS = 20
SOURCES = (
    Toy(0.3, [7, 12, 30, 5], [(1,), (1,), (2, 3), ()], name="pictures"),
    Toy(0.5, [9, 40], [(), ()], name="talk"),
    Toy(0.2, [21], [(1, 4, 4)], name="album"),
)


def recipe_of(*overrides):
    """Packs of 64 tokens and 4 images, eight a step: a window is eight steps."""
    sizes = ("data.sequence_length=64", "training.tokens_per_step=512", "data.max_images_per_pack=4")
    return load_recipe(
        recipe_path("idefics-9b-instruct"), (*sizes, "data.max_samples_per_image_per_pack=3", *overrides)
    )


def packs_of(recipe, sources):
    planner = Planner(sources, recipe.data, packs_per_step=8, seed=recipe.seed)
    return [pack for window in islice(planner.windows(), 3) for pack in window][: STEPS * 8]


def printed(report, out=None):
    out = out or console()
    out.file = io.StringIO()
    show(report, out)
    return out.file.getvalue()


@pytest.mark.parametrize("unit", ["tokens", "trained_tokens", "samples"])
def test_errors_after_every_pack_and_at_window_ends_are_those_counted_by_hand(unit):
    recipe = recipe_of(f"data.share_unit={unit}")
    report = mix(recipe, SOURCES, STEPS)
    packs = packs_of(recipe, SOURCES)
    worth = {"tokens": lambda n: n, "trained_tokens": lambda n: n // 2, "samples": lambda n: 1}[unit]
    given, errors = np.zeros(3), []
    for pack in packs:
        for source, sample in pack.items:
            given[source] += worth(SOURCES[source].lengths[sample])
        errors.append(np.abs(given - np.array([source.share for source in SOURCES]) * given.sum()))
    pack = 64 if unit == "tokens" else given.sum() / len(packs)
    for number, source in enumerate(report["sources"]):
        assert source["error_inside_in_packs"] == pytest.approx(max(e[number] for e in errors) / pack)
        assert source["error_in_packs"] == pytest.approx(max(e[number] for e in errors[63::64]) / pack)
        assert source["achieved"] == pytest.approx(given[number] / given.sum())
    assert report["largest_error_in_packs"] == max(source["error_in_packs"] for source in report["sources"])
    assert max(report["windows"]["largest_error_inside_in_packs"]) == report["largest_error_inside_in_packs"]
    assert report["windows"]["count"] == 3, "two and a half"


def test_images_are_counted_as_they_are_shown_encoded_and_needed():
    recipe = recipe_of()
    report = mix(recipe, SOURCES, STEPS)
    packs = packs_of(recipe, SOURCES)
    shown = [[image for s, i in pack.items for image in set(SOURCES[s].shown[i])] for pack in packs]
    distinct = Counter(len(set(images)) for images in shown)
    assert report["packs"]["by_distinct_images"] == [distinct[number] for number in range(max(distinct) + 1)]
    assert report["packs"]["images_per_pack"] == sum(map(len, shown)) / len(packs)
    assert report["packs"]["encodes_saved"] == pytest.approx(
        1 - sum(n * packs for n, packs in distinct.items()) / sum(map(len, shown))
    )
    assert [source["budget"]["images"] for source in report["sources"]] == [3, 0, 2]
    assert [source["budget"]["pieces"] for source in report["sources"]] == [4, 2, 1]
    assert sum(report["packs"]["by_fill"]) == report["packs"]["count"] == STEPS * 8


def test_errors_are_counted_anew_where_a_source_leaves_its_share_to_the_others():
    few = Toy(0.5, [8] * 600, name="few", max_epochs=1, when_exhausted="reweight")
    report = mix(recipe_of(), [few, Toy(0.25, [8], name="a"), Toy(0.25, [8], name="b")], STEPS * 2)
    assert report["largest_error_in_packs"] <= 3
    assert report["sources"][0]["ended_at_step"] == 24, "600 of 64 x 8 samples a window, half of them"
    assert report["warnings"][-1] == "few ends after max_epochs at step 24; the others take its share"
    assert report["ended_by"] is None


@pytest.mark.parametrize(
    ("epochs", "training", "steps", "warmup"),
    [
        (3, "epochs=3", 57, 2),  # 450 packs, 8 a step
        (3, "max_steps=100", 57, 0),  # the source comes to its end before
        (None, "max_steps=4", 4, 0),
    ],
)
def test_a_training_and_its_schedule_end_at_the_true_last_step(epochs, training, steps, warmup):
    recipe = recipe_of("training.warmup_steps=", "training.decay_steps=", f"training.{training}")
    recipe = planned(recipe, report := look_ahead(recipe, [Toy(1, [64] * 150, max_epochs=epochs)]))
    assert (report["steps"], recipe.training.steps, recipe.training.warmup_steps) == (steps, steps, warmup)


def test_a_long_training_is_looked_ahead_by_its_first_packs():
    report = look_ahead(recipe_of("training.max_steps=22000"), [Toy(1, [64] * 1000, name="mine")])
    assert report["steps"] == 22000 and report["sources"][0]["epochs"] == pytest.approx(22000 * 8 / 1000, rel=0.01)


def test_training_begins_with_what_it_is_trained_on():
    """Ten samples of a pack each, eight packs a step: 16 epochs in 20 steps, 0.8 in each."""
    recipe = recipe_of("training.max_steps=20", "training.decay_steps=", "training.warmup_steps=1")
    report = look_ahead(recipe, [Toy(1, [64] * 10, name="mine")])
    report["sources"][0] |= {"skipped": {"no answer": 2}, "held_out": {"validation": 3}}
    assert list(describe_data(report)) == [
        "mine: 10 samples, 3 held out, trained for 16 epochs",
        "mine: 2 skipped, no answer",
        "20 steps of 8 packs, 100.0 % full of tokens",
        "warning: mine is drawn for 16.0 epochs, 0.8 in each step; training.tokens_per_step=192 and "
        "training.epochs=3 are better",
    ]


@pytest.mark.parametrize(
    ("samples", "tokens", "micro", "advice"),
    [
        (40, 512, 1, "5 steps; training.tokens_per_step=256 gives it more"),
        (40, 512, 8, "5 steps; training.tokens_per_step=256 training.micro_batch_packs=4 gives it more"),
        (5, 64, 1, "5 steps; a smaller data.sequence_length gives it more"),  # a step has one pack already
        (1, 64, 1, "1 step; a smaller data.sequence_length gives it more"),
    ],
)
def test_what_gives_more_steps_is_named(samples, tokens, micro, advice):
    sizes = f"training.tokens_per_step={tokens}", f"training.micro_batch_packs={micro}"
    recipe = recipe_of("training.epochs=1", "training.decay_steps=", "training.warmup_steps=", *sizes)
    (warning,) = mix(recipe, [Toy(1, [64] * samples, name="mine", max_epochs=1)])["warnings"][-1:]
    assert warning == f"training has {advice}"


def test_what_data_are_called_is_printed_as_it_is():
    hostile = "[bold]x[/bold] [/] :smile: \x1b[2J"
    report = mix(recipe_of(), [Toy(1, [8], name=hostile)], 1)
    report["sources"][0]["skipped"] = {"no [red]answer[/red] \x1b]0;x\x07": 3}
    for out in (console(), Console(width=120)):  # with markup, even
        text = printed(report, out)
        assert "\x1b" not in text and "\x07" not in text
        assert "no [red]answer[/red]" in text
        if out.width == 120:
            assert "3 skipped" in text


def test_a_thousand_sources_stay_readable_and_exact():
    sources = [Toy((1 + n % 7) / 3997, [4 + n % 9, 20, 33] * 15, name=f"source {n}") for n in range(1000)]
    assert sum(source.share for source in sources) == pytest.approx(1)
    report = mix(recipe_of("training.tokens_per_step=32768"), sources, 2)
    assert report["largest_error_in_packs"] <= 3
    for source in report["sources"]:
        source["skipped"] = {"no answer": 2}
    lines = printed(report).splitlines()
    assert len(lines) < 95 and max(map(len, lines)) <= 120
    assert any("977 others" in line for line in lines)
    assert "2,000 skipped, no answer (1,000 sources)" in lines
    assert len(json.loads(json.dumps(report))["sources"]) == 1000


def test_the_report_says_what_images_weigh_and_what_would_fill_packs():
    """Samples of 40 tokens, of which no two fit a pack of 64 and three one of 128; each shows an image of 5 tiles."""

    class Tiled(Toy):
        def images(self, rows):
            shown = super().images(rows)
            return shown._replace(weights=5 * shown.weights)

    recipe = recipe_of("data.max_images_per_pack=30")
    report = mix(recipe, [Tiled(1, [40] * 300, [(n,) for n in range(300)])], STEPS)
    assert report["packs"]["image_weight"] == {"mean": 5, "p95": 5, "max": 5} and report["packs"]["left_out"] == 0
    advice = "packs are 62% full; data.sequence_length=128 training.tokens_per_step=512 would fill 94% with the same"
    assert report["warnings"][0].startswith(advice)
    assert "images weigh 5.0 a pack, 95 % of packs up to 5, at most 5" in printed(report)
    assert mix(recipe_of(), SOURCES, STEPS)["packs"]["advice"] == "", "it is 98 % full"
