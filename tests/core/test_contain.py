"""What must not end the work around it is contained, and nothing else is."""

import pytest

from sft.core.contain import contained, on_error


def test_an_exception_is_kept_with_its_reason():
    with contained() as outcome:
        pass
    assert not outcome and outcome.reason == ""
    with contained() as outcome:
        raise ConnectionError("no\nnetwork")
    assert outcome and outcome.reason == "ConnectionError: no network"


def test_what_is_of_another_kind_or_ends_the_program_is_raised():
    for raised, kinds in ((KeyboardInterrupt, (Exception,)), (OSError, (ValueError,)), (OSError, ())):
        with pytest.raises(raised), contained(kinds):
            raise raised


def test_what_ends_a_block_early_is_handed_over_and_raised_again():
    ended = []
    with on_error(ended.append):
        pass
    for raised in (KeyboardInterrupt, OSError):
        with pytest.raises(raised), on_error(ended.append):
            raise raised
    assert [type(error) for error in ended] == [KeyboardInterrupt, OSError]
