"""A pack as it is shown: in a dict, in the terminal, and as a page in a browser."""

import base64
import io
import json
import re
from itertools import islice

import numpy as np
import pytest
from conftest import (
    IMAGE_SIZE,
    batch_of,
    conversation,
    document,
    image_number,
    picture,
    pixels_of,
    place,
    square_images,
    status_of,
    visible,
)
from helpers.tiled import SAMPLES as TILED
from helpers.tiled import batch_of as tiled_batch
from helpers.tiled import byte_tokenizer, tiny_folder
from helpers.training import write_recipe
from PIL import Image
from rich.console import Console

from sft.batches.data_loader import MicroBatches
from sft.batches.inspect_pack import describe, find_pack, inspect_pack, page, token_texts
from sft.batches.pack_stream import Planner
from sft.batches.steps import Plans
from sft.cli.inspect import show
from sft.core.errors import UserError
from sft.core.sample import Pack, PackItem, SkipSample
from sft.data.prepare import prepare
from sft.data.sources import Sources
from sft.models import get_family
from sft.models.base_model import base_path
from sft.models.idefics.family import FAMILY
from sft.models.loaded_model import load_template
from sft.recipe import load_recipe

HOSTILE = "Ha </script><script>alert(1)</script><img src=x onerror=\"document.title='owned'\">\x1b[2J\u202e"
SAMPLES = (
    conversation(("<dog>", "What is it?"), "A dog.", key="dog"),
    conversation(("A cat.", "<dog>", "And this?", "<cat>"), "A cat.", key="cats"),
    conversation("Hi.", HOSTILE, key="hostile <b>key</b>"),
    document("A fox 狐.", key="fox"),
)


def description_of(template, *samples, train_on="assistant", pack_isolation=True, sequence_length=512):
    """Describe a pack of samples: those with images are of source `pictures`, the others of `talk`."""
    placed = [place(template, sample, source=int(not sample.images)) for sample in samples]
    batch = batch_of(placed, train_on=train_on, pack_isolation=pack_isolation)
    described = describe(
        batch,
        template,
        lengths=[len(sample.encoded.input_ids) for sample in placed],
        source_names=["pictures", "talk"],
        sequence_length=sequence_length,
    )
    how = {"train_on": train_on, "pack_isolation": pack_isolation}
    return {"pack": 3, "step": 2, "steps": 10, **how, **described}


def texts_of(description, sample, wanted=lambda token: True):
    own = description["samples"][sample]
    return "".join(token["text"] for token in description["tokens"][own["start"] : own["end"]] if wanted(token))


# ------------------------------------------------------------------------------------------------------- description


def test_tokens_join_to_the_text(template):
    for sample in SAMPLES:
        ids = template.encode(sample).input_ids.tolist()
        assert "".join(text for text, _ in token_texts(template.tokenizer, ids)) == template.text(sample.messages)


def test_a_character_comes_with_its_last_byte(template):
    texts = [text for text, _ in token_texts(template.tokenizer, template.encode(document("狐")).input_ids.tolist())]
    assert texts == ["<s>", "", "", "", "狐", "</s>"], "the first is what the tokenizer puts before every text"


def test_a_special_token_in_a_text_is_text(template):
    description = description_of(template, document("An <image>"))
    assert "".join(token["text"] for token in description["tokens"] if token["kind"] == "text") == "An <image>"
    assert description["figures"]["images"] == 0


def test_what_is_shown_as_trained_is_what_has_a_label(template):
    description = description_of(template, *SAMPLES)
    trained = [texts_of(description, number, lambda token: token["label"] is not None) for number in range(4)]
    assert trained[0] == " A dog.<end_of_utterance></s>"
    assert trained[2] == f" {HOSTILE}<end_of_utterance></s>"
    assert trained[3] == "A fox 狐.</s>"
    assert all(token["label"] in (None, token["id"]) for token in description["tokens"])
    everything = description_of(template, *SAMPLES, train_on="all")
    assert [token["label"] is None for token in everything["tokens"]].count(True) == 4, "only the first of a sample"


