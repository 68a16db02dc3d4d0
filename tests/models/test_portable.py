"""Adapters on another machine, and those of strangers here."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY, status_of
from safetensors.torch import load_file, save_file

from sft.core.errors import UserError
from sft.evaluation.tasks.mmbench.benchmark import benchmark_file
from sft.models.loaded_model import find_base, load_for_inference
from sft.models.lora import WEIGHTS

RECIPE = {
    "model": {"path": "shipped:tiny_base", "mode": "lora", "trainable": ["gates"], "lora": {"r": 2}},
    "data": {"sequence_length": 64, "mixture": [{"name": "own", "share": 1, "datasets": [{"dataset": "messages"}]}]},
    "training": {"max_steps": 1, "tokens_per_step": 64, "learning_rate": 0.01, "precision": "float32"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of adapters over a base of two extra rows, which has no `<end_of_utterance>`."""
    root = tmp_path_factory.mktemp("adapters")
    turns = [{"role": "user", "content": "A colour?"}, {"role": "assistant", "content": "Red."}]
    (root / "data").mkdir()
    (root / "data" / "train.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 8)
    data = RECIPE["data"] | {"store": str(root / "stores")}
    data["mixture"][0]["datasets"][0]["path"] = str(root / "data")
    recipe = RECIPE | {"data": data, "output_dir": str(root / "run")}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert status_of("train", str(root / "recipe.yaml")) == 0
    return root / "run"


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return shutil.copytree(run / "checkpoints" / "checkpoint-1", tmp_path / "copied")


ELSEWHERE = """
import sys
sys.modules["sft"] = None  # as where it is not installed
import torch
{snippet}
V = model.config.vocab_size
ids = torch.tensor([[1, V, V + 1, V, 40, 50, V + 2, 60, 2]])
pixels = torch.rand(1, 1, 3, *[model.config.vision_config.image_size] * 2, generator=torch.Generator().manual_seed(0))
looks = torch.ones(1, ids.shape[1], 1, dtype=torch.long)
asked = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, image_attention_mask=looks)
with torch.no_grad():
    logits = model.eval()(**asked).logits
{moved}
with torch.no_grad():
    assert torch.equal(model.eval()(**asked).logits, logits)
tokenizer = processor.tokenizer
torch.save((ids, pixels, looks, logits, tokenizer.convert_tokens_to_ids("<end_of_utterance>"), tokenizer.eos_token,
            tokenizer.padding_side), "logits.pt")
"""


def test_adapters_open_elsewhere_over_the_published_base_by_the_lines_of_their_readme(copy, tmp_path):
    """Nothing is there but the folder and the base as it was published."""
    expected = load_for_inference(copy, precision="float32").model
    (copy / "recipe.yaml").unlink()
    config = json.loads((copy / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(REPOSITORY / "tiny_base")
    snippet, moved = re.findall(r"```python\n(.*?)```", (copy / "README.md").read_text(), re.DOTALL)
    moved = moved.replace('"BASE"', repr(shutil.copytree(REPOSITORY / "tiny_base", tmp_path / "elsewhere").as_posix()))
    subprocess.run(
        [sys.executable, "-c", ELSEWHERE.format(snippet=snippet, moved=moved)],
        cwd=copy,
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    ids, pixels, looks, logits, end, eos, side = torch.load(copy / "logits.pt")
    expected.config._attn_implementation = expected.config.vision_config._attn_implementation = "sdpa"
    with torch.no_grad():
        ours = expected(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, image_attention_mask=looks
        ).logits
    assert (ours - logits).abs().max() < 1e-5
    assert (end, eos, side) == (expected.config.vocab_size + 2, "</s>", "left")


def test_opening_adapters_of_a_stranger_writes_nothing_where_their_recipe_points(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("IDEFICS_SFT_CACHE", str(tmp_path / "cache"))
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    recipe["data"]["store"] = str(tmp_path / "chosen by a stranger")
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (copy / "adapter_config.json").write_text(
        json.dumps(
            json.loads((copy / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/nowhere/base"}
        )
    )
    assert find_base(copy).parent == tmp_path / "cache" / "bases"
    assert status_of("merge", str(copy), "--output", str(tmp_path / "merged")) == 0
    assert benchmark_file("easy_vqa", tmp_path / "chosen by a stranger", seed=0).is_relative_to(tmp_path / "cache")
    assert not (tmp_path / "chosen by a stranger").exists()
    monkeypatch.setenv("IDEFICS_SFT_CACHE", "/proc/nowhere")
    with pytest.raises(UserError, match=r"copied: its base model shipped:.*: /proc/nowhere: .* in IDEFICS_SFT_CACHE"):
        find_base(copy)


def test_training_goes_on_from_adapters(run, tmp_path, monkeypatch, refusal):
    monkeypatch.chdir(tmp_path)
    first, recipe = run / "checkpoints" / "checkpoint-1", str(run.parent / "recipe.yaml")
    on = [recipe, f"model.path={first}", "output_dir=further"]
    assert status_of("train", *on, "training.learning_rate=1e-30", "training.weight_decay=0") == 0
    before, after = (load_file(f / WEIGHTS) for f in (first, tmp_path / "further" / "checkpoints" / "checkpoint-1"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "further" / "checkpoints" / "checkpoint-1" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(REPOSITORY / "tiny_base")
    validated = "import sys; from sft.cli.main import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", validated, "validate", *on]
    assert subprocess.run(command, check=True, capture_output=True).stderr == b"", "quick and quiet"
    refused = {
        "model.lora.r=4": "model.lora.r: 4, the adapters of .* have 2",
        "model.lora.alpha=8": "model.lora.alpha: 8, the adapters of .* have 32",
        "model.lora.targets=[language]": "model.lora.targets: the adapters of .* have model.gated_cross_attn_layers.0",
        "model.trainable=[]": "model.trainable: the adapters of .* hold weights of gates; add these",
        "model.mode=full": "model.mode is full; .*: idefics-sft merge ",
    }
    for change, message in refused.items():
        extra = ["model.lora=null", "model.trainable=null"] if change == "model.mode=full" else []
        assert re.search(message, refusal("train", *on, "output_dir=refused", change, *extra)), change


def test_adapters_of_another_kind_of_model_are_refused(run, copy, tmp_path, refusal):
    tensors = load_file(copy / WEIGHTS)
    save_file(tensors | {"base_model.model.strange": torch.zeros(1)}, copy / WEIGHTS)
    given = (f"model.path={copy}", f"output_dir={tmp_path / 'refused'}")
    assert "its base model has no strange" in refusal("train", run.parent / "recipe.yaml", *given)
