"""From packs to micro-batches."""

import json
import os
import time
from dataclasses import fields
from itertools import islice

import pytest
import torch
from conftest import IMAGE_SIZE, square_images
from helpers.planning import data_config
from helpers.sources import BLUE, RED, key_of, part
from helpers.stores import shown

from sft.batches.data_loader import MicroBatches
from sft.batches.pack_stream import Planner
from sft.batches.steps import Plans
from sft.core.distributed import ALONE
from sft.core.errors import RunError
from sft.core.sample import IGNORE_INDEX, NO_SOURCE, SkipSample
from sft.data.reader import Reader, _open_reader
from sft.data.sources import Sources
from sft.models.image_transform import Crop


def micro_batches(sources, micro_batch_packs, rank=ALONE):
    planner = Planner(sources.sources, sources.data, packs_per_step=4, seed=0)
    plans = Plans(sources, planner, micro_batch_packs=micro_batch_packs, image_cost=3.0, rank=rank)
    return MicroBatches(plans, square_images(IMAGE_SIZE))


def test_micro_batches_of_a_step_know_the_steps_trained_tokens(sources):
    batches = [item["batch"] for item in islice(micro_batches(sources, 2), 4)]
    for step in (batches[:2], batches[2:]):
        trained = sum(int((batch.labels_T != IGNORE_INDEX).sum()) for batch in step)
        assert {batch.num_trained_tokens for batch in step} == {trained}


def test_micro_batches_hold_the_same_packs_in_the_same_order(sources):
    small = [item["batch"] for item in islice(micro_batches(sources, 1), 8)]
    large = [item["batch"] for item in islice(micro_batches(sources, 4), 2)]
    for name in ("input_ids_T", "labels_T", "position_ids_T", "source_ids_T"):
        assert torch.equal(
            torch.cat([getattr(batch, name) for batch in small]), torch.cat([getattr(batch, name) for batch in large])
        )
    assert [key for batch in small for key in batch.keys] == [key for batch in large for key in batch.keys]
    assert all(batch.num_images <= 3 for batch in large), "each distinct image once"


def test_a_resumed_run_deals_as_before(sources):
    batches = micro_batches(sources, 1)
    batches.plans.image_cost = 5.0
    state = batches.state(2)
    for saved, cost in ((state, 5.0), ({**state, "image_cost": None}, batches.images.cost_in_tokens)):
        again = micro_batches(sources, 1)
        again.restore({key: value for key, value in saved.items() if value is not None})
        assert again.plans.image_cost == cost


def with_data(sources, **options):
    """The same sources with other data settings."""
    return Sources(sources.parts, sources.data.model_copy(update=options))


def first(number, sources):
    return [item["batch"] for item in islice(micro_batches(sources, 1), number)]


def values(batch, *but):
    """Everything in a batch, as it can be compared."""
    names = [field.name for field in fields(batch) if field.name not in but]
    return {
        name: [tensor.tolist() for tensor in value]
        if name == "tiles"
        else value.tolist()
        if isinstance(value, torch.Tensor)
        else value
        for name in names
        for value in [getattr(batch, name)]
    }


# ------------------------------------------------------------------------------------------------- the training crop


def test_a_crop_is_drawn_by_seed_step_and_image(sources, monkeypatch):
    asked = []

    def crop(width, height, *, seed, step, image_key):
        asked.append((seed, step, image_key))
        return Crop(0, 0, width, height)

    monkeypatch.setattr("sft.batches.image_source.training_crop", crop)
    first(8, sources)
    assert not asked, "augment: none"
    batches = first(8, with_data(sources, augment="crop"))
    assert {(seed, step) for seed, step, _ in asked} == {(0, 1), (0, 2)}
    assert len(asked) == sum(batch.num_images for batch in batches)
    assert key_of(RED) in {key for _, _, key in asked}


# ------------------------------------------------------------------------------------------------------ dirty images


@pytest.fixture
def no_red(monkeypatch):
    """The red image cannot be read any more."""
    read = Reader.image_bytes

    def fails(self, key):
        if key == key_of(RED):
            raise SkipSample("image file missing")
        return read(self, key)

    return lambda: monkeypatch.setattr(Reader, "image_bytes", fails)