def test_each_token_says_which_image_it_looks_at(template):
    description = description_of(template, *SAMPLES)
    assert [sample["images"] for sample in description["samples"]] == [[0], [0, 1], [], []], "both show the dog"
    assert texts_of(description, 1, lambda token: token["image"] is None) == "<s>User: A cat.<fake_token_around_image>"
    assert texts_of(description, 1, lambda token: token["image"] == 0).endswith("And this?<fake_token_around_image>")
    assert texts_of(description, 1, lambda token: token["image"] == 1).startswith("<image><fake_token_around_image>")
    assert texts_of(description, 2, lambda token: token["image"] is not None) == ""


def test_images_are_the_pixels_that_the_model_is_given(template):
    images = description_of(template, *SAMPLES)["images"]
    for image, name in zip(images, ("<dog>", "<cat>"), strict=True):
        decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["png"]))))
        assert np.array_equal(decoded.transpose(2, 0, 1), pixels_of(image_number(picture(name))))
        assert (image["width"], image["height"]) == (IMAGE_SIZE, IMAGE_SIZE)


def test_figures_add_up(template):
    description = description_of(template, *SAMPLES)
    figures, sources = description["figures"], description["sources"]
    assert [(source["name"], source["samples"]) for source in sources] == [("pictures", 2), ("talk", 2)]
    for key in ("tokens", "trained_tokens"):
        assert figures[key] == sum(source[key] for source in sources)
    assert (figures["samples"], figures["images"], figures["distinct_images"]) == (4, 3, 2)
    assert figures["fill"] == len(description["tokens"]) / 512
    assert figures["trained_share"] == figures["trained_tokens"] / figures["tokens"]


def test_samples_that_see_each_other_still_have_borders(template):
    alone = description_of(template, *SAMPLES)
    together = description_of(template, *SAMPLES, pack_isolation=False)
    assert together["samples"] == alone["samples"]
    assert [token["position"] for token in together["tokens"]] == list(range(len(together["tokens"])))
    starts = [sample["start"] for sample in alone["samples"]]
    assert [number for number, token in enumerate(alone["tokens"]) if token["position"] == 0] == starts


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    """A pack of SmolVLM: images of 2 x 2, 1 x 2 and 2 x 1 tiles, two of them shown twice, and a text."""
    template = load_template(
        get_family("smolvlm"), tiny_folder(tmp_path_factory.mktemp("tiled") / "it", byte_tokenizer())
    )

    def describe_it(train_on):
        batch = tiled_batch(template, TILED, train_on=train_on)
        lengths = [len(template.encode(sample).input_ids) for sample in TILED]
        described = describe(batch, template, lengths=lengths, source_names=["mine"], sequence_length=512)
        return {"pack": 3, "step": 2, "steps": 10, "train_on": train_on, "pack_isolation": True, **described}

    return {train_on: describe_it(train_on) for train_on in ("assistant", "all")}


def test_images_that_are_cut_say_how_and_what_they_take(tiled):
    """Tokens are 4 states, a marker and a place for each tile, line breaks after rows, and a marker at the end."""
    keys = ("rows", "columns", "width", "height", "tokens")
    cuts = [tuple(image[key] for key in keys) for image in tiled["assistant"]["images"]]
    assert cuts == [(2, 2, 64, 64, 34), (1, 2, 64, 64, 21), (2, 1, 64, 64, 22)]
    work = [image["work_in_tokens"] for image in tiled["assistant"]["images"]]
    assert work[0] > work[1] == work[2] > 0
    kinds = [token["kind"] for token in tiled["assistant"]["tokens"]]
    assert kinds.count("image") == 5 and kinds.count("image") + kinds.count("state") == 4 * (5 + 3 + 3 + 3 + 3)


