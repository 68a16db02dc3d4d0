"""Merging: the model that is handed on is the one that was trained, opens in plain transformers and says what it is."""

import errno
import json
import os
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, batch_of, conversation, make_tiny_model, place, status_of
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer, IdeficsForVisionText2Text

from sft.core.errors import UserError
from sft.inference.merge import compare, merge, write_safetensors
from sft.models import lora
from sft.models.chat_template import load_chat_template
from sft.models.idefics.images import IdeficsImages, normalise
from sft.models.idefics.weights import weights
from sft.models.loaded_model import load_for_inference
from sft.recipe import LoraSettings
from sft.selection.record import write_selection
from sft.selection.recorded_loss import choose_by_recorded_loss

RECIPE = {
    "model": {"path": "HuggingFaceM4/idefics-9b", "mode": "qlora"},
    "data": {
        "store": "/home/somebody/stores",
        "mixture": [
            {"name": "shapes", "share": 75, "datasets": [{"dataset": "easy_vqa", "path": "/home/somebody/vqa"}]},
            {"name": "talk", "share": 25, "datasets": [{"dataset": "ultrachat", "path": "/home/somebody/chat"}]},
        ],
    },
    "training": {"max_steps": 4, "tokens_per_step": 2048, "learning_rate": 1e-3},
    "output_dir": "/home/somebody/run",
}


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory) -> Path:
    """A base model on disk."""
    folder = tmp_path_factory.mktemp("base")
    weights.save_model(make_tiny_model(tokenizer), folder, torch.float32)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(base, tmp_path) -> Path:
    """A run whose second checkpoint was selected: adapters, extra rows, gates and resampler, all moved."""
    folder = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    model = weights.load_model(base)
    settings = LoraSettings(r=4, alpha=12, targets=["language", "cross_attention.mlp", "vision.attention"])
    lora.add_adapters(model, weights.lora_pattern(settings.targets), settings, base)
    weights.select_trainable(model, ["extra_rows", "gates", "resampler"])
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    lora.save_adapters(model, folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    lines = [{"step": step, "sources": {"shapes": {"tokens": 70}, "talk": {"tokens": 30}}} for step in (1, 2, 3)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    score = {"step": 1, "score": 0.5, "standard_error": 0.02, "p_best": 0.75}
    scores = [score | {"checkpoint": name} for name in ("checkpoint-1", "checkpoint-2")]
    selection = {"by": "mmbench", "benchmark": "easy_vqa", "rule": "best", "selected": "checkpoint-2", "scores": scores}
    (tmp_path / "run" / "selection.json").write_text(json.dumps(selection | {"cross_fitted": 0.48}))
    return folder


# ---------------------------------------------------------------------------------------------------------- weights


def test_merged_weights_are_those_of_peft(base, checkpoint, tmp_path):
    made = merge(checkpoint, tmp_path / "merged", dtype=torch.float32, shard_bytes=100_000)
    assert len(list((tmp_path / "merged").glob("model-*-of-*.safetensors"))) > 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(IdeficsForVisionText2Text.from_pretrained(base), checkpoint)
    expected = peft.merge_and_unload().state_dict()
    found = IdeficsForVisionText2Text.from_pretrained(tmp_path / "merged").state_dict()
    before = load_file(base / "model.safetensors")
    assert found.keys() == expected.keys() == before.keys()
    assert all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-6) for name in expected)
    changed = {weights.group_of(name) for name in found if not torch.equal(found[name], before[name])}
    assert changed == {"language", "cross_attention", "vision", "extra_rows", "gates", "resampler"}
    assert (made.dtype, made.parameters) == ("float32", sum(tensor.numel() for tensor in expected.values()))


