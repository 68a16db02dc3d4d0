"""Packs become a batch: numbers one can check in the head."""

import numpy as np
import pytest
from conftest import num_trained, square_images, toy_images

from sft.batches.collate import collate
from sft.core.sample import EncodedSample, PlacedSample, SkipSample

IMAGE = 99
CAT, DOG = 70, 80  # numbers of images


def sample(key, ids, trained, images=(), source=0):
    positions = tuple(i for i, token in enumerate(ids) if token == IMAGE)
    encoded = EncodedSample(key=key, input_ids=np.array(ids), trained_spans=trained, image_positions=positions)
    return PlacedSample(encoded, images, source)


TEXT = sample("text", [1, 5, 6, 2], ((2, 4),))
PAIR = sample("pair", [1, 7, IMAGE, 8, IMAGE, 9, 2], ((3, 4), (5, 7)), (CAT, DOG), source=3)
SHARED = sample("shared", [1, IMAGE, 4, 2], ((2, 4),), (DOG,), source=1)
PACKS = [[TEXT, PAIR], [SHARED]]
TINY = square_images(2)


def toy_batch(**options):
    decoded = []

    def load_pixels(image):
        decoded.append(image)
        return np.full((3, 2, 2), image, dtype=np.uint8)

    return collate(PACKS, toy_images(load_pixels, TINY), **{"train_on": "assistant"} | options), decoded


def test_packs_are_laid_end_to_end():
    batch, _ = toy_batch()
    assert batch.input_ids_T.tolist() == [1, 5, 6, 2, 1, 7, 99, 8, 99, 9, 2, 1, 99, 4, 2]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3]
    assert batch.segment_ids_T.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2]
    assert batch.source_ids_T.tolist() == [0, 0, 0, 0, 3, 3, 3, 3, 3, 3, 3, 1, 1, 1, 1]
    assert batch.keys == ("text", "pair", "shared")


def test_each_token_looks_at_the_last_image_at_or_before_it():
    batch, decoded = toy_batch()
    assert batch.image_ids_T.tolist() == [-1, -1, -1, -1, -1, -1, 0, 0, 1, 1, 1, -1, 1, 1, 1]
    assert decoded == [CAT, DOG], "the dog is decoded once for two samples"
    assert batch.tiles[0][:, 0, 0, 0].tolist() == [CAT, DOG]


def test_labels_are_the_answers():
    batch, _ = toy_batch()
    assert batch.labels_T.tolist() == [-100, -100, 6, 2, -100, -100, -100, 8, -100, 9, 2, -100, -100, 4, 2]
    assert batch.num_trained_tokens == 7 == sum(num_trained(s.encoded, "assistant") for s in (TEXT, PAIR, SHARED))


def test_labels_are_every_token_but_the_first_of_a_segment():
    batch, _ = toy_batch(train_on="all")
    assert batch.labels_T.tolist() == [-100, 5, 6, 2, -100, 7, 99, 8, 99, 9, 2, -100, 99, 4, 2]
    assert batch.num_trained_tokens == 12 == sum(num_trained(s.encoded, "all") for s in (TEXT, PAIR, SHARED))


def test_an_answer_that_opens_a_sample_is_not_predicted_from_its_neighbour():
    odd = sample("odd", [5, 6], ((0, 2),))
    assert collate([[odd, odd]], toy_images(None, TINY), train_on="assistant").labels_T.tolist() == [-100, 6, -100, 6]
    assert num_trained(odd.encoded, "assistant") == 1


def test_without_isolation_a_pack_is_one_segment():
    batch, _ = toy_batch(pack_isolation=False)
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 1, 2, 3]
    assert batch.segment_ids_T.tolist() == [0] * 11 + [1] * 4
    isolated, _ = toy_batch()
    assert batch.image_ids_T.tolist() == isolated.image_ids_T.tolist()
    assert batch.labels_T.tolist() == isolated.labels_T.tolist()


def test_without_isolation_the_opening_of_a_sample_is_trained_where_all_tokens_are():
    batch, _ = toy_batch(pack_isolation=False, train_on="all")
    assert batch.labels_T.tolist() == [-100, 5, 6, 2, 1, 7, 99, 8, 99, 9, 2, -100, 99, 4, 2]
    assert batch.num_trained_tokens == 13


def test_the_step_says_what_the_loss_is_divided_by():
    assert toy_batch(num_trained_tokens=1000)[0].num_trained_tokens == 1000


def test_an_image_that_fails_takes_the_labels_of_its_samples_and_moves_nothing_else():
    def load_pixels(image):
        if image == DOG:
            raise SkipSample("image does not decode")
        return np.full((3, 2, 2), image, dtype=np.uint8)

    def collated(**options):
        source = toy_images(load_pixels, TINY)
        return collate(PACKS, source, train_on="assistant", num_trained_tokens=7, **options)

    with pytest.raises(SkipSample):
        collated()
    found, (sound, _) = collated(forgive_images=True), toy_batch()
    assert found.labels_T.tolist() == [-100, -100, 6, 2] + [-100] * 11
    assert found.tiles[0][:, 0, 0, 0].tolist() == [CAT, 0]
    assert found.dirty == dict.fromkeys(["pair", "shared"], "image does not decode")
    assert (found.num_trained_tokens, found.keys, sound.dirty) == (7, sound.keys, {})
    for name in ("input_ids_T", "position_ids_T", "segment_ids_T", "image_ids_T", "source_ids_T"):
        assert getattr(found, name).tolist() == getattr(sound, name).tolist()


def test_text_alone_needs_no_image():
    batch = collate([[TEXT]], toy_images(None, TINY), train_on="all")
    assert batch.tiles == () and batch.num_images == 0
    assert batch.image_ids_T.tolist() == [-1, -1, -1, -1]


@pytest.mark.parametrize("packs", [[], [[TEXT]], [[sample("mute", [1, IMAGE, 4], (), (DOG,))]]])
def test_a_batch_that_lacks_images_or_labels_is_made_whole_by_a_dummy(packs):
    options = {"train_on": "assistant", "num_trained_tokens": 9}
    source = toy_images(lambda image: np.full((3, 2, 2), image, np.uint8), TINY)
    whole = collate(packs, source, always_whole=True, **options)
    assert whole.input_ids_T[-2:].tolist() == [0, 0] and whole.labels_T[-2:].tolist() == [-100, 0]
    assert whole.source_ids_T[-2:].tolist() == [-1, -1], "of no source: without weight"
    assert whole.position_ids_T[-2:].tolist() == [0, 1]
    assert (whole.segment_ids_T[-2:] == len([s for pack in packs for s in pack])).all()
    black = whole.tiles[0][whole.image_ids_T[-2:]]
    assert black.shape == (2, 3, 2, 2) and not black.any()
    assert "" not in whole.keys and whole.num_trained_tokens == 9
    if packs:
        alone = collate(packs, source, **options)
        assert whole.input_ids_T[:-2].tolist() == alone.input_ids_T.tolist()


def test_a_batch_that_is_whole_gets_no_dummy():
    assert toy_batch(always_whole=True)[0].keys == toy_batch()[0].keys
    assert len(toy_batch(always_whole=True)[0].input_ids_T) == len(toy_batch()[0].input_ids_T)