def test_an_image_is_a_word_in_the_terminal_and_a_row_of_a_table(tiled):
    """Where tags of tiles are trained, they are shown."""
    text = printed(tiled["assistant"], width=80)
    assert "<row_1_col_1>[image 0: the whole and 2x2 tiles]<fake_token_around_image>What is it?" in text.replace(
        "\n", ""
    )
    assert re.search(r"1 the whole and 2x2 tiles +34 +\d+ *\n +1 the whole and 1x2 tiles +21", text)
    assert "<image>" not in text and max(map(len, text.splitlines())) <= 80
    tags = printed(tiled["all"], width=400)
    assert "⟦User:<fake_token_around_image><row_1_col_1>⟧[image 0: the whole and 2x2 tiles]⟦<fake" in tags
    assert "<row_2_col_2>⟧<image>×4⟦⏎\n⏎\n<fake_token_around_image><global-img>⟧<image>×4⟦<fake" in tags


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A recipe of two packs a step, its sources, and its template."""
    recipe = load_recipe(write_recipe(tmp_path_factory.mktemp("inspect")))
    sources = prepare(recipe)
    return recipe, sources, load_template(FAMILY, base_path(recipe))


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_a_pack_is_the_one_that_training_draws(prepared, augment):
    recipe, sources, template = prepared
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"augment": augment})})
    sources = Sources(sources.parts, recipe.data)
    planner = Planner(sources.sources, recipe.data, packs_per_step=2, seed=recipe.seed)
    drawn = MicroBatches(Plans(sources, planner, micro_batch_packs=1), square_images(64))
    batches = {item["batch"].keys: item["batch"] for item in islice(drawn, 8)}  # a step's packs in another order
    for number in range(8):
        described = inspect_pack(recipe, sources, template, number=number)
        assert (described["pack"], described["step"], described["steps"]) == (number, number // 2 + 1, 4)
        batch = batches[tuple(sample["key"] for sample in described["samples"])]
        assert [token["id"] for token in described["tokens"]] == batch.input_ids_T.tolist()
        for image, pixels_CHW in zip(described["images"], *batch.tiles, strict=True):
            decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["png"]))))
            assert np.array_equal(decoded, pixels_CHW.permute(1, 2, 0).numpy())


def test_a_source_chooses_the_next_pack_that_holds_it(prepared):
    recipe, sources, template = prepared

    def names(number, **options):
        found = inspect_pack(recipe, sources, template, number=number, **options)
        return found["pack"], {sample["source"] for sample in found["samples"]}

    holding = [number for number in range(8) if "talk" in names(number)[1]]
    assert holding
    for start in range(holding[-1] + 1):
        assert names(start, source="talk")[0] == min(number for number in holding if number >= start)


def test_a_pack_that_is_not_there_is_refused(prepared, monkeypatch):
    recipe, sources, _ = prepared
    picture_only = Pack(items=(PackItem(0, 0),))
    monkeypatch.setattr(Planner, "windows", lambda self: iter([[picture_only, picture_only], [picture_only]]))
    assert find_pack(recipe, sources, 2, "pictures") == (2, picture_only)
    with pytest.raises(UserError, match="--pack 3: the mixture is exhausted before it"):
        find_pack(recipe, sources, 3, None)
    with pytest.raises(UserError, match="--source talk: no pack from --pack 1 to the last holds a sample of it"):
        find_pack(recipe, sources, 1, "talk")


@pytest.fixture(scope="module")
def unreadable(prepared):
    """A pack whose first image went away after it was prepared."""
    recipe, _, template = prepared
    sources = Sources(prepared[1].parts, recipe.data)
    read, first = sources.reader.image_bytes, []

    def fail(image):
        first.append(image)
        if image == first[0]:
            raise SkipSample("image does not decode", detail="dog<b>.jpg")
        return read(image)

    sources.reader.image_bytes = fail
    return inspect_pack(recipe, sources, template, source="pictures")


def test_an_image_that_cannot_be_read_is_black_and_told(unreadable):
    problems = [image["problem"] for image in unreadable["images"]]
    assert problems == ["image does not decode: dog<b>.jpg"] + [None] * (len(problems) - 1)
    for sample in unreadable["samples"]:
        shows_it = 0 in sample["images"]
        assert sample["problem"] == ("image does not decode" if shows_it else None)
        assert (sample["trained_tokens"] == 0) == shows_it
    text = printed(unreadable, width=200)
    assert "[image 0: black, image does not decode: dog<b>.jpg]" in text
    assert "not trained, since an image cannot be read any more: image does not decode" in text


def test_the_size_of_a_tile_is_known_without_loading_the_model(prepared):
    assert prepared[2].images.one_tile[:4] == (0, 0, 64, 64)


# ---------------------------------------------------------------------------------------------------------- terminal


def printed(description, width=60, **options):
    out = Console(file=io.StringIO(), width=width, highlight=False, soft_wrap=True, **options)
    show(description, out)
    return out.file.getvalue()


def test_without_colours_trained_tokens_stand_in_brackets(template):
    text = printed(description_of(template, *SAMPLES), width=200)
    assert "Assistant:⟦ A dog.<end_of_utterance></s>⟧" in text
    assert "<fake_token_around_image>[image 0: 28x28]<fake_token_around_image>" in text
    assert text.startswith("Pack 3, drawn for step 2 of 10: ")
    assert "positions 0 to " in text
    assert "tokens unused: nothing is padded in memory" in text


def test_with_colours_there_are_no_brackets(template):
    coloured = printed(description_of(template, SAMPLES[0]), force_terminal=True, color_system="standard")
    assert "\x1b[30;43m A" in coloured
    assert "⟦" not in coloured
    plain = printed(description_of(template, SAMPLES[0]), force_terminal=True, color_system="standard", no_color=True)
    assert "⟦ A" in plain and "43m" not in plain, "NO_COLOR in a terminal"


def test_a_sample_cannot_steer_the_terminal(template):
    text = printed(description_of(template, *SAMPLES))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[2J" in text


def test_text_is_wrapped(template):
    text = printed(description_of(template, conversation("Hi.", "A dog and a cat. " * 20)))
    assert max(map(len, text.splitlines())) <= 60


def test_the_command_prints_one_object_or_writes_a_page(prepared, tmp_path, capsys, refusal):
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(prepared[0].to_yaml())
    assert status_of("inspect", recipe, "--json", "--pack", 7) == 0
    description = json.loads(capsys.readouterr().out)
    assert description.keys() == {
        "pack", "step", "steps", "train_on", "pack_isolation", "sequence_length", "figures", "sources", "samples",
        "images", "tokens",
    }  # fmt: skip
    assert description["pack"] == 7
    assert description["tokens"][0].keys() == {
        "id", "name", "text", "kind", "label", "position", "segment", "image",
    }  # fmt: skip

    assert status_of("inspect", recipe, "--html", tmp_path / "pack.html", "--pack", 7) == 0
    assert f"{tmp_path}/pack.html: pack 7, drawn for step 4 of 4" in capsys.readouterr().out
    assert (tmp_path / "pack.html").read_text() == page(description)

    assert status_of("inspect", recipe) == 0
    assert "\x1b" not in capsys.readouterr().out

    assert "no such source; did you mean 'talk'? (sources: pictures, talk)" in refusal(
        "inspect", recipe, "--source", "tlk"
    )
    assert "--pack -1: the run has 8 packs, numbered from 0" in refusal("inspect", recipe, "--pack", -1)
    assert "--pack 8: the run has 8 packs, numbered from 0" in refusal("inspect", recipe, "--pack", 8)
    assert "nowhere/pack.html: No such file" in refusal("inspect", recipe, "--html", tmp_path / "nowhere" / "pack.html")


# -------------------------------------------------------------------------------------------------------------- page


def test_no_text_leaves_its_place_in_the_page(template):
    text = page(description_of(template, *SAMPLES))
    assert text.lower().count("</script>") == 2, "its own"
    assert "<img src=x" not in text
    assert "<b>key" not in text
    assert "http://" not in text
    assert "https://" not in text


@pytest.fixture
def shown(browser, template, tmp_path):
    """The page of the toys, opened; at the end its console must be empty."""
    file = tmp_path / "pack.html"
    file.write_text(page(description_of(template, *SAMPLES)), encoding="utf-8")
    browser.get(file.as_uri())
    yield browser
    assert browser.get_log("browser") == []


def test_the_page_tells_which_images_cannot_be_read(browser, unreadable, tmp_path):
    file = tmp_path / "unreadable.html"
    file.write_text(page(unreadable), encoding="utf-8")
    browser.get(file.as_uri())
    assert visible(browser, ".thumb.wrong") == ["image 0"]
    assert visible(browser, ".thumb.wrong", "title") == ["image 0, image does not decode: dog<b>.jpg"]
    number = sum(sample["problem"] is not None for sample in unreadable["samples"])
    (told,) = visible(browser, ".top + .wrong")
    assert told.startswith("1 image cannot be read any more") and f"{number} sample" in told
    assert visible(browser, ".sample p.wrong") == ["Not trained: image does not decode"] * number
    assert browser.get_log("browser") == []


def test_the_page_shows_images_and_texts(shown, template):
    assert visible(shown, ".thumb img", "naturalWidth") == [IMAGE_SIZE, IMAGE_SIZE]
    assert visible(shown, ".badge.picture img", "naturalWidth") == [IMAGE_SIZE] * 3
    assert visible(shown, ".sample h2") == ["dog", "cats", "hostile <b>key</b>", "fox"]
    texts = visible(shown, ".tokens")
    assert [text.replace("image 0", "<image>").replace("image 1", "<image>") for text in texts] == [
        template.text(sample.messages) for sample in SAMPLES
    ]
    assert shown.title == "Pack 3", "no text of a sample has run"
    assert "".join(visible(shown, "#sample-0 .trained")) == " A dog.<end_of_utterance></s>"
    (unused,) = visible(shown, ".rest")
    assert "tokens of the pack unused" in unused


def test_the_page_draws_tiles_over_images_in_their_own_shape(browser, tiled, tmp_path):
    file = tmp_path / "tiled.html"
    file.write_text(page(tiled["assistant"]), encoding="utf-8")
    browser.get(file.as_uri())
    for thumb, (columns, rows) in zip(
        browser.find_elements("css selector", ".thumb .shot.cut"), ((2, 2), (2, 1), (1, 2)), strict=True
    ):
        assert thumb.size["width"] / thumb.size["height"] == pytest.approx(columns / rows, rel=0.05)
        lines = browser.execute_script("return getComputedStyle(arguments[0], '::after').backgroundSize", thumb)
        assert lines.startswith(f"{100 / columns:g}% 100%, 100% {100 / rows:g}%"), lines
    browser.find_elements("css selector", ".thumb")[1].click()
    detail = browser.find_element("css selector", ".detail").text
    assert "the whole and 1x2 tiles, each 64x64" in detail and "21 tokens; encoding it is the work of" in detail
    assert browser.get_log("browser") == []


def test_what_the_pointer_passes_over_moves_nothing(shown):
    """Else the image under it would be another one at once."""
    from selenium.webdriver import ActionChains

    before = [thumb.rect for thumb in shown.find_elements("css selector", ".thumb")]
    ActionChains(shown).move_to_element(shown.find_elements("css selector", ".thumb")[1]).perform()
    assert "look at it" in shown.find_element("css selector", ".detail").text
    assert [thumb.rect for thumb in shown.find_elements("css selector", ".thumb")] == before


def test_images_are_whole_in_a_low_window(shown):
    shown.set_window_size(1280, 420)
    try:
        height, width = (visible(shown, ".thumb", size)[0] for size in ("offsetHeight", "offsetWidth"))
        assert height > width, "a square and its number"
    finally:
        shown.set_window_size(1280, 900)


def test_the_filter_leaves_one_source(shown):
    buttons = {button.text.split()[0]: button for button in shown.find_elements("css selector", ".filter button")}
    buttons["talk"].click()
    assert visible(shown, ".sample h2") == ["hostile <b>key</b>", "fox"]
    assert visible(shown, ".thumb") == []
    buttons["pictures"].click()
    assert visible(shown, ".sample h2") == ["dog", "cats"]
    assert visible(shown, ".thumb") == ["image 0", "image 1"]
    assert visible(shown, ".filter [aria-pressed=true]") == ["pictures 2"]
    buttons["All"].click()
    assert len(visible(shown, ".sample")) == 4


def test_a_token_and_its_image_point_at_each_other(shown):
    from selenium.webdriver import ActionChains, Keys

    answer = shown.find_elements("css selector", "#sample-1 .trained")[0]
    ActionChains(shown).move_to_element(answer).perform()
    assert visible(shown, ".thumb.linked") == ["image 1"]
    assert "looks at image 1" in shown.find_element("css selector", ".detail").text
    answer.click()
    ActionChains(shown).send_keys(Keys.ARROW_LEFT).perform()
    assert "not trained" in shown.find_element("css selector", ".detail").text
    ActionChains(shown).send_keys(Keys.ESCAPE).perform()
    assert visible(shown, ".linked") == []
    shown.find_elements("css selector", ".thumb")[0].click()
    assert "".join(visible(shown, "#sample-0 .linked")).startswith("image 0<fake_token_around_image>")
    assert visible(shown, "#sample-2 .linked") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_both_schemes(shown, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    shown.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    shown.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        assert shown.execute_script("return document.documentElement.scrollWidth") == 360
        background = shown.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, background[4:-1].split(","))) > 382) == (scheme == "light")
    finally:
        shown.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        shown.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