def test_the_sum_is_rounded_once(checkpoint, tmp_path):
    merge(checkpoint, tmp_path / "exact", dtype=torch.float32)
    made = merge(checkpoint, tmp_path / "rounded")
    exact, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "rounded"))
    assert all(torch.equal(rounded[name], exact[name].to(torch.bfloat16)) for name in exact)
    config = json.loads((tmp_path / "rounded" / "config.json").read_text())
    assert (made.dtype, config["dtype"], config["architectures"]) == (
        "bfloat16", "bfloat16", ["IdeficsForVisionText2Text"],
    )  # fmt: skip


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    alive: list[int] = []
    made = [torch.full((4, n + 1), n / 3) for n in range(5)]

    def weights():
        living = []
        for tensor in made:
            fresh = tensor.clone()
            living.append(weakref.ref(fresh))
            alive.append(sum(ref() is not None for ref in living))
            yield fresh
            del fresh

    shapes = {f"layer.{n}": tensor.shape for n, tensor in enumerate(made)}
    write_safetensors(tmp_path / "weights", shapes, torch.bfloat16, weights())
    assert max(alive) <= 2, "the one that was written last may still have a name"
    found = load_file(tmp_path / "weights")
    assert list(found) == list(shapes)
    assert all(torch.equal(found[f"layer.{n}"], tensor.to(torch.bfloat16)) for n, tensor in enumerate(made))


def test_the_check_tells_rounding_from_quantisation(checkpoint, tmp_path):
    merge(checkpoint, tmp_path / "merged", dtype=torch.float32)
    found = compare(checkpoint, tmp_path / "merged")
    exact, quantised = found["base + adapters"], found["4-bit base + adapters"]
    assert (exact.largest < 1e-3, exact.same_choice) == (True, 1.0)
    assert exact.largest * 100 < quantised.largest


# ------------------------------------------------------------------------------------------------------ what is there


def test_plain_transformers_opens_the_folder(checkpoint, template, tmp_path):
    merge(checkpoint, tmp_path / "merged", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    size = IdeficsImages(weights.load_config(tmp_path / "merged")).one_tile.width
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    values = processor.image_processor(Image.fromarray(pixels), return_tensors="pt").reshape(3, size, size)
    ours = normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
    assert (values - ours).abs().max() < 1e-5
    for tokenizer in (processor.tokenizer, AutoTokenizer.from_pretrained(tmp_path / "merged")):
        text = "User: Is it a blue circle?"
        assert (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            == (template.tokenizer(text, add_special_tokens=False)["input_ids"])
        )
        assert tokenizer.chat_template == load_chat_template(REPOSITORY / "chat_templates" / "idefics.jinja")
    batch = batch_of([place(template, conversation(("<dog>", "What is it?"), "A dog."))])
    with torch.no_grad():
        merged, trained = (load_for_inference(p, precision="float32") for p in (tmp_path / "merged", checkpoint))
        assert (merged.model(batch=batch).logits_PV - trained.model(batch=batch).logits_PV).abs().max() < 1e-4


def test_the_card_says_what_the_model_is_and_nothing_of_this_machine(checkpoint, tmp_path):
    merge(checkpoint, tmp_path / "my-idefics")
    card = (tmp_path / "my-idefics" / "README.md").read_text()
    assert "base_model: HuggingFaceM4/idefics-9b\n" in card
    assert "# my-idefics\n" in card
    assert "| shapes | 75.0% | 140 (70.0%) | easy_vqa | MIT |" in card
    assert "| talk | 25.0% | 60 (30.0%) | ultrachat | " in card
    assert "`checkpoint-2`, chosen among 2 checkpoints by easy_vqa, rule `best`" in card
    assert "Score 50.0% ± 2.0%" in card and "Cross-fitted figure of the choice: 48.0%" in card
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])["training"]["learning_rate"] == 1e-3
    assert "somebody" not in card
    assert str(tmp_path) not in card
    assert not {"recipe.yaml", "adapter_config.json"} & {file.name for file in (tmp_path / "my-idefics").iterdir()}


