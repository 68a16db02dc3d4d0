"""A model family is found by its name, and nothing outside of it knows one."""

import ast
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

import sft
from sft import models
from sft.core.errors import UserError
from sft.core.shipped import recipe_path, resolve
from sft.models import check_names, get_family, names_of_family
from sft.models.loaded_model import find_family, load_for_inference
from sft.recipe import load_recipe

KNOW_IDEFICS = {"cost", "models/idefics", "recipe/model.py", "cli/quickstart.py"}
"""The formula of `plan`, the family itself, and the default of `model.family`."""


def test_no_other_code_names_a_family():
    root = Path(sft.__file__).parent
    names = {
        str(file.relative_to(root))
        for file in root.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and node.value == "idefics"
    }
    assert {name for name in names if not any(name.startswith(known) for known in KNOW_IDEFICS)} == set()


@pytest.fixture
def toy_family(tmp_path, monkeypatch):
    """A folder whose model is of another family, which is IDEFICS by another name."""
    code = """
from dataclasses import replace
from types import SimpleNamespace

from sft.models.idefics.family import FAMILY as IDEFICS
from sft.models.idefics import text
from sft.models.idefics.weights import weights


def inside(load):
    return lambda path, **options: load(path / "inside", **options)


FAMILY = replace(
    IDEFICS,
    name="toy_family",
    text=SimpleNamespace(**{**vars(text), "load_tokenizer": inside(text.load_tokenizer)}),
    weights=SimpleNamespace(
        **{name: getattr(weights, name) for name in dir(weights) if not name.startswith("_")}
        | {"load_model": inside(weights.load_model), "load_config": inside(weights.load_config)}
    ),
)
"""
    (tmp_path / "families" / "toy_family").mkdir(parents=True)
    for module in ("__init__", "names"):
        (tmp_path / "families" / "toy_family" / f"{module}.py").touch()
    (tmp_path / "families" / "toy_family" / "family.py").write_text(code)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path / "families")])
    shutil.copytree(resolve("shipped:tiny_base"), tmp_path / "model" / "inside")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "toy_family"}))
    return tmp_path / "model"


def test_a_model_is_asked_as_its_own_family_says(toy_family):
    assert find_family(toy_family).name == "toy_family"
    loaded = load_for_inference(toy_family, precision="float32")
    assert loaded.family.name == "toy_family" and loaded.tokenizer


def test_a_family_that_is_not_known_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        UserError, match=r"model_type is 'llama', which is no known family \(idefics, idefics2, idefics3\)"
    ):
        find_family(tmp_path)


def test_what_a_family_outside_the_tree_lacks_is_one_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "half"
    package.mkdir()
    with pytest.raises(UserError, match="half has no module 'names'; see "):
        names_of_family("half")
    (package / "names.py").write_text("GROUPS = {}\n")
    with pytest.raises(UserError, match=r"half\.names has no LORA_TARGETS, ENCODER_GROUPS"):
        names_of_family("half")
    (package / "family.py").write_text("FAMILY = 3\n")
    with pytest.raises(UserError, match=r"half\.family has no FAMILY"):
        get_family("half")
    (package / "family.py").write_text(
        "from dataclasses import replace\nfrom sft.models.idefics.family import FAMILY\n"
        "FAMILY = replace(FAMILY, name='half', text=object())\n"
    )
    monkeypatch.delitem(sys.modules, "half.family")
    with pytest.raises(UserError, match="Text of half has no load_tokenizer, "):
        get_family("half")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.groups.visoin.weight_decay=0"], "training.groups: idefics has no 'visoin'; did you mean 'vision'?"),
        (["model.trainable=[gate]"], "model.trainable: idefics has no 'gate'; did you mean 'gates'?"),
        (
            ["model.mode=qlora", "model.lora.targets=[head]"],
            "model.lora.targets: idefics has no 'head' (known: vision, ",
        ),
        (["model.family=idefic"], "model.family: unknown family 'idefic'; did you mean 'idefics'?"),
    ],
)
def test_a_name_that_the_family_has_not_is_refused(overrides, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        check_names(load_recipe(recipe_path("quickstart"), overrides))
