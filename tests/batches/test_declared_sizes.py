"""Mixtures by declared sizes, and what `mix` reports of them."""

import numpy as np
import pytest

from sft.batches.declared_sizes import CARD, declared_sources
from sft.batches.mixture_report import mix
from sft.core.errors import UserError
from sft.core.shipped import recipe_path
from sft.recipe import load_recipe


def card(*overrides):
    return load_recipe(recipe_path("idefics-9b-instruct"), overrides)


@pytest.fixture(scope="module")
def report():
    recipe = card()
    return mix(recipe, declared_sources(recipe.data), steps=6)


def test_declared_lengths_are_those_that_are_declared():
    rows = np.arange(20_000)
    for source in declared_sources(card().data):
        tokens, (_, _, images) = source.num_tokens(rows), source.images(rows)
        assert np.median(tokens) == pytest.approx(CARD[source.name].median_tokens, rel=0.05)
        assert images.mean() == pytest.approx(CARD[source.name].images_per_sample, rel=0.05)
        assert tokens.max() <= 2048 and tokens.min() >= 12
    few = declared_sources(card().data)[3]
    assert few.num_tokens(rows[:5]).tolist() == few.num_tokens(rows)[:5].tolist(), "a function of the row"


def test_two_published_means_are_met():
    """UltraChat: 1,467 tokens a dialogue (a little less here, cut to a pack); OBELICS: 2.5 images a document."""
    sources = {source.name: source for source in declared_sources(card().data)}
    rows = np.arange(50_000)
    assert sources["ultrachat"].num_tokens(rows).mean() == pytest.approx(1400, rel=0.05)
    assert sources["obelics"].images(rows).numbers.mean() == pytest.approx(353 / 141, rel=0.05)


def test_the_cards_mixture_is_exact_and_its_packs_are_full(report):
    for source in report["sources"]:
        assert source["achieved"] == pytest.approx(source["asked"], abs=0.002)
        for unit in ("tokens", "trained_tokens", "samples"):
            assert 0 < source["achieved_in"][unit] < 1
    assert sum(source["achieved_in"]["samples"] for source in report["sources"]) == pytest.approx(1)
    assert report["packs"]["count"] == 600
    assert report["packs"]["fill"] >= 0.985
    assert report["packs"]["distinct_images_per_pack"] <= 24
    assert report["largest_error_in_packs"] <= 3


def test_what_has_to_be_downloaded_is_told(report):
    sources = {source["name"]: source for source in report["sources"]}
    svit, llavar = sources["svit"], sources["llavar"]
    assert svit["budget"]["pieces"] == svit["samples"]
    assert svit["budget"]["images"] <= 108_077
    assert llavar["budget"]["images"] == llavar["budget"]["pieces"], "each has an image of its own"
    images = llavar["budget"]["images"] * CARD["llavar"].bytes_per_image
    assert llavar["budget"]["bytes"] == images + 4 * llavar["tokens"]
    assert report["budget"]["bytes"] == sum(source["budget"]["bytes"] for source in sources.values())
    assert sources["ultrachat"]["budget"]["images"] == 0
    assert sources["ultrachat"]["budget"]["bytes"] > 0


def test_a_source_whose_epochs_are_over_ends_it_all():
    recipe = card("data.mixture.3.max_epochs=0.1")
    report = mix(recipe, declared_sources(recipe.data), steps=60)
    assert report["ended_by"] == "llavar"
    assert report["steps"] < 60
    llavar = report["sources"][3]
    assert llavar["epochs"] == pytest.approx(0.1, rel=0.01)


def test_a_source_may_leave_its_share_to_the_others():
    recipe = card("data.mixture.3.max_epochs=0.1", "data.mixture.3.when_exhausted=reweight")
    report = mix(recipe, declared_sources(recipe.data), steps=60)
    assert report["ended_by"] is None and report["steps"] == 60
    assert report["sources"][3]["achieved"] < 0.063
    assert report["packs"]["fill"] >= 0.98


def test_nothing_is_declared_for_a_source_of_your_own():
    recipe = card("data.mixture=[{name: utrachat, share: 1, datasets: [{dataset: ultrachat, path: raw}]}]")
    with pytest.raises(UserError, match="no sizes are declared for it; did you mean"):
        declared_sources(recipe.data)
