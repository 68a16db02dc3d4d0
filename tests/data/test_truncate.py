"""What does not fit a pack is shortened, split or left out, and counted; nothing is lost without a count."""

import numpy as np
import pytest
from conftest import conversation, document, withheld
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.data.truncate import (
    DOCUMENT_DROPPED,
    DOCUMENT_SPLIT,
    DROPPED,
    NOTHING_TRAINED,
    PARAGRAPH_DROPPED,
    SHORTENED,
    SPLIT,
    TOO_LONG,
    TOO_MANY_IMAGES,
    TURN_DROPPED,
    Limits,
    Truncation,
)

TALK = conversation(("<dog>", "What is it?"), "A dog.", "Sure?", "Yes.", ("<fox>", "And this?"), "A fox.", system="Hi.")
PAGE = document("One.\n\nTwo.\n\n", "<dog>", "Three.", "<fox>", "Four.\n\nFive.")


def texts(template, pieces):
    return [template.tokenizer.decode(piece.encoded.input_ids) for piece in pieces]


def fitted(template, sample, tokens, images=24, policy="prefix"):
    """The text of each piece, its image rows, and what was counted."""
    truncation = Truncation(template, Limits(tokens, images, policy))
    pieces = truncation.pieces(sample, range(len(sample.images)))
    for piece in pieces:
        assert len(piece.encoded.input_ids) <= tokens
        assert len(piece.encoded.image_positions) == len(piece.image_rows)
        assert (
            piece.encoded.input_ids[list(piece.encoded.image_positions)]
            == template.tokenizer.convert_tokens_to_ids("<image>")
        ).all()
    return texts(template, pieces), [piece.image_rows for piece in pieces], dict(truncation.changes)


def long(*what):
    """One of each, since it is too long."""
    return {f"{name}: {TOO_LONG}": 1 for name in what}


def length(template, sample):
    return len(template.encode(sample).input_ids)


def test_what_fits_stays_as_it_is(template):
    whole = template.encode(TALK)
    (piece,) = Truncation(template, Limits(len(whole.input_ids), 2)).pieces(TALK, (5, 3))
    assert piece.encoded.input_ids.tolist() == whole.input_ids.tolist() and piece.image_rows == (5, 3)


def test_prefix_keeps_the_most_turns_that_fit(template):
    two = conversation(("<dog>", "What is it?"), "A dog.", "Sure?", "Yes.", system="Hi.")
    one = conversation(("<dog>", "What is it?"), "A dog.", system="Hi.")
    for tokens, kept in ((length(template, two), two), (length(template, two) - 1, one)):
        found, rows, changes = fitted(template, TALK, tokens)
        assert found == [template.tokenizer.decode(template.encode(kept).input_ids)]
        assert rows == [(0,)] and changes == long(SHORTENED)
    assert fitted(template, TALK, length(template, TALK), images=1)[0] == [
        template.tokenizer.decode(template.encode(two).input_ids)
    ]


@pytest.mark.parametrize("policy", ["prefix", "drop"])
def test_what_cannot_be_kept_is_left_out_and_counted(template, policy):
    assert fitted(template, TALK, 10, policy=policy) == ([], [], long(DROPPED))


def test_split_repeats_the_system_text_and_the_images_before(template):
    parts = [
        conversation(("<dog>", "What is it?"), "A dog.", system="Hi."),
        conversation(("<dog>", "Sure?"), "Yes.", system="Hi."),
        conversation(("<dog>", "<fox>", "And this?"), "A fox.", system="Hi."),
    ]
    expected = [template.tokenizer.decode(template.encode(part).input_ids) for part in parts]
    longest = max(length(template, part) for part in parts)
    assert fitted(template, TALK, longest, policy="split") == (expected, [(0,), (0,), (0, 1)], long(SPLIT))
    assert fitted(template, TALK, 999, images=1, policy="split")[1] == [(0,), (1,)]  # no room for an image before


def test_split_leaves_out_a_turn_that_fits_nowhere(template):
    talk = conversation("One?", "1.", "Tell me everything that there is to tell!", "No.", "Three?", "3.")
    tokens = max(length(template, conversation(*turn)) for turn in (("One?", "1."), ("Three?", "3.")))
    found, _, changes = fitted(template, talk, tokens, policy="split")
    assert len(found) == 2 and "1." in found[0] and "3." in found[1]
    assert changes == long(SPLIT, TURN_DROPPED)


