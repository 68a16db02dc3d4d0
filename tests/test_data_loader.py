"""From packs to micro-batches."""

from itertools import islice

import torch
from conftest import IMAGE_SIZE
from test_prepared import sources as sources  # a fixture

from sft.data_loader import MicroBatches
from sft.planner import Planner
from sft.sample import IGNORE_INDEX


def micro_batches(sources, micro_batch_packs):
    planner = Planner(sources.sources, sources.data, packs_per_step=4, seed=0)
    return MicroBatches(sources, planner, packs_per_step=4, micro_batch_packs=micro_batch_packs, image_size=IMAGE_SIZE)


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
    assert all(len(batch.pixel_values_NCHW) <= 3 for batch in large), "each distinct image once"