def test_a_dirty_image_moves_nothing(sources, no_red):
    sound = first(8, sources)
    no_red()
    found = first(8, sources)
    some_are_dirty = False
    for one, other in zip(found, sound, strict=True):
        touched = ("labels_T", "tiles", "dirty")
        assert values(one, *touched) == values(other, *touched)
        assert not other.dirty
        some_are_dirty |= bool(one.dirty)
        changed = (one.labels_T != other.labels_T).nonzero().flatten().tolist()
        keys = {one.keys[int(one.segment_ids_T[position])] for position in changed}
        assert keys == one.dirty.keys() <= {"a/0", "b/0", "c/1"}
        assert (one.labels_T[changed] == IGNORE_INDEX).all()
    assert some_are_dirty


def test_too_many_dirty_samples_end_the_run_and_are_named(sources, no_red):
    no_red()
    assert first(40, with_data(sources, max_dirty_samples=3)), "as many different ones as there are"
    with pytest.raises(RunError, match=r"more than 2 samples.*c/1 \(image file missing\)"):
        first(40, with_data(sources, max_dirty_samples=2))


def test_a_pack_without_samples_is_a_dummy(tmp_path, template):
    """Three sources take turns about one image that may stand in a pack once: some packs find no sample."""
    parts = [[part(tmp_path / name, template, shown(name, RED, "?"))] for name in "abc"]
    sources = Sources(parts, data_config("a", "b", "c", max_samples_per_image_per_pack=1))
    batches = first(128, sources)
    empty = [batch for batch in batches if not batch.keys]
    assert empty, "the case is there"
    assert {len(batch.input_ids_T) for batch in empty} == {2}
    assert all((batch.source_ids_T == NO_SOURCE).all() for batch in empty)


# ----------------------------------------------------------------------------------------------------------- workers


@pytest.mark.slow
def test_any_number_of_workers_makes_the_same_batches_in_the_same_order(sources):
    sources = with_data(sources, augment="crop")
    state = torch.random.get_rng_state()
    expected = [values(batch) for batch in first(12, sources)]
    for num_workers in (1, 2):
        found = first(12, with_data(sources, augment="crop", num_workers=num_workers))
        assert [values(batch) for batch in found] == expected
    assert torch.equal(torch.random.get_rng_state(), state), "training draws the same numbers"


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_go_on_from_the_step_of_a_state(sources, no_red, num_workers):
    if not num_workers:
        no_red()  # here, in this process
    sources = with_data(sources, augment="crop", num_workers=num_workers)
    begun = micro_batches(sources, 2)
    found = [item["batch"] for item in islice(begun, 12)]
    state = json.loads(json.dumps(begun.state(4)))
    again = micro_batches(sources, 2)
    again.restore(state)
    assert again.dirty == begun.dirty and bool(again.dirty) == (num_workers == 0)
    assert [values(item["batch"]) for item in islice(again, 4)] == [values(batch) for batch in found[8:]]


class Faulty(Reader):
    """Hangs at the blue image and dies of the red one."""

    def image_bytes(self, image):
        if image == key_of(BLUE):
            time.sleep(1000)
        if image == key_of(RED):
            os._exit(1)
        return super().image_bytes(image)

    def __reduce__(self):
        return _open_faulty, super().__reduce__()[1]


def _open_faulty(paths, data):
    return Faulty(_open_reader(paths, data).parts, data)


def faulty(sources, source, **options):
    """One of the sources alone, with one worker."""
    only = sources.data.mixture[0].model_copy(update={"share": 1.0})
    data = sources.data.model_copy(update={"mixture": (only,), "num_workers": 1} | options)
    alone = Sources([sources.parts[source]], data)
    alone.reader = Faulty(alone.parts, data)
    return alone


@pytest.mark.slow
def test_a_worker_that_hangs_is_named(sources):
    sources.parts[0] = sources.parts[0][1:]  # without the sample that shows red alone
    with pytest.raises(RunError, match=r"no worker made a batch in 20 seconds .* busy with b/0$"):
        first(1, faulty(sources, 0, worker_timeout=20))


@pytest.mark.slow
def test_a_worker_that_dies_is_named(sources):
    with pytest.raises(RunError, match=r"a worker died.* busy with c/1 "):
        first(40, faulty(sources, 1))
