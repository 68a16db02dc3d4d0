"""Token ids on disk are those of the template."""

import numpy as np
import pytest
from conftest import TOY_IMAGES, conversation, document, num_trained, withheld

from sft.data import encoded_arrays
from sft.data.encoded_arrays import encode_samples, encoding_name
from sft.data.truncate import Limits, Truncation
from sft.models.chat_template import ChatTemplate

SAMPLES = (
    conversation(("<dog>", "What is it?"), "A dog.", "Sure?", "Yes."),
    conversation("Hi.", "Hello.", system="Be kind."),
    document("A fox.", "<fox>", "The quick brown fox.", "<dog>"),
    withheld(conversation("Hi.", "No.", "Sure?", "Yes."), 1),
)
IMAGE_ROWS = ((0,), (), (1, 0), ())


class Toys:
    """Samples and the rows of their images, as a store hands them out."""

    def __init__(self, samples=SAMPLES, rows=IMAGE_ROWS):
        self.pairs = list(zip(samples, rows, strict=True))

    def __len__(self):
        return len(self.pairs)

    def stored_samples(self, start, stop):
        return self.pairs[start:stop]


@pytest.fixture
def encoded(template, tmp_path):
    return encode_samples(Toys(), template, tmp_path / "store" / "encoded" / "toy")


def test_samples_read_back_as_the_template_encodes_them(encoded, template):
    assert len(encoded) == 4
    for row, sample in enumerate(SAMPLES):
        found, expected = encoded[row], template.encode(sample)
        assert found.key == f"store/{row}"
        assert found.input_ids.dtype == np.int64
        assert found.input_ids.tolist() == expected.input_ids.tolist()
        assert found.trained_spans == expected.trained_spans
        assert found.withheld_spans == expected.withheld_spans
        assert found.image_positions == expected.image_positions
        assert encoded.image_rows(row) == IMAGE_ROWS[row]


def test_ids_take_two_bytes_where_the_vocabulary_allows(encoded):
    assert (encoded.path / "input_ids.bin").stat().st_size == 2 * encoded.num_tokens(encoded.all_rows).sum()


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_counts_are_those_of_the_samples(encoded, train_on):
    rows = np.array([2, 0, 1, 3])
    assert encoded.num_tokens(rows).tolist() == [len(encoded[row].input_ids) for row in rows]
    assert encoded.num_trained(rows, train_on).tolist() == [num_trained(encoded[row], train_on) for row in rows]
    images, numbers = encoded.images(rows)
    assert (images.tolist(), numbers.tolist()) == ([1, 0, 0], [2, 1, 0, 0])


def test_all_trains_every_token_but_the_first(encoded):
    rows = encoded.all_rows[:3]
    assert (encoded.num_trained(rows, "all") == encoded.num_tokens(rows) - 1).all()
    assert (encoded.num_trained(rows, "assistant") < encoded.num_trained(rows, "all")).all()


def test_what_is_there_is_opened_as_it_is(encoded, template):
    again = encode_samples(Toys((), ()), template, encoded.path)
    assert len(again) == 4


def test_an_unfinished_folder_is_made_again(encoded, template):
    (encoded.path / "index.json").unlink()
    again = encode_samples(Toys(SAMPLES[1:2], [()]), template, encoded.path)
    assert len(again) == 1


@pytest.mark.slow
@pytest.mark.parametrize("num_proc", [1, 2])
def test_blocks_and_processes_change_nothing(encoded, template, tmp_path, monkeypatch, num_proc):
    monkeypatch.setattr(encoded_arrays, "BLOCK_SAMPLES", 1)
    again = encode_samples(Toys(), template, tmp_path / "again", num_proc=num_proc)
    for file in encoded.path.glob("*.bin"):
        assert (again.path / file.name).read_bytes() == file.read_bytes(), file.name


def test_texts_alone_are_encoded_too(template, tmp_path):
    texts = encode_samples(Toys(SAMPLES[1:2], [()]), template, tmp_path / "texts")
    assert texts.image_rows(0) == () and texts.num_images == 0


@pytest.mark.parametrize("block_samples", [1, 4096])
def test_parts_of_a_long_sample_are_rows_that_name_it(template, tmp_path, monkeypatch, block_samples):
    monkeypatch.setattr(encoded_arrays, "BLOCK_SAMPLES", block_samples)
    limits = Limits(len(template.encode(SAMPLES[1]).input_ids), image_weight=1)
    parts = encode_samples(Toys(), template, tmp_path / "store" / "encoded" / "parts", limits=limits)
    truncation = Truncation(template, limits)
    pieces = [(row, p) for row, (s, i) in enumerate(Toys().pairs) for p in truncation.pieces(s, i)]
    assert [parts.key(row) for row in parts.all_rows] == [f"store/{row}" for row, _ in pieces]
    assert [parts[row].input_ids.tolist() for row in parts.all_rows] == [
        p.encoded.input_ids.tolist() for _, p in pieces
    ]
    assert [parts.image_rows(row) for row in parts.all_rows] == [p.image_rows for _, p in pieces]
    assert parts.changes == truncation.changes and len(set(parts.samples)) < len(parts)


def test_nothing_may_fit(template, tmp_path):
    none = encode_samples(Toys(), template, tmp_path / "none", limits=Limits(3, 1, "drop"))
    assert len(none) == 0 and sum(none.changes.values()) >= 3


def test_another_template_or_tokenizer_has_another_fingerprint(template, tokenizer):
    other, limits = ChatTemplate(template.template.replace("User:", "Human:"), tokenizer, TOY_IMAGES), Limits(8, 2)
    name = encoding_name(template, limits)
    assert encoding_name(other, limits) != name != encoding_name(template, Limits(9, 2))
    assert encoding_name(ChatTemplate(template.template, tokenizer, TOY_IMAGES), limits) == name