@pytest.mark.parametrize("policy", ["prefix", "split"])
def test_what_is_not_to_be_learned_stays_so_and_a_part_without_anything_to_learn_is_left_out(template, policy):
    talk = conversation("One?", "One.", "Two?", "Two.", "Three?", "Three.", "Four?", "Four.")
    two = length(template, conversation("Three?", "Three.", "Four?", "Four."))
    truncation = Truncation(template, Limits(two, 24, policy))
    first, *others = truncation.pieces(withheld(talk, 1, 7), ())
    assert len(first.encoded.trained_spans) == len(first.encoded.withheld_spans) == 1
    assert len(others) == (policy == "split")
    truncation = Truncation(template, Limits(two, 24, policy))
    assert len(truncation.pieces(withheld(talk, 1, 3), ())) == (policy == "split")
    assert truncation.changes[NOTHING_TRAINED] == 1


def test_a_document_is_parted_between_paragraphs_with_one_beginning_and_one_end(template):
    found, rows, changes = fitted(template, PAGE, length(template, PAGE) - 1)
    assert found[0].startswith("<s>") and not found[0].endswith("</s>")
    assert found[-1].endswith("</s>") and not found[-1].startswith("<s>")
    assert sum(rows, ()) == (0, 1) and changes == long(DOCUMENT_SPLIT)


def test_a_document_with_too_many_images_is_parted_before_one(template):
    found, rows, changes = fitted(template, PAGE, 999, images=1)
    assert rows == [(0,), (1,)] and changes == {f"{DOCUMENT_SPLIT}: {TOO_MANY_IMAGES}": 1}
    assert "Three." in found[0] and "Four." in found[1]


def test_a_paragraph_that_fits_nowhere_is_left_out(template):
    page = document("One.\n\nThis paragraph is far longer than all the others are.\n\nThree.")
    found, _, changes = fitted(template, page, length(template, document("Three.")) + 4)
    assert "One." in found[0] and "Three." in found[-1] and "far longer" not in "".join(found)
    assert changes == long(DOCUMENT_SPLIT, PARAGRAPH_DROPPED)


def test_images_before_give_way_to_a_turn_that_fits_without_them(template):
    question = "And what do you see in this one?"
    last = conversation(("<fox>", question), "A fox.", system="Hi.")
    talk = conversation(("<dog>", "<cat>", "What?"), "Pets.", ("<fox>", question), "A fox.", system="Hi.")
    found, rows, changes = fitted(template, talk, length(template, last), policy="split")
    assert found[-1] == template.tokenizer.decode(template.encode(last).input_ids) and rows[-1] == (2,)
    assert changes == long(SPLIT)


def test_a_document_of_which_nothing_fits_is_counted_as_left_out(template):
    assert fitted(template, document("One very long paragraph without any break."), 6) == (
        [],
        [],
        long(DOCUMENT_DROPPED, PARAGRAPH_DROPPED),
    )


def test_a_document_without_blank_lines_is_parted_between_lines(template):
    found, _, changes = fitted(template, document("One.\nTwo.\nThree."), length(template, document("One.\nTwo.")))
    assert len(found) == 2 and changes == long(DOCUMENT_SPLIT)


words = st.text("ab \n", max_size=30)


@settings(max_examples=50, deadline=None)
@given(items=st.lists(words | st.sampled_from(["<dog>", "<fox>"]), min_size=1, max_size=8), tokens=st.integers(4, 40))
def test_the_pieces_of_a_document_hold_all_of_it_in_order(template, items, tokens):
    page = document(*items)
    truncation = Truncation(template, Limits(tokens, 1))
    pieces = truncation.pieces(page, range(len(page.images)))
    assert all(len(p.encoded.input_ids) <= tokens and len(set(p.image_rows)) <= 1 for p in pieces)
    rows = [row for piece in pieces for row in piece.image_rows]
    assert rows == sorted(set(rows))
    if not any(what.startswith(PARAGRAPH_DROPPED) for what in truncation.changes):
        assert rows == list(range(len(page.images)))
        said = "".join(texts(template, pieces)).replace(" ", "")
        assert said == template.tokenizer.decode(template.encode(page).input_ids).replace(" ", "")


def test_trained_spans_move_with_a_piece(template):
    pieces = Truncation(template, Limits(length(template, PAGE) - 1, 9)).pieces(PAGE, range(2))
    image_ids = set(template.tokenizer.convert_tokens_to_ids(["<image>", "<fake_token_around_image>", "<s>"]))
    for piece in pieces:
        trained = np.zeros(len(piece.encoded.input_ids), bool)
        for start, end in piece.encoded.trained_spans:
            trained[start:end] = True
        assert [int(token) in image_ids for token in piece.encoded.input_ids] == (~trained).tolist()
