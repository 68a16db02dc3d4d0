"""Groups of parameters, the schedule, the optimizers: what is trained, and how fast."""

import pytest
import torch
from conftest import make_tiny_model
from transformers import get_linear_schedule_with_warmup

from sft.models.idefics.names import GROUPS
from sft.models.idefics.weights import weights
from sft.recipe import OPTIMIZERS, TrainingConfig
from sft.training.optimizer import (
    linear_schedule,
    make_optimizer,
    parameter_groups,
    schedule,
    trained_parts,
    trained_table,
)


def settings(**options) -> TrainingConfig:
    return TrainingConfig(**{"max_steps": 10, "tokens_per_step": 4, "learning_rate": 1e-3} | options)


def rate_at(step: int, **options) -> float:
    """The learning rate of an optimizer step, counted from 0."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=options["learning_rate"])
    return options["learning_rate"] * schedule(optimizer, settings(**options)).lr_lambdas[0](step)


# --------------------------------------------------------------------------------------------------------- schedule


def test_the_learning_rate_goes_up_and_down_in_lines():
    factor = linear_schedule(4, 12, 0.2)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(4) == 1.0
    assert factor(8) == pytest.approx(0.6)
    assert factor(12) == factor(100) == pytest.approx(0.2)
    assert linear_schedule(0, 10, 0.0)(0) == 1.0


def test_warm_up_is_that_of_transformers_a_step_earlier():
    """There the first step has a rate of 0 and trains nothing."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs, ours = get_linear_schedule_with_warmup(optimizer, 4, 12).lr_lambdas[0], linear_schedule(4, 12, 0.0)
    assert [ours(step) for step in range(4)] == [theirs(step + 1) for step in range(4)]
    assert [ours(step) for step in range(4, 12)] == [theirs(step) for step in range(4, 12)]


def test_epochs_warm_up_for_a_share_of_their_steps_and_never_longer_than_they_are():
    epochs = settings(max_steps=None, epochs=1)
    assert [epochs.of_steps(steps).warmup_steps for steps in (1, 2, 34, 1000)] == [0, 1, 2, 30]
    with pytest.raises(ValueError, match="warmup_steps is 9, and training ends after 8 steps"):
        settings(max_steps=None, epochs=1, warmup_steps=9).of_steps(8)


def test_decay_steps_are_a_line_to_zero_that_is_left_early():
    card = {"learning_rate": 1e-5, "warmup_steps": 1000, "max_steps": 22_000, "decay_steps": 25_000}
    assert rate_at(8000, **card) == pytest.approx(1e-5 * 17 / 24)  # 7.08e-6, where MMBench chose idefics-9b-instruct
    assert rate_at(22_000, **card) == pytest.approx(1.25e-6)
    assert rate_at(25_000, **card) == 0
    assert rate_at(22_000, **card | {"decay_steps": None, "final_learning_rate": 1.2e-6}) == pytest.approx(1.2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay_steps": 12, "final_learning_rate": 1e-4}, "both say how the learning rate ends; leave one out"),
        ({"decay_steps": 9}, "decay_steps 9 is before max_steps 10"),
    ],
)
def test_a_schedule_that_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        settings(**options)


# ----------------------------------------------------------------------------------------------------------- groups


def names_in(model, groups: list[dict]) -> list[set[str]]:
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return [{name_of[id(parameter)] for parameter in group["params"]} for group in groups]


def test_what_is_decayed_is_what_m4_decayed(model):
    weights.select_trainable(model)
    groups = parameter_groups(model, settings(), weights)
    names = names_in(model, groups)
    decayed = set().union(*(own for own, group in zip(names, groups, strict=True) if group["weight_decay"] == 0.1))
    spared = set().union(*(own for own, group in zip(names, groups, strict=True) if group["weight_decay"] == 0))
    assert {
        "model.gated_cross_attn_layers.0.alpha_cross_attn",
        "model.perceiver_resampler.latents",
        "model.vision_model.encoder.layers.0.self_attn.k_proj.bias",
        "model.vision_model.encoder.layers.0.layer_norm1.weight",
        "model.layers.0.input_layernorm.weight",
        "model.gated_cross_attn_layers.0.cross_attn.q_layer_norm.weight",
    } <= spared
    assert {
        "model.norm.weight",
        "model.vision_model.pre_layrnorm.weight",
        "model.embed_tokens.weight",
        "lm_head.additional_fc.weight",
        "model.layers.0.self_attn.q_proj.weight",
    } <= decayed
    assert all("perceiver" not in name for name in decayed)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert spared | decayed == trainable
    assert sum(map(len, names)) == len(trainable), "none is in two groups"


