"""What tests of runs with a break share."""

import json
from pathlib import Path

import torch
from helpers.training import write_recipe
from safetensors.torch import load_file

from sft.data.prepare import prepare
from sft.recipe import load_recipe
from sft.runs.checkpoint import STATE
from sft.training import run
from sft.training.engines.resume_state import read_progress

STEPS = ("training.max_steps=4", "training.warmup_steps=1", "checkpoints.every_steps=1", "data.validation=null")


def recipe_of(folder, *overrides):
    folder.mkdir(exist_ok=True)
    return load_recipe(write_recipe(folder), (*STEPS, *overrides))


def trained(recipe, *, until=None, resume_from=None):
    """Train; with `until`, stop after that step as a person would who lays a file there."""

    def on_step(step, line):
        if until and step == until - 1:
            (Path(recipe.output_dir) / "stop").touch()

    return run.train(recipe, prepare(recipe), on_step, resume_from=resume_from)


def folder_of(recipe, step):
    return Path(recipe.output_dir) / "checkpoints" / f"checkpoint-{step}"


def metrics(recipe):
    """What was computed at each step, without what it took."""
    lines = [json.loads(line) for line in (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()]
    took = ("time", "tokens_per_second", "data_wait", "peak_memory_bytes")
    return [{key: value for key, value in line.items() if key not in took} for line in lines]


def assert_same_state(one, other):
    """Weights, optimizer, schedule and place in the data, to the bit."""
    found, expected = (load_file(folder / STATE / "trained.safetensors") for folder in (one, other))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    found, expected = (torch.load(folder / STATE / "optimizer.pt", weights_only=True) for folder in (one, other))
    torch.testing.assert_close(found["state"], expected["state"], rtol=0, atol=0)
    assert found["param_groups"] == expected["param_groups"]
    found, expected = (read_progress(folder / STATE) for folder in (one, other))
    assert {key: found[key] for key in ("step", "schedule", "data")} == {
        key: expected[key] for key in ("step", "schedule", "data")
    }
