"""What is held out of training is held out of every source."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_data_loader import part, settings
from test_store import encoded, shown

from sft.data_loader import Sources
from sft.errors import UserError
from sft.held_out import HoldOut, Side
from sft.recipe import ValidationConfig
from sft.sample import PackItem


def sha256(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


@given(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=8), st.floats(0.05, 0.95))
def test_no_image_stands_on_both_sides(images_of, share):
    hashes = [sha256(number) for number in range(6)]
    rows = np.array([image for images in images_of for image in images], dtype=np.int64)
    offsets = np.concatenate(([0], np.cumsum([len(images) for images in images_of])))
    keys = [f"text {number}" for number in range(len(images_of))]
    sides = HoldOut(share=share).sides(keys, hashes, rows, offsets)
    shown_in = [
        {image for images, s in zip(images_of, sides, strict=True) if s == side for image in images} for side in Side
    ]
    assert not shown_in[Side.TRAIN] & shown_in[Side.VALIDATION]
    for images, side in zip(images_of, sides, strict=True):
        held = {bool(HoldOut(share=share).images([hashes[image]])[0]) for image in images}
        if images:
            assert side == {(False,): Side.TRAIN, (True,): Side.VALIDATION}.get(tuple(held), Side.NEITHER)
        else:
            assert side in (Side.TRAIN, Side.VALIDATION)


def test_the_share_is_that_of_the_images_and_of_the_texts():
    numbers = range(4000)
    assert abs(HoldOut(share=0.25).images([sha256(n) for n in numbers]).mean() - 0.25) < 0.03
    assert abs(HoldOut(share=0.25).texts([f"key {n}" for n in numbers]).mean() - 0.25) < 0.03
    assert not HoldOut().images([sha256(n) for n in numbers]).any()


def picture(number: int) -> bytes:
    """An image of its own colour."""
    return encoded(f"#{number:06x}")


def is_held(content: bytes, share: float = 0.5) -> bool:
    return bool(HoldOut(share=share).images([hashlib.sha256(content).hexdigest()])[0])


KEPT = next(content for content in map(picture, range(100)) if not is_held(content))
HELD = next(content for content in map(picture, range(100)) if is_held(content))


@pytest.fixture
def parts(tmp_path, template):
    """Two sources that show the same two images, one of them held out."""
    first = part(tmp_path / "a", template, shown("kept", KEPT, "1"), shown("held", HELD, "2"))
    second = part(
        tmp_path / "b", template, shown("both", KEPT, HELD, "3"), shown("held too", HELD, "4"), shown("kept too", KEPT)
    )
    return [[first], [second]]


def keys(sources):
    """The samples of each source, by number in their dataset."""
    return [
        [sources.place(PackItem(index, row)).encoded.key for row in range(len(size.num_tokens))]
        for index, size in enumerate(sources.sizes())
    ]


def test_an_image_held_out_in_one_source_is_held_out_in_all(parts):
    data = settings("one", "two").model_copy(update={"validation": ValidationConfig(share=0.5)})
    sources = Sources(parts, data)
    assert keys(sources) == [["a/0"], ["b/2"]]
    assert keys(sources.held_out()) == [["a/1"], ["b/1"]]
    assert [sides.tolist() for sides in sources.sides] == [[0, 1], [2, 1, 0]]


def test_without_validation_everything_is_trained_on(parts):
    sources = Sources(parts, settings("one", "two"))
    assert keys(sources) == [["a/0", "a/1"], ["b/0", "b/1", "b/2"]]
    assert sources.held_out() is None


def test_images_of_a_validation_file_are_held_out_of_every_source(parts, tmp_path, template):
    own = part(tmp_path / "own", template, shown("own", KEPT, "How many?"))
    data = settings("one", "two").model_copy(update={"validation": ValidationConfig(path="own.jsonl")})
    sources = Sources(parts, data, validation=own)
    assert keys(sources) == [["a/1"], ["b/1"]]
    assert keys(sources.held_out()) == [["own/0"]]


def test_a_source_of_which_nothing_is_left_is_named(tmp_path, template):
    data = settings("one").model_copy(update={"validation": ValidationConfig(share=0.5)})
    only = part(tmp_path / "a", template, shown("held", HELD, "?"))
    with pytest.raises(UserError, match=r"source 'one': data\.validation holds out all of its 1 samples"):
        Sources([[only]], data)
