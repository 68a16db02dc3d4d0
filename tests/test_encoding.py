"""Token ids on disk are those of the template."""

import numpy as np
import pytest
from conftest import conversation, document, num_trained

from sft.chat_template import ChatTemplate
from sft.encoding import encode_samples, fingerprint

SAMPLES = (
    conversation(("<dog>", "What is it?"), "A dog.", "Sure?", "Yes."),
    conversation("Hi.", "Hello.", system="Be kind."),
    document("A fox.", "<fox>", "The quick brown fox.", "<dog>"),
)
IMAGE_ROWS = ((0,), (), (1, 0))


@pytest.fixture
def encoded(template, tmp_path):
    return encode_samples(zip(SAMPLES, IMAGE_ROWS, strict=True), template, tmp_path / "store" / "encoded" / "toy")


def test_samples_read_back_as_the_template_encodes_them(encoded, template):
    assert len(encoded) == 3
    for row, sample in enumerate(SAMPLES):
        found, expected = encoded[row], template.encode(sample)
        assert found.key == f"store/{row}"
        assert found.input_ids.dtype == np.int64
        assert found.input_ids.tolist() == expected.input_ids.tolist()
        assert found.trained_spans == expected.trained_spans
        assert found.image_positions == expected.image_positions
        assert encoded.image_rows(row) == IMAGE_ROWS[row]


def test_ids_take_two_bytes_where_the_vocabulary_allows(encoded):
    assert np.load(encoded.path / "input_ids.npy").dtype == np.uint16


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_counts_are_those_of_the_samples(encoded, train_on):
    assert encoded.num_tokens.tolist() == [len(encoded[row].input_ids) for row in range(3)]
    assert encoded.num_trained(train_on).tolist() == [num_trained(encoded[row], train_on) for row in range(3)]
    rows, offsets = encoded.images
    assert (rows.tolist(), offsets.tolist()) == ([0, 1, 0], [0, 1, 1, 3])


def test_all_trains_every_token_but_the_first(encoded):
    assert (encoded.num_trained("all") == encoded.num_tokens - 1).all()
    assert (encoded.num_trained("assistant") < encoded.num_trained("all")).all()


def test_what_is_there_is_opened_as_it_is(encoded, template):
    again = encode_samples([], template, encoded.path)
    assert len(again) == 3


def test_an_unfinished_folder_is_made_again(encoded, template):
    (encoded.path / "index.json").unlink()
    again = encode_samples([(SAMPLES[1], ())], template, encoded.path)
    assert len(again) == 1


def test_another_template_or_tokenizer_has_another_fingerprint(template, tokenizer):
    other = ChatTemplate(template.template.replace("User:", "Human:"), tokenizer)
    assert fingerprint(other) != fingerprint(template)
    assert fingerprint(ChatTemplate(template.template, tokenizer)) == fingerprint(template)
