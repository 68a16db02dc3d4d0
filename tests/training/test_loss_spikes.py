"""Losses that jump are noticed, those that only look so are not."""

import json

import numpy as np
import pytest
from conftest import batch_of, conversation, document, place
from helpers.training import trainer_of

from sft.models.idefics.weights import weights
from sft.training import loss_spikes
from sft.training.loss_spikes import LEAST_STEPS, LIMIT, Spikes


def line(losses, tokens) -> dict:
    """A line of metrics.jsonl."""
    sources = {
        name: {"loss": float(loss) if number else None, "trained_tokens": int(number)}
        for name, loss, number in zip("abc", losses, tokens, strict=True)
    }
    return {"sources": sources}


def noisy(seed: int, steps: int = 1000):
    """Three sources whose losses and noise differ tenfold, in steps of any make-up; the losses fall."""
    rng = np.random.default_rng(seed)
    for step in range(steps):
        tokens = rng.integers(0, 1000, 3) * rng.integers(0, 2, 3)
        tokens[step % 3] += 1
        yield (np.array([0.5, 2, 6]) + [0.05, 0.2, 0.5] * rng.standard_normal(3)) * 0.999**step, tokens


@pytest.mark.parametrize("seed", range(3))
def test_noise_a_falling_loss_and_another_make_up_of_steps_are_no_spikes(seed):
    found = Spikes("abc")
    assert [found.add(line(*step)) for step in noisy(seed)] == [None] * 1000


def test_a_jump_is_a_spike_from_the_first_judged_step_on_and_the_next_is_one_too():
    found = Spikes("abc")
    for step in range(LEAST_STEPS):
        assert found.add(line([1 + step % 2 / 100, 4, 0], [50, 50, 0])) is None
    assert found.add(line([1, 4.45, 0], [50, 50, 0])) is None, "less than a tenth"
    for loss in (6, 5.5):
        spike = found.add(line([1, loss, 0], [50, 50, 0]))
        assert spike.loss == (1 + loss) / 2 and spike.expected == pytest.approx(2.5, abs=0.01)
        assert spike.loss - spike.expected > LIMIT * spike.spread
    assert found.add(line([1, 4, 0], [50, 50, 0])) is None


def test_a_new_source_and_a_loss_that_is_no_number_are_no_spikes():
    found = Spikes("abc")
    for losses, tokens in noisy(0, 100):
        found.add(line(losses, tokens * [1, 1, 0]))
    assert found.add(line([0.5, 2, 90], [10, 10, 1000])) is None
    assert found.add(line([0.5, np.nan, 0], [10, 10, 0])) is found.add(line([0, 0, 0], [0, 0, 0])) is None


def test_a_spike_is_told_once_and_kept_with_the_pack_that_made_it(template, tmp_path, model, monkeypatch):
    """One dialogue until it is known; then a pack of something else stands beside it, twice."""
    monkeypatch.setattr(loss_spikes, "LEAST_STEPS", 8)
    monkeypatch.setattr(loss_spikes, "WINDOW", 8)
    weights.select_trainable(model)
    usual = place(template, conversation("Hi.", "Hello.", key="usual"))
    odd = [place(template, document("0123456789 fox dog", key=key)) for key in ("odd", "odder")]
    batches = [batch_of([usual], [usual])] * 20 + [batch_of([usual], odd)] * 2
    said = []
    trainer = trainer_of(model, template, batches, tmp_path, 1, max_steps=22, learning_rate=1e-2, log=said.append)
    trainer.train()
    lines = [json.loads(text) for text in (tmp_path / "spikes.jsonl").read_text().splitlines()]
    assert [found["step"] for found in lines] == [21, 22]
    assert [pack["samples"] for pack in lines[0]["packs"]] == [["odd", "odder"], ["usual"]]
    first, second = lines[0]["packs"]
    tokens = first["trained_tokens"] + second["trained_tokens"]
    mean = sum(pack["loss"] * pack["trained_tokens"] for pack in (first, second)) / tokens
    assert lines[0]["loss"] == pytest.approx(mean)
    (told,) = said
    assert told.startswith("step 21: loss ") and "odd, odder (spikes.jsonl lists more)" in told
