"""A model family is found by its name, and nothing outside of it knows one."""

import ast
import json
import shutil
from pathlib import Path

import pytest

import sft
from sft import models
from sft.core.errors import UserError
from sft.core.shipped import resolve
from sft.evaluation.run_tasks import ScoredModel
from sft.models.open_model import find_family, load_for_inference

KNOW_IDEFICS = {"cost", "models/idefics", "recipe/config.py"}
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
    code = "from sft.models.idefics import *\nfrom sft.models import idefics\n\n"
    code += "def load_model(path, **options):\n    return idefics.load_model(path / 'inside', **options)\n\n"
    code += "def load_tokenizer(path):\n    return idefics.load_tokenizer(path / 'inside')\n"
    (tmp_path / "families" / "toy_family").mkdir(parents=True)
    (tmp_path / "families" / "toy_family" / "__init__.py").write_text(code)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path / "families")])
    shutil.copytree(resolve("shipped:tiny_base"), tmp_path / "model" / "inside")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "toy_family"}))
    return tmp_path / "model"


def test_a_model_is_asked_as_its_own_family_says(toy_family):
    assert find_family(toy_family).__name__ == "sft.models.toy_family"
    loaded = load_for_inference(toy_family, precision="float32")
    assert loaded.family.__name__ == "sft.models.toy_family" and loaded.tokenizer
    assert ScoredModel(toy_family).loaded.family is loaded.family


def test_a_family_that_is_not_known_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"model_type is 'llama', which is no known family \(idefics\)"):
        find_family(tmp_path)
