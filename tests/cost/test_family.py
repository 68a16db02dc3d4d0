"""`plan` knows no family by name: it asks the module `cost` of whatever family a recipe names."""

import json
from dataclasses import replace

import pytest
from conftest import status_of
from helpers.tiled import byte_tokenizer, tiny_config
from transformers import Idefics3Config

from sft.core.errors import UserError
from sft.cost.family import Setting, read_model
from sft.cost.idefics3.cost import TiledCost
from sft.models import get_family

RELEASED = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": 256_484_928,
    "HuggingFaceTB/SmolVLM-500M-Instruct": 507_482_304,
    "HuggingFaceTB/SmolVLM-Instruct": 2_246_272_880,
    "HuggingFaceM4/Idefics3-8B-Llama3": 8_462_086_384,
    "HuggingFaceM4/idefics2-8b": 8_402_768_112,
}


@pytest.fixture
def tiled_base(tmp_path):
    text = dict(model_type="llama", vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    vision = dict(hidden_size=64, patch_size=8, image_size=32, num_hidden_layers=2, intermediate_size=128)
    Idefics3Config(text_config=text, vision_config=vision, scale_factor=2).save_pretrained(tmp_path)
    return tmp_path


def test_a_family_outside_the_tree_is_planned_by_its_own_costs(tiled_base, capsys):
    overrides = (f"model.path={tiled_base}", "model.family=outside_family", "data.augment=none", "training.groups={}")
    sizes = ("data.sequence_length=256", "data.max_images_per_pack=40", "training.tokens_per_step=512")
    recipe = ("quickstart", *overrides, *sizes, "training.micro_batch_packs=2", "model.trainable=[language, head]")
    assert status_of("plan", *recipe, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    model = read_model("outside_family", str(tiled_base))
    assert isinstance(model, TiledCost) and report["parameters"] == model.parameters
    assert report["feature_cache"]["bytes_per_image"] == 13 * 4 * 64 * 2, "a 640 x 480 has 3 x 4 tiles and the whole"
    assert status_of("plan", *recipe) == 0
    assert "512 tokens, 6 images of weight 80" in capsys.readouterr().out, "three images of up to 17 tiles in each pack"


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_shapes_have_their_parameters_to_the_digit(name):
    family = "idefics2" if "idefics2" in name else "smolvlm"
    assert read_model(family, name).parameters == RELEASED[name]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["idefics3", "idefics2"])
def test_parameters_are_those_of_transformers_by_group(tmp_path, family, tied):
    config = tiny_config(byte_tokenizer(), family, tied)
    config.save_pretrained(tmp_path)
    cost, model = read_model(family, str(tmp_path)), get_family(family).weights.model_class(config)(config)
    assert cost.parameters == sum(weight.numel() for weight in model.parameters())
    parts = {"vision": model.model.vision_model, "connector": model.model.connector, "head": model.lm_head}
    for group, part in parts.items():
        setting = Setting(tokens=256, images=1, image_weight=17, trained_tokens=256, trainable=(group,))
        own = 0 if tied and group == "head" else sum(weight.numel() for weight in part.parameters())
        assert cost.trained_parameters(setting) == own, group


def test_patches_of_idefics2_are_what_a_pack_costs(tmp_path):
    tiny_config(byte_tokenizer(), "idefics2").save_pretrained(tmp_path)
    images = {"longest_edge": 128, "shortest_edge": 48}
    split, whole = (read_model("idefics2", str(tmp_path), images | {"split": split}) for split in (True, False))
    assert split.fullest_images(256, 3072) == (9, 9 * 5 * 64) and whole.fullest_images(256, 3072) == (42, 42 * 64)
    assert whole.fullest_images(256, 300) == (33, 300), "as many as there may be of the smallest, of 9 patches"
    setting = Setting(tokens=256, images=4, image_weight=256, trained_tokens=256, trainable=("vision",))
    light, heavy = (whole.cost(replace(setting, image_weight=weight)) for weight in (64, 256))
    assert light.flop < heavy.flop and light.bytes["images"] < heavy.bytes["images"]


def test_image_settings_of_a_recipe_are_planned_with(tiled_base):
    model = read_model("idefics3", str(tiled_base), {"split": False})
    assert model.feature_bytes(640, 480) == 4 * 64 * 2 and model.fullest_images(256, 256) == (42, 42)


def test_a_family_without_costs_is_refused_in_one_line_that_names_those_known(refusal):
    printed = refusal("plan", "quickstart", "model.family=xml")
    assert "model.family: plan knows no costs of 'xml' (known: idefics, idefics2, idefics3;" in printed
    with pytest.raises(UserError, match=r"model_type is 'idefics'; model\.family loads 'idefics3' or 'smolvlm'"):
        read_model("idefics3", "shipped:tiny_base")


@pytest.mark.parametrize(("name", "length"), [("HuggingFaceM4/Idefics3-8B-Llama3", 2048), (None, 64)])
def test_a_length_that_holds_hardly_an_image_is_refused_with_the_one_needed(name, length, tiled_base, refusal):
    """13 tiles of 640 x 480 take 2,223 tokens in Idefics3-8B."""
    overrides = ("model.family=smolvlm", "data.augment=none", "training.groups={}", "training.tokens_per_step=8192")
    recipe = ("quickstart", *overrides, f"model.path={name or tiled_base}", "model.trainable=[language]")
    printed = refusal("validate", *recipe, f"data.sequence_length={length}")
    assert f"data.sequence_length: {length} holds hardly an image, since one of 640 x 480 takes" in printed
    assert "set 4096 at least (8192 if it is left out)" in printed or not name
