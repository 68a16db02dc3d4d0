"""The one place where any exception is caught: for work whose failure must not end what runs around it, and for what
has to be tidied up whatever ends a block.

A benchmark that fails during training, a tracker without a network, a library without code for a device: each raises
whatever it likes, so no narrower class of exception would do.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sft.core.errors import reason_of


class Contained:
    """The outcome of a block; true when the block failed."""

    error: Exception | None = None

    def __bool__(self) -> bool:
        return self.error is not None

    @property
    def reason(self) -> str:
        """The reason of the failure on one line without secrets; empty when the block succeeded."""
        return "" if self.error is None else reason_of(self.error)


@contextmanager
def contained(kinds: tuple[type[Exception], ...] = (Exception,)) -> Iterator[Contained]:
    """Run the block; keep an exception of one of these kinds in place of raising it. KeyboardInterrupt and SystemExit
    are always raised."""
    outcome = Contained()
    try:
        yield outcome
    except kinds as error:
        # The exception is kept, and with it the frames that it passed: what these hold, a model for example, is freed.
        traceback.clear_frames(error.__traceback__)
        outcome.error = error


@contextmanager
def on_error(act: Callable[[BaseException], None]) -> Iterator[None]:
    """Run the block; whatever ends it early, KeyboardInterrupt included, is handed to `act` and raised again."""
    try:
        yield
    except BaseException as error:
        act(error)
        raise
