"""Adapters and 4-bit weights: what they hit, what is trained beside them, what is written and read back."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from conftest import batch_of, conversation, document, make_tiny_model, place
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import IdeficsForVisionText2Text

from sft.core.errors import UserError
from sft.models import loaded_model, lora
from sft.models.idefics.images import normalise
from sft.models.idefics.names import LORA_TARGETS
from sft.models.idefics.packed import PackedIdefics
from sft.models.idefics.weights import EXTRA_EMBEDDING, EXTRA_HEAD, weights
from sft.models.loss import trained_positions
from sft.recipe import LoraSettings, ModelConfig

TARGETS = tuple(LORA_TARGETS)
SAMPLES = (conversation(("<dog>", "What is it?"), "A dog."), document("A fox.", "<fox>", "The quick brown fox."))


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory) -> Path:
    """A base model on disk."""
    folder = tmp_path_factory.mktemp("base")
    weights.save_model(make_tiny_model(tokenizer), folder, torch.float32)
    tokenizer.save_pretrained(folder)
    return folder


def with_adapters(base: Path, trainable=("extra_rows",), quantised=False, **settings) -> PackedIdefics:
    """The base with fresh adapters, ready to be trained."""
    torch.manual_seed(0)
    given = LoraSettings(**{"r": 4, "targets": ["language"]} | settings)
    model = weights.load_model(base, trained=trainable, quantised=quantised)
    lora.add_adapters(model, weights.lora_pattern(given.targets), given, base)
    weights.select_trainable(model, trainable)
    return model.train()


def hit(model: nn.Module) -> set[str]:
    """Layers that have an adapter."""
    return {name.partition(".lora_A.")[0] for name, _ in lora.adapter_parameters(model) if ".lora_A." in name}


def move(model: nn.Module) -> None:
    """Change whatever is trainable."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def logits(model: nn.Module, batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batch=batch).logits_PV


# ----------------------------------------------------------------------------------------------------- what they hit


def test_targets_hit_the_layers_they_name_and_no_others(base):
    layers = {name for name, module in weights.load_model(base).named_modules() if isinstance(module, nn.Linear)}
    hits = {target: {n for n in layers if re.fullmatch(weights.lora_pattern([target]), n)} for target in TARGETS}
    for target, found in hits.items():
        group, _, part = target.partition(".")
        assert found, target
        assert {weights.group_of(f"{name}.weight") for name in found} == {group}
        if part:
            of_attention = [bool(re.search(r"self_attn|cross_attn\.|blocks\.\d+\.0\.", name)) for name in found]
            assert set(of_attention) == {part == "attention"}
        else:
            assert found == hits[f"{target}.attention"] | hits[f"{target}.mlp"]
    every = set().union(*hits.values())
    assert layers - every == {"lm_head", "lm_head.additional_fc"}, "adapters know nothing of the head's extra rows"
    assert (len(hits["language"]), len(hits["cross_attention.attention"])) == (4 * 7, 2 * 4)


def test_adapters_stand_where_the_pattern_says_and_change_nothing_yet(base, template):
    batch = batch_of([place(template, SAMPLES[0])])
    model = with_adapters(base, targets=["vision.mlp", "cross_attention.attention"])
    assert len(hit(model)) == 2 * 2 + 2 * 4
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {EXTRA_EMBEDDING, EXTRA_HEAD}
    assert {weights.group_of(name) for name in trained} == {"vision", "cross_attention", "extra_rows"}
    assert torch.equal(logits(model, batch), logits(weights.load_model(base), batch))


def test_layers_that_the_model_has_not_are_refused(base):
    model = weights.load_model(base)
    with pytest.raises(UserError, match=r"model\.lora\.targets: this model has no layers of resampler"):
        lora.add_adapters(model, "model.no_such_layer", LoraSettings(targets=["resampler"]), base)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_everything_that_is_trained_gets_a_gradient(base, template, checkpointing):
    """Reentrant checkpointing loses those of the vision tower."""
    model = with_adapters(base, ("extra_rows", "gates", "resampler"), targets=["vision", "language", "cross_attention"])
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model(batch=batch_of([place(template, sample) for sample in SAMPLES])).loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    assert all(parameter.grad.any() for name, parameter in trained.items() if ".lora_B." in name)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in trained)


# ---------------------------------------------------------------------------------------------------- what is written


def plain_logits(model, batch) -> torch.Tensor:
    """The same positions through transformers' own forward."""
    ids = batch.input_ids_T[None]
    output = model.eval()(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=normalise(batch.tiles[0])[None],
        image_attention_mask=(batch.image_ids_T >= 0).long()[None, :, None],
    )
    return output.logits[0, trained_positions(batch.labels_T)].detach()


