"""The two ways this toolkit fails on purpose.

    Exception
    ├── UserError      what the user gave is wrong: one line a problem, exit status 2
    └── RunError       the work could not be done: one line, exit status 1

A record that is left out on purpose is neither: see `sft.core.sample.SkipSample`. Anything else is a bug and keeps its
traceback.
"""

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """What the user gave is wrong: one problem, or several. Each says where, what was found and what would be right."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*dict.fromkeys(problems))

    def __str__(self) -> str:
        return "; ".join(self.args)


class RunError(Exception):
    """The work failed for a reason that is not the user's input. The message says where and why."""


_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}|(?<=://)[^/\s@]+(?=@)")
"""An access token of the Hugging Face hub; name and password in a URL."""
_NAMES_OF_SECRETS = ("TOKEN", "KEY", "SECRET", "PASSWORD")


def without_secrets(text: str) -> str:
    """Return a text with `***` in place of what gives access to something: messages of libraries may hold it."""
    for name, value in os.environ.items():
        if name.upper().endswith(_NAMES_OF_SECRETS) and len(value) >= 8:
            text = text.replace(value, "***")
    return _TOKEN.sub("***", text)


def printable(text: object) -> str:
    """Return a text without secrets on one printable line: control characters and half surrogate pairs are escaped."""
    text = without_secrets(str(text))
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def reason_of(error: BaseException) -> str:
    """Return what went wrong on one line, without the further lines and secrets that messages of libraries may hold."""
    said = without_secrets(" ".join(str(error).split()))
    return said if isinstance(error, UserError | RunError) else f"{type(error).__name__}: {said}".removesuffix(": ")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the known name closest to `name`, or an empty string when none is close."""
    matches = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""
