"""What is held out of training is held out of every source."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_planner import settings
from test_prepared import part
from test_store import Toys, encoded, shown

from sft.errors import UserError
from sft.fitting import Limits
from sft.held_out import HoldOut, Side, texts_of
from sft.image_keys import image_key
from sft.prepared import Sources
from sft.recipe import ValidationConfig
from sft.sample import ImageRef, Message, PackItem, Sample
from sft.store import Settings, prepare_store


def image_keys(number: int) -> np.ndarray:
    """Keys spread evenly, as those of hashes are."""
    return np.array([image_key(hashlib.sha256(str(n).encode()).hexdigest()) for n in range(number)])


KEYS = image_keys(6)


@given(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=8), st.floats(0.05, 0.95))
def test_no_image_stands_on_both_sides(images_of, share):
    hold_out = HoldOut(share)
    shown_keys = KEYS[[image for images in images_of for image in images]]
    names = [f"text {number}".encode() for number in range(len(images_of))]
    sides = hold_out.sides(names, shown_keys, np.array([len(images) for images in images_of]))
    shown_in = [
        {image for images, s in zip(images_of, sides, strict=True) if s == side for image in images} for side in Side
    ]
    assert not shown_in[Side.TRAIN] & shown_in[Side.VALIDATION]
    for images, side in zip(images_of, sides, strict=True):
        held = {bool(is_held) for is_held in hold_out.images(KEYS[images])}
        if images:
            assert side == {(False,): Side.TRAIN, (True,): Side.VALIDATION}.get(tuple(held), Side.NEITHER)
        else:
            assert side in (Side.TRAIN, Side.VALIDATION)


def test_the_share_is_that_of_the_images_and_of_the_texts():
    assert abs(HoldOut(0.25).images(image_keys(4000)).mean() - 0.25) < 0.03
    assert abs(HoldOut(0.25).texts(b"text %d" % n for n in range(4000)).mean() - 0.25) < 0.03
    assert not HoldOut().images(KEYS).any()
    assert HoldOut(image_keys=KEYS[:2]).images(KEYS).tolist() == [True, True] + [False] * 4


def picture(number: int) -> bytes:
    """An image of its own colour."""
    return encoded(f"#{number:06x}")


def is_held(content: bytes, share: float = 0.5) -> bool:
    return bool(HoldOut(share).images(np.array([image_key(hashlib.sha256(content).hexdigest())]))[0])


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
        [sources.place(PackItem(index, row)).encoded.key for row in range(len(source))]
        for index, source in enumerate(sources.sources)
    ]


def test_an_image_held_out_in_one_source_is_held_out_in_all(parts):
    data = settings("one", "two").model_copy(update={"validation": ValidationConfig(share=0.5)})
    sources = Sources(parts, data)
    assert keys(sources) == [["a/0"], ["b/2"]]
    assert keys(sources.held_out()) == [["a/1"], ["b/1"]]
    assert [source.sides.tolist() for source in sources.sources] == [[0, 1], [2, 1, 0]]
    assert sources.sources[1].num_held_out == {"validation": 1, "neither": 1}


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


def test_parts_of_a_sample_are_on_its_side(tmp_path, template):
    long = shown("both", KEPT, HELD, "3"), shown("none", "Hi."), shown("held", HELD, "4")
    own = part(tmp_path / "a", template, *long, limits=Limits(99, images=1))
    assert [own.encoded.key(row) for row in own.encoded.all_rows] == ["a/1", "a/2"]  # a turn is never cut
    pages = [
        Sample(key="page", messages=(Message(role="document", content=items),))
        for items in (("One.", ImageRef(source=KEPT), "Two.", ImageRef(source=HELD), "Three."), ("Four.",))
    ]
    own = part(tmp_path / "b", template, *pages, limits=Limits(99, images=1))
    data = settings("one").model_copy(update={"validation": ValidationConfig(share=0.5)})
    (source,) = Sources([[own]], data).sources
    assert own.encoded.samples.tolist() == [0, 0, 1]
    assert source.sides.tolist() == [Side.NEITHER, Side.NEITHER, Side.TRAIN]
    (twice,) = Sources([[own, own]], data).sources
    assert twice.num_held_out == {"validation": 0, "neither": 2}, "samples, not their parts"


def test_a_source_of_which_nothing_is_left_is_named(tmp_path, template):
    data = settings("one").model_copy(update={"validation": ValidationConfig(share=0.5)})
    only = part(tmp_path / "a", template, shown("held", HELD, "?"))
    with pytest.raises(UserError, match=r"source 'one': data\.validation leaves none of 1 samples to train"):
        Sources([[only]], data)


def test_a_source_too_small_to_hold_anything_out_leaves_the_others_to_validate(tmp_path, template):
    data = settings("one", "two").model_copy(update={"validation": ValidationConfig(share=0.5)})
    parts = [[part(tmp_path / name, template, *samples)] for name, samples in SMALL.items()]
    sources = Sources(parts, data)
    assert sources.not_held_out == ["one"]
    held_out = sources.held_out()
    assert keys(held_out) == [["b/1"]] and [(s.name, s.share) for s in held_out.sources] == [("two", 1.0)]
    with pytest.raises(UserError, match=r"share 0\.5 holds out none of 1 samples; raise it and train again"):
        Sources(parts[:1], settings("one").model_copy(update={"validation": data.validation})).held_out()


SMALL = {"a": [shown("kept", KEPT, "?")], "b": [shown("kept", KEPT, "?"), shown("held", HELD, "!")]}


# --------------------------------------------------------------------------------------------------------- texts


def said(key: str, *contents: str | tuple[str, ...]) -> Sample:
    """A dialogue of texts alone, each in one part or in several."""
    roles = ("user", "assistant") * len(contents)
    parts = [content if isinstance(content, tuple) else (content,) for content in contents]
    messages = tuple(Message(role=role, content=part) for role, part in zip(roles, parts, strict=False))
    return Sample(key=key, messages=messages)


def texts(path, *samples: Sample) -> list[bytes]:
    store = prepare_store(Toys(*samples), path, asked={}, settings=Settings(max_skip_share=0))
    return list(texts_of(store.sample_batches()))


@pytest.mark.parametrize("batch_rows", [1, 2, 100])
def test_equal_dialogues_have_equal_texts_wherever_they_stand(tmp_path, monkeypatch, batch_rows):
    monkeypatch.setattr("sft.store.tables._BATCH_ROWS", batch_rows)
    hello, colours = said("x/7", "Hello?", "Hello."), said("x/8", "Name two.", "Red, blue.", "Ö?", "")
    first = texts(tmp_path / "a", hello, shown("picture", KEPT, "Hello?"), colours)
    again = said("y/1", ("Hel", "lo?"), ("Hello.",))
    second = texts(tmp_path / "b", colours, said("new", "Hello?", "Bye."), again)
    assert (first[0], first[2]) == (second[2], second[0])
    assert len({*first, *second}) == 4


def test_texts_of_other_borders_or_roles_are_others(tmp_path):
    one = said("1", "ab", "c")
    others = [said("2", "a", "bc"), said("3", "ab", "c", "", ""), said("4", "abc", "")]
    turned = Sample(key="5", messages=(replace(one.messages[0], role="system"), one.messages[1]))
    assert len(set(texts(tmp_path / "a", one, *others, turned))) == 5


def test_a_dialogue_held_out_in_one_source_is_held_out_in_all(tmp_path, template):
    talks = [said(f"talk {n}", f"What is {n}?", f"{n}.") for n in range(20)]
    first = part(tmp_path / "a", template, *talks)
    second = part(tmp_path / "b", template, said("inserted", "Hi.", "Hi."), *reversed(talks))
    data = settings("one", "two").model_copy(update={"validation": ValidationConfig(share=0.5)})
    one, two = (source.sides.tolist() for source in Sources([[first], [second]], data).sources)
    assert 4 < sum(one) < 16
    assert two[1:] == one[::-1]