def test_what_is_written_opens_here_in_peft_and_in_transformers(base, template, tmp_path):
    """Gates are parameters, which `modules_to_save` cannot hold; they are in the file all the same."""
    model = with_adapters(base, ("extra_rows", "gates", "resampler"))
    move(model)
    lora.save_adapters(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["inference_mode"], config["r"]) == (str(base), True, 4)
    batch = batch_of([place(template, SAMPLES[0])])
    expected = logits(model, batch)
    assert (expected - logits(weights.load_model(base), batch)).abs().max() > 0.1

    ours = weights.load_model(base)
    lora.load_adapters(ours, tmp_path)
    assert torch.equal(logits(ours, batch), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(IdeficsForVisionText2Text.from_pretrained(base), tmp_path)
        plain = IdeficsForVisionText2Text.from_pretrained(tmp_path)
    assert (plain_logits(peft, batch) - expected).abs().max() < 1e-5
    assert (plain_logits(plain, batch) - expected).abs().max() < 1e-5
    assert (plain_logits(peft.merge_and_unload(), batch) - expected).abs().max() < 1e-5


def test_adapters_of_another_model_are_refused(base, tokenizer, tmp_path):
    lora.save_adapters(with_adapters(base), tmp_path)
    (tmp_path / "grown").mkdir()
    weights.save_model(make_tiny_model(tokenizer, extra=4), tmp_path / "grown", torch.float32)
    with pytest.raises(
        UserError, match=r"lm_head.additional_fc.weight has shape \(3, 64\), the base model's has \(4, 64\)"
    ):
        lora.load_adapters(weights.load_model(tmp_path / "grown"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(UserError, match="has use_dora"):
        lora.load_adapters(weights.load_model(base), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json: damaged"):
        lora.load_adapters(weights.load_model(base), tmp_path)


# ------------------------------------------------------------------------------------------- one base, many adapters


def contents(model: nn.Module) -> dict[str, object]:
    """Every module with its kind, every parameter with its type and values."""
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    return kinds | {name: (p.dtype, p.float().numpy(force=True).tobytes()) for name, p in model.named_parameters()}


def test_adapters_swapped_on_one_base_are_those_of_a_fresh_load_and_leave_no_trace(base, template, tmp_path):
    """The first hold gates and the resampler in place of the base's; the second, of another rank, stand elsewhere."""
    kinds = ((("extra_rows", "gates", "resampler"), {}), (("extra_rows",), {"r": 8, "targets": ["vision.mlp"]}))
    batch = batch_of([place(template, SAMPLES[0])])
    for number, (trainable, settings) in enumerate(kinds):
        trained = with_adapters(base, trainable, **settings)
        move(trained)
        lora.save_adapters(trained, tmp_path / str(number))
    for precision in ("float32", "bfloat16"):
        dtype = getattr(torch, precision)
        model = weights.load_model(base, trained=(), frozen_dtype=dtype)
        before = contents(model)
        for number in (0, 1, 0):
            fresh = weights.load_model(base, trained=(), frozen_dtype=dtype)
            lora.load_adapters(fresh, tmp_path / str(number))
            replaced = lora.load_adapters(model, tmp_path / str(number))
            assert contents(model) == contents(fresh)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                assert torch.equal(logits(model, batch), logits(fresh, batch))
            lora.remove_adapters(model, replaced)
            assert contents(model) == before and not lora.has_adapters(model)


def test_adapters_that_do_not_fit_leave_the_base_as_it_was(base, tmp_path):
    lora.save_adapters(with_adapters(base), tmp_path)
    tensors = load_file(tmp_path / lora.WEIGHTS)
    last = max(tensors)
    tensors[last] = tensors[last][:1].clone()
    save_file(tensors, tmp_path / lora.WEIGHTS)
    model = weights.load_model(base)
    before = contents(model)
    with pytest.raises(UserError, match=r"has shape \(1, "):
        lora.load_adapters(model, tmp_path)
    assert contents(model) == before
    config = json.loads((tmp_path / lora.CONFIG).read_text())
    (tmp_path / lora.CONFIG).write_text(json.dumps(config | {"target_modules": "no_such_layer"}))
    with pytest.raises(UserError, match="was it trained on another model"):
        lora.load_adapters(model, tmp_path)
    assert contents(model) == before


def test_models_in_turn_share_a_base_and_are_those_loaded_alone(base, template, tmp_path, monkeypatch):
    loaded = []
    for number in range(2):
        trained = with_adapters(base)
        move(trained)
        for _, parameter in lora.adapter_parameters(trained):
            parameter.data.mul_(1 + number)
        lora.save_adapters(trained, tmp_path / str(number))
    order = [tmp_path / "0", tmp_path / "1", base, tmp_path / "1"]
    batch = batch_of([place(template, SAMPLES[0])])

    def asked(loaded: loaded_model.Loaded) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=loaded.autocast):
            return logits(loaded.model, batch)

    alone = [asked(loaded_model.load_for_inference(path)) for path in order]
    load_model = weights.load_model
    monkeypatch.setattr(
        weights, "load_model", lambda path, **options: loaded.append(path) or load_model(path, **options)
    )
    with loaded_model.loaded_in_turn() as load:
        in_turn = [asked(load(path)) for path in order]
    assert all(torch.equal(one, other) for one, other in zip(alone, in_turn, strict=True))
    assert loaded == [base] * 3, "for the first two, for itself, and anew"


# ------------------------------------------------------------------------------------------------------------- 4 bits


def kinds(model: nn.Module) -> dict[str, set[str]]:
    """Group -> the kinds of its linear layers."""
    found: dict[str, set[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in name:
            found.setdefault(weights.group_of(f"{name}.weight"), set()).add(type(module).__name__)
    return found


def test_language_and_cross_attention_are_quantised_and_nothing_else(base):
    model = weights.load_model(base, trained=("extra_rows",), quantised=True)
    assert {group for group, found in kinds(model).items() if found == {"Linear4bit"}} == set(weights.quantised)
    assert all("Linear4bit" not in found for group, found in kinds(model).items() if group not in weights.quantised)
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)
    whole = weights.load_model(base, trained=("cross_attention",), quantised=True)
    assert "Linear4bit" not in kinds(whole)["cross_attention"]
    assert whole.model.gated_cross_attn_layers[0].cross_attn.q_proj.weight.dtype == torch.float32


def test_what_is_quantised_is_what_is_stored_whatever_is_computed_in(base):
    """The base is stored in float32, so that rounding it first would show."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = weights.load_model(base, trained=("extra_rows",), frozen_dtype=dtype, quantised=True)
        layers = {name: m.weight for name, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
        assert {weight.quant_state.dtype for weight in layers.values()} == {dtype}
        assert model.model.vision_model.encoder.layers[0].mlp.fc1.weight.dtype == dtype
        found[dtype] = {n: (w.numpy().tobytes(), w.quant_state.absmax.numpy().tobytes()) for n, w in layers.items()}
    assert found[torch.float32] == found[torch.bfloat16] == found[torch.float16]


def test_only_frozen_matrices_are_stored_rounded_and_autocast_sees_no_difference(base, template):
    exact = weights.load_model(base)
    model = weights.load_model(base, trained=("extra_rows", "resampler"), frozen_dtype=torch.bfloat16)
    rounded = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
    assert {weights.group_of(name) for name in rounded} == {"vision", "language", "cross_attention"}
    assert all("proj" in name or ".fc" in name or "patch_embedding" in name for name in rounded)
    for name, parameter in model.named_parameters():
        assert name in rounded or torch.equal(parameter, exact.get_parameter(name)), name
    with torch.autocast("cpu", torch.bfloat16):
        batch = batch_of([place(template, sample) for sample in SAMPLES])
        assert torch.equal(logits(model, batch), logits(exact, batch))


def test_4_bit_weights_train_and_evaluate_in_turn(base, template):
    """On this machine bitsandbytes would repack weights in evaluation, after which training fails."""
    batch = batch_of([place(template, sample) for sample in SAMPLES])
    model = with_adapters(base, quantised=True, targets=["language", "cross_attention"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model.train()(batch=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        logits(model, batch)
    assert losses[2] < losses[1] < losses[0]
    assert torch.equal(model.train()(batch=batch).loss, model.eval()(batch=batch).loss)


def test_adapters_trained_beside_4_bits_are_read_back_beside_4_bits(base, template, tmp_path):
    model = with_adapters(base, quantised=True)
    move(model)
    lora.save_adapters(model, tmp_path)
    batch = batch_of([place(template, SAMPLES[0])])
    again = weights.load_model(base, trained=(), quantised=True)
    lora.load_adapters(again, tmp_path)
    assert torch.equal(logits(again, batch), logits(model, batch))


# ------------------------------------------------------------------------------------------------------------- recipe


@pytest.mark.parametrize(
    ("given", "trainable", "trained"),
    [
        ({"mode": "lora"}, {"extra_rows"}, {"extra_rows", "language", "cross_attention"}),
        (
            {"mode": "qlora", "trainable": ["gates"], "lora": {"targets": ["vision.mlp"]}},
            {"gates", "extra_rows"},
            {"gates", "extra_rows", "vision"},
        ),
        ({"trainable": ["head"]}, {"head"}, {"head"}),
    ],
)
def test_extra_rows_are_always_trained_beside_adapters(given, trainable, trained):
    config = ModelConfig.model_validate({"path": "x"} | given)
    assert (set(config.trainable), config.trained_groups) == (trainable, trained)
    assert ModelConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lora": {"r": 4}}, "lora is set, but mode is full; set mode to lora or qlora"),
        ({"mode": "lora", "trainable": ["language"]}, "trainable and lora.targets both name language"),
        ({"trainable": []}, "name at least one group"),
    ],
)
def test_a_mode_that_cannot_be_meant_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate({"path": "x"} | given)