def test_the_card_of_a_choice_by_the_loss_that_training_wrote_down_says_no_more_than_that(checkpoint, tmp_path):
    write_selection(choose_by_recorded_loss({1: 2.5, 2: 1.5}), checkpoint.parents[1], use=True)
    merge(checkpoint, tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "Held-out loss 1.5000." in card and "Score" not in card and "Cross-fitted" not in card


def test_a_full_checkpoint_is_copied_without_its_training_state(tokenizer, tmp_path):
    folder = tmp_path / "checkpoint-7"
    weights.save_model(make_tiny_model(tokenizer), folder, torch.bfloat16)
    tokenizer.save_pretrained(folder)
    (folder / "manifest.json").write_text("{}")
    (folder / "state").mkdir()
    (folder / "state" / "optimizer.pt").write_text("large")
    made = merge(folder, tmp_path / "copy")
    assert (made.base, made.dtype) == (None, "bfloat16")
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    names = {file.name for file in (tmp_path / "copy").iterdir()}
    assert {"README.md", "processor_config.json", "chat_template.jinja", "config.json"} <= names
    assert not {"state", "manifest.json"} & names
    assert compare(folder, tmp_path / "copy")["checkpoint"].largest == 0
    with pytest.raises(UserError, match="holds no adapters; its weights are copied as they are"):
        merge(folder, tmp_path / "other", dtype=torch.float32)


# ------------------------------------------------------------------------------------------------------------ mistakes


def test_adapters_of_another_model_leave_nothing_behind(checkpoint, tokenizer, tmp_path):
    other = tmp_path / "other"
    model = make_tiny_model(tokenizer)
    model.model.layers = model.model.layers[:2]
    model.model.gated_cross_attn_layers = model.model.gated_cross_attn_layers[:1]
    model.config.num_hidden_layers = 2
    weights.save_model(model, other, torch.float32)
    tokenizer.save_pretrained(other)
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    (checkpoint / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(other)}))
    with pytest.raises(UserError, match=r"the base model has no model\.gated_cross_attn_layers\.1\."):
        merge(checkpoint, tmp_path / "merged")
    assert not [*tmp_path.glob("*merged*")]


def test_a_full_disk_is_told_and_nothing_is_left(checkpoint, tmp_path, monkeypatch, capsys):
    def write(file, *others):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write does: without a name

    monkeypatch.setattr("sft.inference.merge.write_safetensors", write)
    assert status_of("merge", checkpoint, "--output", tmp_path / "merged") == 1
    said = capsys.readouterr().err.splitlines()
    assert said == [f"idefics-sft: {tmp_path / 'merged'}: the disk is full; choose another --output"]
    assert not [*tmp_path.glob("*merged*")]


def test_the_command_line(checkpoint, tmp_path, capsys, refusal):
    output = tmp_path / "merged"
    refused = refusal("merge", checkpoint, "--output", output, "--base-dtype", "fp16")
    assert "'fp16' is not one of 'bf16', 'fp32'" in refused
    assert "a hub model has nothing to merge" in refusal("merge", "owner/name", "--output", output)
    assert status_of("merge", checkpoint, "--output", output, "--check", "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    made = json.loads(line)
    assert made["output"] == str(output)
    assert made["check"]["base + adapters"]["same_choice"] > 0.9
    assert "is there already; choose another --output" in refusal("merge", checkpoint, "--output", output)
    ends = json.loads((output / "generation_config.json").read_text())["eos_token_id"]
    (output / "generation_config.json").unlink()
    assert status_of("merge", checkpoint, "--output", output, "--overwrite") == 0
    assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == ends == [2, 402]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").touch()
    for kept, why in (
        (tmp_path / "photos", "holds no model, so --overwrite leaves it alone; choose"),
        (checkpoint, "is or holds the model that is merged; choose another"),
        (checkpoint.parent, "is or holds the model that is merged; choose another"),
    ):
        assert f"{kept}: {why}" in refusal("merge", checkpoint, "--output", kept, "--overwrite")