def test_every_parameter_has_a_group_and_every_group_has_parameters(model):
    of = {name: weights.group_of(name) for name, _ in model.named_parameters()}
    assert set(of.values()) == set(GROUPS)
    assert of["model.gated_cross_attn_layers.0.alpha_dense"] == "gates"
    assert of["model.gated_cross_attn_layers.0.mlp.up_proj.weight"] == "cross_attention"
    assert of["model.embed_tokens.additional_embedding.weight"] == of["lm_head.additional_fc.weight"] == "extra_rows"
    assert of["lm_head.weight"] == "head"
    assert of["model.norm.weight"] == "language"
    with pytest.raises(KeyError):
        weights.group_of("model.unknown.weight")


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_can_be_trained_alone(model, group):
    weights.select_trainable(model, [group])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {weights.group_of(name) for name in trained} == {group}


def test_a_group_has_its_own_learning_rate_and_weight_decay(model):
    weights.select_trainable(model, ["vision", "gates", "head"])
    own = {"vision": {"learning_rate": 1e-5}, "head": {"weight_decay": 0.5}, "gates": {"weight_decay": 0.5}}
    groups = parameter_groups(model, settings(groups=own), weights)
    found = {(group["name"], group["weight_decay"]): group["lr"] for group in groups}
    assert found == {("vision", 0.1): 1e-5, ("vision", 0.0): 1e-5, ("head", 0.5): 1e-3, ("gates", 0.0): 1e-3}


def test_the_table_counts_trained_parts(model):
    weights.select_trainable(model, ["gates", "head"])
    parts = trained_parts(model, settings(), weights)
    assert {part.group: (part.tensors, part.parameters, part.weight_decay) for part in parts} == {
        "head": (1, model.lm_head.weight.numel(), "0.1"),
        "gates": (4, 4, "0"),
    }
    lines = trained_table(parts).splitlines()
    assert lines[0].split() == ["group", "trained", "tensors", "parameters", "rate", "decay", "dtype"]
    assert lines[-1].split() == ["all", "5", f"{model.lm_head.weight.numel() + 4:,}"]


# ------------------------------------------------------------------------------------------------------- optimizers


def three_steps(tokenizer, **options) -> dict[str, torch.Tensor]:
    """Parameters after three steps down the same slope."""
    model = make_tiny_model(tokenizer)
    weights.select_trainable(model)
    given = settings(**options)
    optimizer = make_optimizer(parameter_groups(model, given, weights), given, model)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.cos(torch.arange(parameter.numel()).float()).view_as(parameter)
        optimizer.step()
    stored = {state.dtype for states in optimizer.state.values() for state in states.values() if torch.is_tensor(state)}
    assert (torch.uint8 in stored) == OPTIMIZERS[given.optimizer].needs_bitsandbytes
    return dict(model.named_parameters())


@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_states_train_almost_as_adamw_does(tokenizer, kind):
    exact, found = three_steps(tokenizer), three_steps(tokenizer, optimizer=kind)
    start = dict(make_tiny_model(tokenizer).named_parameters())
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"):
        moved, apart = (exact[name] - start[name]).abs().mean(), (found[name] - exact[name]).abs().mean()
        assert 0 < apart < 0.1 * moved, name
    for name in ("model.embed_tokens.weight", "model.norm.weight"):  # an embedding; fewer than 4,096 elements
        assert torch.allclose(found[name], exact[name], rtol=0, atol=1e-6), name


def test_adafactor_moves_as_far_as_adamw_also_what_begins_at_zero(tokenizer):
    """An update that were scaled by the size of its tensor, as in the paper, would leave gates and adapters at zero."""
    start = dict(make_tiny_model(tokenizer).named_parameters())
    exact, found = three_steps(tokenizer, weight_decay=0), three_steps(tokenizer, weight_decay=0, optimizer="adafactor")
    assert start["model.gated_cross_attn_layers.0.mlp.up_proj.weight"].any()
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.gated_cross_attn_layers.0.alpha_dense"):
        moved, expected = ((model[name] - start[name]).norm() for model in (found, exact))
        assert 0.5 * expected < moved < 1.5 * expected, name
