"""Planning: exact numbers of parameters, the formula and the real model, advice that holds, published figures."""

import json
import math
import re
import shlex
from dataclasses import replace
from typing import Any

import pytest
import torch
import typer
from conftest import REPOSITORY, status_of, tiny_config
from fake_step import run_fake_step
from helpers.training import write_recipe
from hypothesis import given
from hypothesis import strategies as st
from transformers import IdeficsConfig, IdeficsForVisionText2Text

from sft.cli.main import app
from sft.core.errors import UserError
from sft.cost.devices import DEVICES, GIB, find_device
from sft.cost.estimate import estimate
from sft.cost.family import Setting
from sft.cost.idefics.cost import RELEASED, IdeficsCost, read_model
from sft.cost.idefics.shapes import LAYER_GROUPS, shape_of
from sft.cost.memory import FOUR_BIT_BYTES
from sft.models.activation_checkpointing import is_recomputed
from sft.models.idefics.names import GROUPS
from sft.models.idefics.packed import PackedIdefics
from sft.models.idefics.weights import weights
from sft.models.lora import add_adapters
from sft.recipe import ENGINES, OPTIMIZERS, LoraSettings, TrainingConfig, load_recipe
from sft.training.optimizer import make_optimizer, parameter_groups

SMALL = Setting(tokens=256, images=2, trained_tokens=255)
CARD = REPOSITORY / "recipes" / "idefics-9b-instruct.yaml"


NOTEBOOK = Setting(
    tokens=256, images=2, trained_tokens=256, mode="qlora", lora_dropout=0.05, precision="float16",
    optimizer="paged_adamw_8bit", lora_layers=tuple(
        f"{group}.{name}" for group in LAYER_GROUPS for name in ("q_proj", "k_proj", "v_proj")
    ),
)  # fmt: skip


def released(size):
    return read_model(f"HuggingFaceM4/idefics-{size}")


def middling_config():
    """Return a config of a model so large that what the formula leaves out, a few numbers a token, is little."""
    config = tiny_config(2000).to_dict()
    config |= {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4}
    config["vision_config"] |= {"embed_dim": 128, "intermediate_size": 512, "image_size": 112}
    return config


# ------------------------------------------------------------------------------------------------------ parameters


def test_parameters_of_the_released_models_to_the_digit():
    assert replace(released("9b").shape, extra_rows=2).parameters == 8_929_679_632
    assert released("9b").parameters == released("9b-instruct").parameters == 8_929_687_824
    assert replace(released("80b").shape, extra_rows=2).parameters == 79_967_843_624
    assert released("80b").parameters == 79_967_860_008


@pytest.mark.parametrize("changes", [{}, {"use_resampler": False}, {"alpha_type": "vector", "qk_layer_norms": False}])
def test_parameters_are_those_of_the_model(changes):
    config = tiny_config(400).to_dict() | changes
    with torch.device("meta"):
        model = IdeficsForVisionText2Text(IdeficsConfig.from_dict(config))
    assert shape_of(config).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_adapters_of_the_official_notebook_have_the_size_that_it_prints():
    extra_rows = 2 * 3 * 4096  # of embedding and head, which the notebook does not train
    assert released("9b").trained_parameters(replace(NOTEBOOK, mode="lora")) == 19_750_912 + extra_rows


def test_nf4_with_double_quantisation_takes_4_127_bits():
    assert round(8 * FOUR_BIT_BYTES, 3) == 4.127


# --------------------------------------------------------------------------------------- the formula and the oracle


LAYERS = IdeficsCost(shape_of(middling_config())).lora_layers
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "8-bit states": {"optimizer": "adamw_8bit"},
    "factored states": {"optimizer": "adafactor"},
    "not the language model": {"trainable": ("cross_attention", "gates", "resampler", "vision")},
    "lora": {"mode": "lora", "lora_layers": LAYERS(("language", "cross_attention"))},
    "lora everywhere": {"mode": "lora", "lora_layers": LAYERS(LAYER_GROUPS)},
    "qlora": {"mode": "qlora", "lora_layers": LAYERS(("language", "cross_attention"))},
    "qlora, feature cache": {"mode": "qlora", "lora_layers": LAYERS(("language", "cross_attention")), "encoded": True},
    "qlora and gates": {
        "mode": "qlora",
        "trainable": ("gates", "resampler", "extra_rows"),
        "lora_layers": LAYERS(["language.mlp"]),
    },
}


