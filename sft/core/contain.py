"""The one place where any exception is caught: for work whose failure must not end what runs around it.

A benchmark that fails during training, a tracker without a network, a library without code for a device: each raises
whatever it likes, so no narrower class of exception would do.
"""

from __future__ import annotations

from collections.abc import Iterator
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
def contained(*kinds: type[Exception]) -> Iterator[Contained]:
    """Run the block and keep its exception, if there is one, in place of raising it.

    With `kinds`, only exceptions of these classes are kept, and others are raised. KeyboardInterrupt and SystemExit are
    always raised.
    """
    outcome = Contained()
    try:
        yield outcome
    except Exception as error:
        if kinds and not isinstance(error, kinds):
            raise
        outcome.error = error
