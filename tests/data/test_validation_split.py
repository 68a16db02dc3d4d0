"""What is held out of training is held out of every source."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from helpers.planning import data_config
from helpers.sources import part
from helpers.stores import Toys, encoded, shown
from hypothesis import given
from hypothesis import strategies as st

from sft.core.errors import UserError
from sft.core.sample import ImageRef, Message, PackItem, Sample
from sft.data.sources import Sources
from sft.data.store import Settings, prepare_store
from sft.data.store.image_keys import image_key
from sft.data.truncate import Limits
from sft.data.validation_split import HoldOut, SampleKeys, Side, hold_out_share, sample_keys, texts_of
from sft.evaluation.held_out_loss import held_out_packs
from sft.recipe import ValidationConfig


def image_keys(number: int) -> np.ndarray:
    """Keys spread evenly, as those of hashes are."""
    return np.array([image_key(hashlib.sha256(str(n).encode()).hexdigest()) for n in range(number)])


KEYS = image_keys(6)


@given(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=8), st.floats(0.05, 0.95))
def test_no_image_stands_on_both_sides(images_of, share):
    hold_out = HoldOut(share)
    shown_keys = KEYS[[image for images in images_of for image in images]]
    names = [f"text {number}".encode() for number in range(len(images_of))]
    sides = hold_out.sides(sample_keys(names, shown_keys, np.array([len(images) for images in images_of])))
    shown_in = [
        {image for images, s in zip(images_of, sides, strict=True) if s == side for image in images} for side in Side
    ]
    assert not shown_in[Side.TRAIN] & shown_in[Side.VALIDATION]
    for images, side in zip(images_of, sides, strict=True):
        held = {bool(is_held) for is_held in hold_out.holds(KEYS[images])}
        if images:
            assert side == {(False,): Side.TRAIN, (True,): Side.VALIDATION}.get(tuple(held), Side.NEITHER)
        else:
            assert side in (Side.TRAIN, Side.VALIDATION)


def test_the_share_is_that_of_the_images_and_of_the_texts():
    texts = sample_keys((b"text %d" % n for n in range(4000)), KEYS[:0], np.zeros(4000, np.int64))
    assert abs(HoldOut(0.25).holds(image_keys(4000)).mean() - 0.25) < 0.03
    assert abs(HoldOut(0.25).holds(texts.keys).mean() - 0.25) < 0.03
    assert not HoldOut().holds(KEYS).any()
    assert HoldOut(keys=KEYS[:2]).holds(KEYS).tolist() == [True, True] + [False] * 4


def samples_about(*images: tuple[int, ...]) -> SampleKeys:
    """Samples that show the images of these numbers, of which a lower one has a lower key."""
    return sample_keys(None, np.array([key for own in images for key in own]) + 2**62, np.array([*map(len, images)]))


def held_by_a_small_share(*sources: SampleKeys) -> tuple[list[int], list[list[int]]]:
    """The images that are held out where a share holds out none, and the sides of the samples of each source."""
    hold_out, sides = hold_out_share(0.01, [lambda own=own: own for own in sources])
    return sorted((hold_out.keys - 2**62).tolist()), [own.tolist() for own in sides]


def test_of_a_source_of_which_the_share_holds_out_none_the_sample_of_the_lowest_hashes_is():
    assert held_by_a_small_share(samples_about((7,), (3,), (5,), (3,))) == ([3], [[0, 1, 0, 1]])
    assert held_by_a_small_share(samples_about((1, 9), (2, 4), (4, 8))) == ([2, 4], [[0, 1, 2]]), "all of its images"


def test_what_is_held_out_of_a_small_source_is_held_out_of_all():
    small, large = samples_about((5,), (6,)), samples_about((2,), (5,), (6,), (5, 6))
    assert held_by_a_small_share(small, large) == ([2, 5], [[1, 0], [1, 1, 0, 2]])


def test_nothing_is_held_out_that_would_leave_nothing_of_a_source_to_train_on():
    assert held_by_a_small_share(samples_about((3,), (3,))) == ([], [[0, 0]])
    assert held_by_a_small_share(samples_about((3, 4), (3, 5))) == ([], [[0, 0]])
    assert held_by_a_small_share(samples_about((3,), (4,)), samples_about((3,))) == ([], [[0, 0], [0]])
    assert held_by_a_small_share(samples_about((1,), (2,)), samples_about((3,))) == ([1], [[1, 0], [0]])


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=6), st.randoms())
def test_the_order_of_samples_and_of_their_images_does_not_matter(images_of, random):
    shuffled = [random.sample(images, len(images)) for images in random.sample(images_of, len(images_of))]
    held, (sides,) = held_by_a_small_share(samples_about(*images_of))
    held_too, (sides_too,) = held_by_a_small_share(samples_about(*shuffled))
    assert held == held_too and sorted(sides) == sorted(sides_too)
    assert Side.TRAIN in sides


def picture(number: int) -> bytes:
    """An image of its own colour."""
    return encoded(f"#{number:06x}")


def is_held(content: bytes, share: float = 0.5) -> bool:
    return bool(HoldOut(share).holds(np.array([image_key(hashlib.sha256(content).hexdigest())]))[0])


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
        [sources.sample(PackItem(index, row)).encoded.key for row in range(len(source))]
        for index, source in enumerate(sources.sources)
    ]


def test_an_image_held_out_in_one_source_is_held_out_in_all(parts):
    data = data_config("one", "two").model_copy(update={"validation": ValidationConfig(share=0.5)})
    sources = Sources(parts, data)
    assert keys(sources) == [["a/0"], ["b/2"]]
    assert keys(sources.held_out()) == [["a/1"], ["b/1"]]
    assert [source.sides.tolist() for source in sources.sources] == [[0, 1], [2, 1, 0]]
    assert sources.sources[1].num_held_out == {"validation": 1, "neither": 1}


def test_without_validation_everything_is_trained_on(parts):
    sources = Sources(parts, data_config("one", "two"))
    assert keys(sources) == [["a/0", "a/1"], ["b/0", "b/1", "b/2"]]
    assert sources.held_out() is None


def test_images_of_a_validation_file_are_held_out_of_every_source(parts, tmp_path, template):
    own = part(tmp_path / "own", template, shown("own", KEPT, "How many?"))
    data = data_config("one", "two").model_copy(update={"validation": ValidationConfig(path="own.jsonl")})
    sources = Sources(parts, data, validation=own)
    assert keys(sources) == [["a/1"], ["b/1"]]
    assert keys(sources.held_out()) == [["own/0"]]


def test_every_held_out_sample_is_measured_whatever_max_epochs_leaves_to_train(parts, tmp_path, template):
    """Sources of few samples once came to their end before one pack, and nothing was left to choose by."""
    own = part(tmp_path / "own", template, shown("own", KEPT, "How many?"), shown("other", KEPT))
    data = data_config("one", "two")
    short = tuple(source.model_copy(update={"max_epochs": 0.1}) for source in data.mixture)
    for validation, dataset in ((ValidationConfig(share=0.5), None), (ValidationConfig(path="own.jsonl"), own)):
        limited = data.model_copy(update={"mixture": short, "validation": validation})
        held_out = Sources(parts, limited, validation=dataset).held_out()
        assert held_out_packs(held_out, seed=0).num_samples == 2


def test_parts_of_a_sample_are_on_its_side(tmp_path, template):
    long = shown("both", KEPT, HELD, "3"), shown("none", "Hi."), shown("held", HELD, "4")
    own = part(tmp_path / "a", template, *long, limits=Limits(99, image_weight=1))
    assert [own.encoded.key(row) for row in own.encoded.all_rows] == ["a/1", "a/2"]  # a turn is never cut
    pages = [
        Sample(key="page", messages=(Message(role="document", content=items),))
        for items in (
            ("One.", ImageRef(source=KEPT), "Two.", ImageRef(source=HELD), "Three."),
            ("Four.", ImageRef(source=KEPT)),
            ("Five.", ImageRef(source=HELD)),
        )
    ]
    own = part(tmp_path / "b", template, *pages, limits=Limits(99, image_weight=1))
    data = data_config("one").model_copy(update={"validation": ValidationConfig(share=0.5)})
    (source,) = Sources([[own]], data).sources
    assert own.encoded.samples.tolist() == [0, 0, 1, 2]
    assert source.sides.tolist() == [Side.NEITHER, Side.NEITHER, Side.TRAIN, Side.VALIDATION]
    (twice,) = Sources([[own, own]], data).sources
    assert twice.num_held_out == {"validation": 2, "neither": 2}, "samples, not their parts"


def test_a_source_of_which_nothing_is_left_is_named(tmp_path, template):
    data = data_config("one").model_copy(update={"validation": ValidationConfig(share=0.5)})
    only = part(tmp_path / "a", template, shown("held", HELD, "?"))
    with pytest.raises(UserError, match=r"source 'one': data\.validation leaves none of 1 samples to train"):
        Sources([[only]], data)


def test_a_source_of_one_image_leaves_the_others_to_validate(tmp_path, template):
    data = data_config("one", "two").model_copy(update={"validation": ValidationConfig(share=0.5)})
    parts = [[part(tmp_path / name, template, *samples)] for name, samples in SMALL.items()]
    sources = Sources(parts, data)
    assert sources.not_held_out == ["one"]
    held_out = sources.held_out()
    assert keys(held_out) == [["b/1"]] and [(s.name, s.share) for s in held_out.sources] == [("two", 1.0)]
    with pytest.raises(UserError, match=r"data\.validation: holds out none of 1 samples"):
        Sources(parts[:1], data_config("one").model_copy(update={"validation": data.validation})).held_out()


SMALL = {"a": [shown("kept", KEPT, "?")], "b": [shown("kept", KEPT, "?"), shown("held", HELD, "!")]}


def test_ten_images_of_which_the_share_holds_out_none_hold_out_one(tmp_path, template):
    ten = [picture(number) for number in range(1000) if not is_held(picture(number), 0.1)][:10]
    samples = [shown(f"{n}", content, question) for n, content in enumerate(ten) for question in ("What?", "Where?")]
    data = data_config("one").model_copy(update={"validation": ValidationConfig(share=0.1)})
    sources = Sources([[part(tmp_path / "a", template, *samples)]], data)
    (held,) = keys(sources.held_out())
    assert held in [[f"a/{row}", f"a/{row + 1}"] for row in range(0, 20, 2)], "both questions about one image"
    assert len(sources.sources[0]) == 18 and sources.not_held_out == []
    again = Sources([[part(tmp_path / "b", template, *reversed(samples))]], data)
    assert sources.sources[0].sides.tolist() == again.sources[0].sides.tolist()[::-1]


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
    monkeypatch.setattr("sft.data.store.tables._BATCH_ROWS", batch_rows)
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
    data = data_config("one", "two").model_copy(update={"validation": ValidationConfig(share=0.5)})
    one, two = (source.sides.tolist() for source in Sources([[first], [second]], data).sources)
    assert 4 < sum(one) < 16
    assert two[1:] == one[::-1]