@pytest.mark.parametrize(
    ("way", "checkpointing"),
    [(way, 0.0) for way in WAYS]
    + [(way, 1.0) for way in ("full", "lora everywhere", "qlora and gates")]
    + [("full", 0.5), ("qlora and gates", 0.25)],
)
def test_the_formula_agrees_with_the_real_model_under_fake_tensors(way, checkpointing):
    setting = replace(SMALL, checkpointing=checkpointing, **WAYS[way])
    config = middling_config()
    model = IdeficsCost(shape_of(config))
    measured, quick = run_fake_step(IdeficsConfig.from_dict(config), setting), model.cost(setting)
    assert measured.trainable_parameters == model.trained_parameters(setting)
    assert quick.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.10)
    assert quick.flop == pytest.approx(measured.flop, rel=0.02)


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_states_that_are_planned_are_those_of_the_real_optimizer(mode, optimizer):
    config = middling_config()
    model = PackedIdefics(IdeficsConfig.from_dict(config))
    if mode == "lora":
        add_adapters(model, weights.lora_pattern(["language"]), LoraSettings(r=16, targets=["language"]), "base")
    weights.select_trainable(model, GROUPS if mode == "full" else ["extra_rows"])
    training = TrainingConfig(max_steps=1, tokens_per_step=1, learning_rate=1e-3, optimizer=optimizer)
    made = make_optimizer(parameter_groups(model, training, weights), training, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    made.step()
    states = [tensor for own in made.state.values() for tensor in own.values() if torch.is_tensor(tensor)]
    real = sum({tensor.data_ptr(): tensor.nbytes for tensor in states if tensor.ndim}.values())
    setting = replace(SMALL, mode=mode, optimizer=optimizer, lora_layers=LAYERS(["language"]))
    planned_bytes = IdeficsCost(shape_of(config)).cost(setting).bytes["optimizer"]
    if OPTIMIZERS[optimizer].is_paged:
        assert planned_bytes == 0, "they lie in main memory when the GPU is full"
    else:
        assert planned_bytes == pytest.approx(real, rel=0.05 if OPTIMIZERS[optimizer].needs_bitsandbytes else 0.001)


settings = st.builds(
    Setting,
    tokens=st.integers(1, 8192),
    images=st.integers(0, 64),
    trained_tokens=st.just(1),
    mode=st.sampled_from(["full", "lora", "qlora"]),
    optimizer=st.sampled_from([*OPTIMIZERS]),
    engine=st.sampled_from([*ENGINES]),
    gpus=st.sampled_from([1, 2, 64]),
    checkpointing=st.sampled_from([0.0, 0.3, 1.0]),
    accumulates=st.booleans(),
    precision=st.sampled_from(["bfloat16", "float32"]),
)


@given(settings)
def test_more_to_do_never_takes_less_and_less_precise_states_never_more(setting):
    model = released("9b")
    here = model.cost(setting)
    assert all(size >= 0 for size in here.bytes.values())
    for more in ({"tokens": setting.tokens + 64}, {"images": setting.images + 1}, {"trained_tokens": 999}):
        there = model.cost(replace(setting, **more))
        assert there.peak_bytes >= here.peak_bytes and there.flop > here.flop
    assert model.cost(replace(setting, optimizer="adamw")).peak_bytes >= here.peak_bytes
    assert model.cost(replace(setting, checkpointing=0.0)).flop <= here.flop


# ----------------------------------------------------------------------------------------------- published points


def test_the_official_notebook_fits_a_t4():
    """Batches of two captions with an image each, r = 16 on queries, keys and values, float16, no checkpointing."""
    assert released("9b").cost(NOTEBOOK).peak_bytes < DEVICES["t4-16"].usable_bytes


def test_80b_instruct_fits_384_a100_and_takes_about_the_three_days_of_its_card():
    overrides = ("model.path=HuggingFaceM4/idefics-80b", "training.tokens_per_step=614400")
    report = estimate(load_recipe(CARD, overrides), DEVICES["a100-80"], 384, 0.35, 1.0).report
    assert report["fits"]
    assert 2 < report["seconds"] / 86400 < 4
    assert report["cost"] == pytest.approx(report["seconds"] / 3600 * 384)


def test_a_qlora_recipe_is_planned_by_its_keys_and_checkpointing_brings_it_onto_a_t4():
    overrides = ["model.mode=qlora", "model.lora.r=8", "training.gradient_checkpointing=false"]
    planned = estimate(load_recipe(CARD, overrides), DEVICES["t4-16"], 1, 0.35, None)
    D, F, E = 4096, 11008, 1280
    a_layer = 8 * (4 * (D + D) + 3 * (D + F))
    looking = 8 * (2 * (D + D) + 2 * (E + D) + 3 * (D + F))
    assert planned.report["trainable_parameters"] == 32 * a_layer + 8 * looking + 2 * 3 * D
    assert planned.setting.precision == "float16" and not planned.report["fits"]
    assert planned.report["advice"][0].startswith("training.gradient_checkpointing=true: ")
    assert not any("--gpus" in line for line in planned.report["advice"])


def test_targets_trainable_groups_and_the_optimizer_of_a_recipe_count():
    def report(*overrides):
        return estimate(load_recipe(CARD, ["model.mode=lora", *overrides]), DEVICES["a100-80"], 1, 0.35, None).report

    text = report("model.lora.targets=[language.attention]")
    assert text["trainable_parameters"] == 32 * 16 * 4 * (4096 + 4096) + 2 * 3 * 4096
    gated = report("model.lora.targets=[language.attention]", "model.trainable=[gates, resampler]")
    resampler = released("9b").shape.group_parameters("resampler")
    assert gated["trainable_parameters"] == text["trainable_parameters"] + resampler + 8 * 2
    by_target = ("attention", "mlp")
    assert report()["trainable_parameters"] == sum(
        report(f"model.lora.targets=[{group}.{target}]")["trainable_parameters"]
        for group in ("language", "cross_attention")
        for target in by_target
    ) - 3 * (2 * 3 * 4096)
    assert report("training.optimizer=adamw_8bit")["bytes"]["optimizer"] < text["bytes"]["optimizer"]


# --------------------------------------------------------------------------------------------------- the command


def planned(capsys, *arguments):
    assert status_of("plan", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_the_report_has_the_keys_of_the_contract_and_its_parts_add_up(capsys):
    report = planned(capsys, "quickstart", "--gpu", "t4-16")
    assert list(report) == (
        ["fits", "parameters", "trainable_parameters", "peak_bytes", "bytes", "steps", "epochs", "seconds", "gpus",
         "cost", "idle", "feature_cache", "checkpointing", "advice"]
    )  # fmt: skip
    assert report["fits"] and report["advice"] == [] and report["cost"] is None
    assert sum(report["bytes"].values()) == report["peak_bytes"] < GIB
    assert planned(capsys, "quickstart", "--gpu-memory", "24")["seconds"] is None


@given(number=st.integers(0, 100), share=st.floats(0, 1, exclude_max=True))
def test_a_share_of_layers_is_spread_evenly_and_begins_at_the_first(number, share):
    again = is_recomputed(number, share)
    assert sum(again) == math.floor(number * share)
    assert not again or not again[-1]
    for end in range(number + 1):
        assert abs(sum(again[end:]) - (number - end) * share) < 1
    assert is_recomputed(4, 0.5) == [True, False, True, False] and is_recomputed(3, 1.0) == [True] * 3


def test_a_share_of_layers_takes_memory_and_work_between_all_and_none(capsys):
    rows = planned(capsys, CARD, "training.gradient_checkpointing=0.6", "data.augment=none")["checkpointing"]
    assert [row["share"] for row in rows] == [0, 0.25, 0.5, 0.6, 0.75, 1]
    peaks, work = ([row[key] for row in rows] for key in ("peak_bytes", "work"))
    assert peaks == sorted(peaks, reverse=True) and work == sorted(work) and work[0] == 1
    assert [row["fits"] for row in rows] == [peak <= DEVICES["a100-80"].usable_bytes for peak in peaks]


def test_the_feature_cache_is_told_where_a_recipe_can_have_one(capsys, tmp_path):
    recipe = write_recipe(tmp_path)
    assert planned(capsys, recipe)["feature_cache"] is None, "everything is trained"
    adapters = (recipe, "model.mode=qlora", "model.path=HuggingFaceM4/idefics-9b")
    told = planned(capsys, *adapters)["feature_cache"]
    assert told | {"saves": 0} == {"on": False, "bytes_per_image": 163_840, "images": None, "bytes": None, "saves": 0}
    assert status_of("prepare", recipe) == 0 and capsys.readouterr()
    with_it = planned(capsys, *adapters, "data.feature_cache=on")
    assert (with_it["feature_cache"]["images"], with_it["feature_cache"]["bytes"]) == (5, 5 * 163_840)
    saved = 1 - with_it["seconds"] / planned(capsys, *adapters)["seconds"]
    assert saved == pytest.approx(with_it["feature_cache"]["saves"]) and saved > 0.3


@pytest.mark.parametrize("gpu", ["a100-80", "l4-24"])
def test_every_advice_makes_it_fit(capsys, gpu):
    advice = planned(capsys, CARD, "--gpu", gpu)["advice"]
    assert advice
    for line in advice:
        changes, _, gib = line.rpartition(": ")
        words = re.sub(r" \(\w+\)", "", changes).split()
        report = planned(capsys, CARD, *([] if "--gpu " in changes else ["--gpu", gpu]), *words)
        assert report["fits"] and f"{report['peak_bytes'] / GIB:.1f} GiB" == gib


def test_a_person_sees_parts_peak_time_and_advice(capsys):
    assert status_of("plan", CARD) == 0
    printed = capsys.readouterr().out
    assert "8,929,687,824 parameters" in printed
    assert "does not fit" in printed and "--gpus 2 (zero3)" in printed
    assert "GPU hours" in printed
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("t4-16", "T4"),
        ("T4", "T4"),
        ("RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("l4", "L4"),
        ("A100-40", "A100 40"),
    ],
)
def test_a_gpu_is_found_by_the_name_that_people_use(name, found):
    assert find_device(name).name.startswith(f"{found} ")


@pytest.mark.parametrize(
    ("name", "message"),
    [("a100", "expected one of a100-40, a100-80;"), ("k80", "expected one of t4-16, .*--gpu-memory GIB")],
)
def test_a_gpu_that_is_unknown_or_ambiguous_is_refused_with_names(name, message):
    with pytest.raises(UserError, match=message):
        find_device(name)


def test_gpus_that_have_nothing_to_do_are_counted_and_the_sizes_of_a_step_that_avoid_it_named(capsys):
    assert status_of("plan", CARD, "--gpus", 32) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "21.9 % of it idle: a step has 100 packs for 128 slots" in printed
    for tokens in (196_608, 262_144):
        idle = planned(capsys, CARD, "--gpus", 32, f"training.tokens_per_step={tokens}")["idle"]
        assert str(tokens) in printed and idle == 0


def test_a_plan_for_no_named_gpu_says_which_it_took(capsys):
    assert status_of("plan", "quickstart", "training.max_steps=1", "training.warmup_steps=0") == 0
    printed = capsys.readouterr().out
    assert "under 0.1 seconds, under 0.1 GPU hours" in printed
    assert "Planned for A100 80 GB, not for this machine" in printed


def test_commands_of_the_page_have_the_options_that_are_named():
    page = (REPOSITORY / "docs" / "planning.md").read_text(encoding="utf-8")
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^ *idefics-sft (.*)", page, re.MULTILINE)]
    assert len(commands) == 5
    for name, *arguments in commands:
        typer.main.get_command(app).commands[name].make_context(name, arguments)


def test_what_cannot_be_planned_is_said_in_one_line(refusal, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    printed = refusal("plan", CARD, "model.path=acme/idefics-7b")
    assert "acme/idefics-7b" in printed and "give a folder" in printed and all(name in printed for name in RELEASED)
    assert "not a hub id" in refusal("plan", CARD, "model.path=no/such/folder")
    assert "no config.json" in refusal("plan", CARD, f"model.path={tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "model_type is 'llama'" in refusal("plan", CARD, f"model.path={tmp_path}")
    assert "give one of them" in refusal("plan", CARD, "--gpu", "l4-24", "--gpu-memory", "20")
    assert "has no bfloat16" in refusal("plan", CARD, "--gpu", "t4-16", "training.precision=bfloat16")
    for option in ("--gpu-memory", "--price-per-hour"):
        assert "less than or equal to 1000000" in refusal("plan", CARD, option, "inf")


def test_nothing_is_planned_or_advised_that_training_refuses(refusal, capsys):
    assert "zero3 shards the states of adamw" in refusal("plan", CARD, "--gpus", 2, "training.optimizer=adamw_8bit")
    assert "zero3 shards the states of adamw, not of adafactor" in refusal(
        "plan", CARD, "--gpus", 2, "training.optimizer=adafactor"
    )
    assert "cannot shard weights in 4 bits" in refusal(
        "plan", CARD, "--gpus", 2, "model.mode=qlora", "distributed.engine=fsdp2"
    )
    assert "zero3 does not train in float16" in refusal("plan", CARD, "--gpus", 8, "--gpu", "t4-16")
    assert status_of("plan", CARD, "--gpus", 8, "--gpu", "l4-24", "--json") == 0
    advice = json.loads(capsys.readouterr().out)["advice"]
    assert advice and not any("training.optimizer" in line for line in advice)  # ZeRO-3 has none
