"""`plan` knows no family by name: it asks the module `cost` of whatever family a recipe names."""

import json

import pytest
from conftest import status_of
from inline_family.cost import InlineCost
from transformers import Idefics3Config

from sft.cost.family import read_model


@pytest.fixture
def inline_base(tmp_path):
    text = dict(model_type="llama", vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    vision = dict(hidden_size=64, patch_size=8, image_size=32, num_hidden_layers=2, intermediate_size=128)
    Idefics3Config(text_config=text, vision_config=vision, scale_factor=2).save_pretrained(tmp_path)
    return tmp_path


def test_a_family_outside_the_tree_is_planned_by_its_own_costs(inline_base, capsys):
    overrides = (f"model.path={inline_base}", "model.family=inline_family", "data.augment=none", "training.groups={}")
    sizes = ("data.sequence_length=256", "data.max_images_per_pack=40", "training.tokens_per_step=512")
    recipe = ("quickstart", *overrides, *sizes, "training.micro_batch_packs=2", "model.trainable=[language, head]")
    assert status_of("plan", *recipe, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    model = read_model("inline_family", str(inline_base))
    assert isinstance(model, InlineCost) and report["parameters"] == model.parameters
    assert report["bytes"]["optimizer"] == 8 * model.parameters and report["bytes"]["images"] == 80 * 3 * 32 * 32
    assert report["feature_cache"]["bytes_per_image"] == 7 * 4 * 64 * 2, "a 640 x 480 has 2 x 3 tiles and the whole"
    assert status_of("plan", *recipe) == 0
    assert "512 tokens, 12 images of weight 80" in capsys.readouterr().out, "six images of 40 tiles in each pack"


def test_a_family_without_costs_is_refused_in_one_line_that_names_those_known(refusal):
    printed = refusal("plan", "quickstart", "model.family=xml")
    assert "model.family: plan knows no costs of 'xml' (known: idefics;" in printed
