"""Prepared sources as the planner and the collator see them."""

import io

import numpy as np
import pytest
from helpers.planning import data_config
from helpers.sources import BLUE, GREEN, RED, key_of, part
from helpers.stores import shown
from PIL import Image

from sft.core.sample import PackItem
from sft.data.sources import Sources


def numbers(source):
    """All samples of a source: tokens, and the images of each."""
    rows = np.arange(len(source))
    images, _, num_images = source.images(rows)
    return source.num_tokens(rows).tolist(), [set(own.tolist()) for own in np.split(images, np.cumsum(num_images))[:-1]]


def test_equal_images_have_one_key_in_all_stores(sources):
    one, two = sources.sources
    assert numbers(one)[1] == [{key_of(RED)}, set(), {key_of(BLUE), key_of(RED)}]
    assert numbers(two)[1] == [{key_of(GREEN)}, {key_of(RED)}]
    assert sources.reader.image_bytes(key_of(RED)) == RED and sources.reader.image_bytes(key_of(GREEN)) == GREEN
    assert sources.reader.image_size(key_of(GREEN)) == Image.open(io.BytesIO(GREEN)).size
    with pytest.raises(KeyError):
        sources.reader.image_bytes(key_of(b"another"))


def test_an_image_that_stands_there_twice_is_one_image_shown_twice(tmp_path, template):
    twice = part(tmp_path / "a", template, shown("a0", RED, BLUE, RED), shown("a1"), shown("a2", BLUE))
    (source,) = Sources([[twice]], data_config()).sources
    assert numbers(source)[1] == [{key_of(RED), key_of(BLUE)}, set(), {key_of(BLUE)}]
    assert source.num_shown(np.arange(3)).tolist() == [3, 0, 1]


def test_a_place_leads_to_its_sample(sources):
    for index, source in enumerate(sources.sources):
        lengths, images = numbers(source)
        for row in range(len(source)):
            placed = sources.sample(PackItem(index, row))
            assert len(placed.encoded.input_ids) == lengths[row]
            assert set(placed.images) == images[row]
            assert placed.source == index
    keys = [sources.sample(PackItem(0, row)).encoded.key for row in range(3)]
    assert keys == ["a/0", "a/1", "b/0"]


def test_groups_are_samples_about_the_same_images(tmp_path, template):
    first = part(tmp_path / "a", template, shown("0", RED), shown("1", BLUE, RED), shown("2"), shown("3", RED, BLUE))
    second = part(tmp_path / "b", template, shown("4", RED), shown("5"))
    (source,) = Sources([[first, second]], data_config()).sources
    members, starts = source.groups
    assert sorted(sorted(own.tolist()) for own in np.split(members, starts[1:-1])) == [[0, 4], [1, 3], [2], [5]]
    (unshared,) = Sources([[first]], data_config(max_samples_per_image_per_pack=1)).sources
    assert unshared.groups is None
